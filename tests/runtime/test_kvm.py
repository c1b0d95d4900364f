"""Small machine-code guests on KVM: how they end, how they are stopped, and what is left."""

import errno
import os
import time
from collections.abc import Iterator, Sequence

import pytest
from runtime.rigs import nothing_left

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime import vm
from lguestlib.runtime.kvm import KvmMachine
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot, Stopped
from lguestlib.runtime.mmio_machine import DEVICES_AT, DEVICES_MAX
from lguestlib.runtime.vm import KvmUnusable, open_kvm
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue

ENTRY = GuestAddress(0x1000)
STOP_SECONDS = 0.1

OUT_F4 = "e6f4"  # out %al, $0xf4
OUT_64 = "e664"  # out %al, $0x64
OUT_E9 = "e6e9"  # out %al, $0xe9
HALT = "fa f4"  # cli; hlt
SPIN = "ebfe"  # jmp .


def al(value: int) -> str:
    return f"b0{value:02x}"  # mov $value, %al


class Nothing(Device):
    """A device with one queue and nothing to do."""

    device_type = 63

    def queues(self) -> Sequence[Queue]:
        return (Queue("work", self.serve),)

    def serve(self, chain: Chain) -> int:
        return 0


@pytest.fixture(autouse=True)
def usable() -> Iterator[None]:
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        pytest.skip(str(error))
    with nothing_left():
        yield


@pytest.fixture
def said() -> list[str]:
    return []


def run(code: str, said: list[str]) -> Outcome:
    with KvmMachine(GuestMemory.anonymous(1 << 20), said.append) as machine:
        machine.memory.write(ENTRY, bytes.fromhex(code))
        machine.boot(ENTRY, GuestAddress(0))
        machine.start()
        return machine.wait()


@pytest.mark.parametrize("verdict", [0, 1, 7, 255])
def test_the_exit_port_powers_off_with_a_verdict(said: list[str], verdict: int) -> None:
    assert run(al(verdict) + OUT_F4 + HALT, said) == PowerOff(verdict)


def test_the_keyboard_controllers_reset_line_reboots(said: list[str]) -> None:
    assert run(al(0xFE) + OUT_64 + HALT, said) == Reboot()
    assert run(al(0x20) + OUT_64 + al(3) + OUT_F4, said) == PowerOff(3)


def test_last_words_are_told_by_the_line(said: list[str]) -> None:
    words = "".join(al(byte) + OUT_E9 for byte in b"no more\n")
    run(words + al(1) + OUT_F4, said)
    assert said == ["no more"]


def test_a_triple_fault_is_a_crash_with_its_place(said: list[str]) -> None:
    outcome = run("0f0b", said)  # ud2, with no interrupt descriptor table
    assert isinstance(outcome, Crash)
    assert "triple fault" in outcome.reason and "0x1000" in outcome.reason


def test_an_instruction_nobody_can_run_is_a_crash(said: list[str]) -> None:
    outcome = run("ea 00000000 0800", said)  # ljmp to a selector that is not there
    assert isinstance(outcome, Crash)


def test_registers_nobody_has_read_as_ones_and_take_writes(said: list[str]) -> None:
    nowhere = (DEVICES_AT + 0x10_0000).to_bytes(4, "little").hex()
    # mov 0xd0100000, %eax; mov %eax, 0xd0100000; out %al, $0xf4
    assert run(f"a1{nowhere} a3{nowhere}" + OUT_F4, said) == PowerOff(0xFF)


def test_a_devices_registers_are_where_the_command_line_says(said: list[str]) -> None:
    with KvmMachine(GuestMemory.anonymous(1 << 20), said.append) as machine:
        machine.add(Nothing("first"))
        machine.add(Nothing("second"))
        first, second = machine.device_parameters()
        assert (first, second) == ("virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio.device=4K@0xd0001000:6")
        # mov 0xd0001008, %eax: the second one's device ID
        machine.memory.write(ENTRY, bytes.fromhex("a1 081000d0" + OUT_F4))
        machine.boot(ENTRY, GuestAddress(0))
        machine.start()
        assert machine.wait() == PowerOff(63)


def test_a_notification_wakes_its_queues_thread_past_the_cpus(said: list[str]) -> None:
    """The guest writes QueueNotify and goes on: no exit, an eventfd."""
    with KvmMachine(GuestMemory.anonymous(1 << 20), said.append) as machine:
        runner = machine.add(Nothing("bell"))
        # movl $0, 0xd0000050; movl $5, 0xd0000050 (no such queue); out
        machine.memory.write(ENTRY, bytes.fromhex("c705 500000d0 00000000 c705 500000d0 05000000" + OUT_F4))
        machine.boot(ENTRY, GuestAddress(0))
        machine.start()
        machine.wait()
        assert runner.kicks[0].wait() == 1
        assert runner.transport.refused == 1


@pytest.mark.parametrize("code", [HALT, SPIN])
def test_a_guest_is_stopped_promptly_asleep_or_busy(said: list[str], code: str) -> None:
    machine = KvmMachine(GuestMemory.anonymous(1 << 20), said.append)
    machine.memory.write(ENTRY, bytes.fromhex(code))
    machine.boot(ENTRY, GuestAddress(0))
    machine.start()
    time.sleep(0.05)
    start = time.monotonic()
    machine.request_stop()
    assert machine.wait() == Stopped()
    machine.close()
    assert time.monotonic() - start < STOP_SECONDS


def test_fifty_machines_in_a_row_leave_nothing(said: list[str]) -> None:
    for _ in range(50):
        assert run(al(0) + OUT_F4, said) == PowerOff(0)


def test_a_machine_that_never_started_closes(said: list[str]) -> None:
    machine = KvmMachine(GuestMemory.anonymous(1 << 20), said.append)
    machine.add(Nothing("unused"))
    machine.close()


def test_the_bus_takes_as_many_devices_as_it_says(said: list[str]) -> None:
    with KvmMachine(GuestMemory.anonymous(1 << 20), said.append) as machine:
        for number in range(DEVICES_MAX):
            machine.add(Nothing(f"device {number}"))
        with pytest.raises(ValueError, match=f"no room for more than {DEVICES_MAX}"):
            machine.add(Nothing("one too many"))
        assert len(machine.runners) == DEVICES_MAX


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOENT, "load the kvm module"), (errno.EACCES, "join the group"), (errno.EMFILE, "")]
)
def test_kvm_that_cannot_be_opened_names_the_reason_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmUnusable) as caught:
        open_kvm()
    assert str(caught.value).startswith(f"/dev/kvm: {os.strerror(number)}") and remedy in str(caught.value)


def test_kvm_without_a_needed_capability_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vm.NEEDED, "KVM_CAP_TOMORROW", 9999)
    with pytest.raises(KvmUnusable, match="lacks KVM_CAP_TOMORROW"):
        open_kvm()


def test_a_refused_machine_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setitem(vm.NEEDED, "KVM_CAP_TOMORROW", 9999)
    with GuestMemory.anonymous(1 << 20) as memory:
        with pytest.raises(KvmUnusable):
            KvmMachine(memory, said.append)
        monkeypatch.undo()
        monkeypatch.setattr(memory.regions[0], "host_address", 1)
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
            KvmMachine(memory, said.append)

