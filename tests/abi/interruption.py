"""A call in a thread of its own that nothing but a signal ends."""

import threading
import time
from collections.abc import Callable

from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread

PATIENCE = 10.0
"""Seconds after which a call that should have ended has failed."""


def interrupted(call: Callable[[], object]) -> BaseException | None:
    """What *call* raises when its thread is interrupted until it ends; None where it returns."""
    install_interrupt_handler()
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    native_id = thread.native_id
    assert native_id is not None
    give_up = time.monotonic() + PATIENCE
    while thread.is_alive() and time.monotonic() < give_up:
        interrupt_thread(native_id)
        thread.join(0.01)
    assert not thread.is_alive(), "the call was not interrupted"
    return raised[0]
