"""The signal that interrupts one thread's system call and does nothing else."""

import os
import signal
import sys
import threading

import interpreters
import pytest

from abi.interruption import PATIENCE, interrupted
from lguestlib.abi.signals import INTERRUPT, install_interrupt_handler, interrupt_thread
from lguestlib.abi.uio import readv


def test_the_signal_is_a_real_time_one() -> None:
    assert signal.SIGRTMIN < INTERRUPT < signal.SIGRTMAX


def test_only_the_thread_named_is_interrupted() -> None:
    reading, writing = os.pipe()
    got: list[bytes] = []

    def bystander() -> None:
        view = memoryview(bytearray(4))
        readv(reading, [view])
        got.append(bytes(view))

    thread = threading.Thread(target=bystander, daemon=True)
    thread.start()
    try:
        other_reading, other_writing = os.pipe()
        try:
            view = memoryview(bytearray(1))
            assert isinstance(interrupted(lambda: readv(other_reading, [view])), InterruptedError)
        finally:
            os.close(other_reading)
            os.close(other_writing)
        os.write(writing, b"mail")
        thread.join(PATIENCE)
        assert got == [b"mail"]
    finally:
        os.close(writing)
        os.close(reading)


def test_nothing_runs_in_the_interpreter_and_pythons_own_calls_go_on() -> None:
    reading, writing = os.pipe()
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(os.read(reading, 4)), daemon=True)
    thread.start()
    try:
        install_interrupt_handler()
        assert thread.native_id is not None
        for _ in range(20):
            interrupt_thread(thread.native_id)
            thread.join(0.005)
        assert thread.is_alive(), "os.read retries EINTR (PEP 475)"
        os.write(writing, b"mail")
        thread.join(PATIENCE)
        assert got == [b"mail"]
    finally:
        os.close(writing)
        os.close(reading)


def test_a_thread_that_has_ended_is_no_error() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    interrupt_thread(thread.native_id)


def test_no_thread_at_all_is_an_error_that_names_the_call() -> None:
    with pytest.raises(OSError, match="tgkill: Invalid argument: 0"):
        interrupt_thread(0)


def test_any_thread_can_install_the_handler() -> None:
    program = """
import os, threading
from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread
thread = threading.Thread(target=install_interrupt_handler)
thread.start()
thread.join()
interrupt_thread(threading.get_native_id())
print("alive")
"""
    assert interpreters.run([sys.executable], "-c", program) == "alive\n"
