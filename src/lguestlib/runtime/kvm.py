"""A machine on KVM: kicks are ioeventfds, interrupts are irqfds.

The guest leaves for user space only to touch a device's other registers: its
notifications go from the kernel straight to the queue's thread, and that
thread's interrupt goes through the in-kernel interrupt controllers, past the
thread that runs the guest.
"""

import ctypes
from collections.abc import Callable

from lguestlib.abi import kvm as abi
from lguestlib.abi.virtio_mmio import VIRTIO_MMIO_QUEUE_NOTIFY
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.machine import Crash, Outcome, Stopped
from lguestlib.runtime.mmio_machine import MmioMachine
from lguestlib.runtime.ports import GuestPorts
from lguestlib.runtime.runner import MmioRunner
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vm import Vm, open_kvm

LINES = (5, 6, 7, 9, 10, 11, 12, 14, 15, 3, 4)
"""Interrupt lines of the devices, in bus order; past their number they are shared."""


class KvmMachine(MmioMachine):
    """One virtual CPU in flat 32-bit protected mode, with in-kernel interrupt controllers.

    Raises KvmUnusable, or OSError where KVM refuses a request.
    """

    def __init__(
        self, memory: GuestMemory, report: Callable[[str], None], tracer: Tracer | None = None
    ) -> None:
        kvm = open_kvm()
        super().__init__(memory, report, tracer)
        self._ports = GuestPorts(report)
        self._vm: Vm | None = None
        try:
            self._vm = Vm(kvm, memory)
            self._vcpu = self._vm.add_vcpu(self._vm.supported_cpuid())
        except BaseException:
            self._abandon()
            raise

    def device_parameters(self) -> list[str]:
        """The command-line words that tell a kernel of the devices (virtio 1.3, 4.2.1)."""
        return [
            f"virtio_mmio.device=4K@{self.address_of(slot):#x}:{LINES[slot % len(LINES)]}"
            for slot in range(len(self.runners))
        ]

    def boot(self, entry: GuestAddress, parameters: GuestAddress) -> None:
        """Point the CPU at *entry* as the 32-bit boot protocol says, boot parameters at *parameters*."""
        self._vcpu.enter_protected_mode(entry, parameters, GuestAddress(0))

    def _attach(self, runner: MmioRunner, slot: int) -> None:
        assert self._vm
        notify = GuestAddress(self.address_of(slot) + VIRTIO_MMIO_QUEUE_NOTIFY)
        for index, kick in enumerate(runner.kicks):
            self._vm.add_doorbell(notify, 4, kick.fd, runner.device.name, index)
        self._vm.add_irqfd(runner.interrupt.fd, LINES[slot % len(LINES)], runner.device.name)

    def _detach(self) -> None:
        if self._vm:
            self._vm.close()

    def _leave(self) -> None:
        self._vcpu.leave()

    def _enter(self) -> Outcome:
        while not self._stopping:
            reason = self._vcpu.run()
            if reason == abi.KVM_EXIT_MMIO:
                self._mmio()
            elif reason == abi.KVM_EXIT_IO:
                outcome = self._port()
                if outcome:
                    return outcome
            elif reason is not None:
                return Crash(self._vcpu.describe(reason))
        return Stopped()

    def _mmio(self) -> None:
        access = self._vcpu.state.mmio
        target = self.access(access.phys_addr)
        if access.is_write:
            if target:
                runner, offset = target
                runner.write(offset, bytes(access.data[: access.len]))
        else:
            answer = target[0].read(target[1], access.len) if target else b"\xff" * access.len
            ctypes.memmove(access.data, answer, access.len)

    def _port(self) -> Outcome | None:
        io = self._vcpu.state.io
        start, end = io.data_offset, io.data_offset + io.size * io.count
        if io.direction == abi.KVM_EXIT_IO_IN:
            self._vcpu.shared[start:end] = b"\xff" * (end - start)
            return None
        return self._ports.write(io.port, self._vcpu.shared[start:end])
