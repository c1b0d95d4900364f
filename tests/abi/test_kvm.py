"""KVM's requests and structures, against the kernel, from a 64-bit and from a 32-bit process."""

import json
import platform
import sys
from functools import cache

import interpreters
import pytest

from abi import kvm_program as program
from lguestlib.abi import kvm


@cache
def _outcome(interpreter: str) -> dict[str, object]:
    command = [interpreter] if interpreter else interpreters.i386_or_skip()
    told: dict[str, object] = json.loads(interpreters.run(command, program.__file__))
    return told


@pytest.fixture(params=[pytest.param(sys.executable, id="native"), pytest.param("", id="i386")])
def told(request: pytest.FixtureRequest) -> dict[str, object]:
    if platform.machine() not in ("x86_64", "i686"):
        pytest.skip(f"KVM's declarations are those of x86, this is {platform.machine()}: use an x86 machine")
    told = _outcome(request.param)
    if "refused" in told:
        pytest.skip(f"{told['refused']} (enable virtualisation, and join the group that owns /dev/kvm)")
    return told


def test_the_version_and_the_shared_page_are_those_declared(told: dict[str, object]) -> None:
    assert (told["version"], told["room"]) == (kvm.KVM_API_VERSION, True)


def test_immediate_exit_ends_a_run_with_eintr(told: dict[str, object]) -> None:
    assert told["immediate"] is True


def test_a_port_an_ioeventfd_watches_does_not_leave_the_kernel(told: dict[str, object]) -> None:
    assert told["kicks"] == 1


def test_a_port_written_is_told_with_its_data(told: dict[str, object]) -> None:
    assert told["out"] == [kvm.KVM_EXIT_IO, kvm.KVM_EXIT_IO_OUT, 1, program.PORT, 1, program.LETTER]


def test_memory_that_is_not_there_is_told_and_a_read_gets_its_answer(told: dict[str, object]) -> None:
    assert told["write"] == [kvm.KVM_EXIT_MMIO, program.MEMORY, 1, 1, program.LETTER]
    assert told["read"] == [kvm.KVM_EXIT_MMIO, program.MEMORY, 1, 0]
    assert told["registers"] == [program.CODE_AT + len(program.CODE), program.ANSWER]


def test_a_halt_ends_the_run(told: dict[str, object]) -> None:
    assert told["halt"] == kvm.KVM_EXIT_HLT


def test_the_page_written_is_in_the_dirty_log(told: dict[str, object]) -> None:
    assert told["dirty"] == 1 << program.DIRTY_PAGE


def test_the_state_of_the_cpu_goes_in_and_comes_out(told: dict[str, object]) -> None:
    assert told["cpuid"] == [True, 0]
    assert told["fpu"] == [program.CONTROL_WORD, program.OPERAND_AT, 0x77]
    assert (told["state"], told["msrs"]) == (True, [1, 1])


def test_an_interrupt_request_refused_names_itself_and_the_interrupt(told: dict[str, object]) -> None:
    assert told["refusal"] == "[Errno 9] KVM_IRQFD: Bad file descriptor: 24"
