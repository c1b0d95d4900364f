"""The PC: processors, memory with its holes, a PCI bus, and the few old devices that Linux looks for.

On the data path no processor leaves the guest: a queue's notification is an ioeventfd,
its interrupt an irqfd.  What does leave is served by the processor's own thread.
"""

import queue
import threading
from collections.abc import Callable

from lguestlib.abi import bootparam
from lguestlib.abi import kvm as abi
from lguestlib.abi.virtio_mmio import VIRTIO_MMIO_QUEUE_NOTIFY
from lguestlib.memory.acpi.tables import (
    POWER_OFF_TYPE,
    SLEEP_ENABLE,
    SLEEP_TYPE_SHIFT,
    MmioDevice,
    Pci,
    Platform,
    acpi_tables,
)
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.linux_boot import E820Entry, ram_map
from lguestlib.memory.image.long_mode import LongMode
from lguestlib.memory.region import Region
from lguestlib.runtime.ending import end_thread
from lguestlib.runtime.machine import Crash, Machine, Outcome, PowerOff, Reboot, Stopped
from lguestlib.runtime.mmio_machine import mmio_runner
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.options import TransportName
from lguestlib.runtime.pc import clock, serial
from lguestlib.runtime.pc.clock import CmosClock
from lguestlib.runtime.pc.processor import add_processors, enter_long_mode
from lguestlib.runtime.pc.registers import PciRegisters
from lguestlib.runtime.pc.runner import ExternalPciRunner, PciDeviceRunner
from lguestlib.runtime.pc.serial import Serial8250, Verdict
from lguestlib.runtime.pc.vectors import Routes
from lguestlib.runtime.ports import GuestPorts, PORT_KEYBOARD
from lguestlib.runtime.runner import MmioRunner
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.external import ExternalDevice
from lguestlib.runtime.vm import NEEDED, Vcpu, Vm, capability, open_kvm
from lguestlib.virtio.device import Device
from lguestlib.virtio.mmio import REGION_SIZE
from lguestlib.virtio.pci import bus
from lguestlib.virtio.pci.bus import ECAM_SIZE, SLOTS, PciBus

PC_NEEDED = NEEDED | {
    "KVM_CAP_IRQ_ROUTING": abi.KVM_CAP_IRQ_ROUTING,
    "KVM_CAP_SIGNAL_MSI": abi.KVM_CAP_SIGNAL_MSI,
}
"""The capabilities without which a PC cannot be built."""

LOW_MEMORY_MAX = 0xC000_0000
"""Bytes of memory below the holes; what there is beyond is above 4 GiB."""
HIGH_MEMORY_AT = GuestAddress(1 << 32)

BARS = GuestRange(GuestAddress(0xC000_0000), 0x1000_0000)
MMIO_AT = GuestAddress(0xD000_0000)
ECAM = GuestRange(GuestAddress(0xE000_0000), ECAM_SIZE)
HIGH_BARS = GuestRange(GuestAddress(1 << 38), 1 << 36)
"""Where devices are: by PCI, by virtio-mmio, their configuration; and where the guest may put them."""

MEMORY_MAX = LOW_MEMORY_MAX + HIGH_BARS.start - HIGH_MEMORY_AT
"""Bytes of memory that fit between all that."""

FIRMWARE = GuestRange(GuestAddress(0xE0000), 0x20000)
"""Where the ACPI tables are, below 1 MiB, where a kernel looks that has not been told."""

PCI_LINES = [16 + slot % 8 for slot in range(SLOTS)]
"""The I/O APIC's inputs that the slots' pins lead to."""
MMIO_LINES = (5, 6, 7, 9, 10, 11, 12, 14, 15)
MMIO_DEVICES_MAX = 64

SLEEP_PORT = 0x600
RESET_PORT = 0xCF9
_RESET_CPU = 1 << 2
RESET_VALUE = 0x6
"""A full reset, of what a PC's chipset has at this port."""

RESET_VECTOR = GuestAddress(0xFFFF0)
_RESET_CODE = bytes.fromhex("baf90c b006 ee f4 ebfd")
"""mov $0xcf9, %dx; mov $6, %al; out %al, %dx; hlt; jmp to the hlt: in real mode.

Where hardware is reduced, and there is no EFI, Linux starts over as the oldest PCs do:
it jumps into the BIOS.
"""

_ONES = b"\xff"

PcRunner = PciDeviceRunner | ExternalPciRunner | MmioRunner


def pc_memory(size: int, shared: bool = False) -> GuestMemory:
    """Guest memory of *size* bytes with a PC's hole below 4 GiB.  Raises OSError (ENOMEM)."""
    make = Region.memfd if shared else Region.anonymous
    low = make(GuestAddress(0), min(size, LOW_MEMORY_MAX))
    if size <= LOW_MEMORY_MAX:
        return GuestMemory([low])
    try:
        return GuestMemory([low, make(HIGH_MEMORY_AT, size - LOW_MEMORY_MAX)])
    except BaseException:
        low.close()
        raise


class PcMachine(Machine[PcRunner]):
    """A PC with *cpus* processors whose virtio devices are behind *transport*.

    *memory* is as `pc_memory` makes it.  *console* is given what the guest sends to its
    serial port.  Raises KvmUnusable, or OSError where KVM refuses a request.
    """

    def __init__(
        self,
        memory: GuestMemory,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
        cpus: int = 1,
        transport: TransportName = "pci",
        console: Callable[[bytes], None] = lambda text: None,
    ) -> None:
        kvm = open_kvm(PC_NEEDED)
        super().__init__(memory, report, tracer)
        self.transport = transport
        self._guest_ports = GuestPorts(report)
        self._bus = PciBus()
        self._verdict = Verdict()
        self._serial = {
            serial.CONSOLE_AT: Serial8250(console, lambda: self._pulse(serial.CONSOLE_LINE)),
            serial.VERDICT_AT: Serial8250(self._verdict.take, lambda: self._pulse(serial.VERDICT_LINE)),
        }
        self._clock = CmosClock()
        # Held by the processor that is at what all devices share: the ports, and PCI's configuration.
        self._shared = threading.Lock()
        self._pins: set[int] = set()
        self._pin_lock = threading.Lock()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._halting = False
        self._machine: Vm | None = None
        try:
            self._machine = Vm(kvm, memory)
            self._routes = Routes(self._machine)
            self._machine.set_routes({})
            self._doorbell_length = 0 if capability(kvm, abi.KVM_CAP_IOEVENTFD_ANY_LENGTH) > 0 else 2
            add_processors(self._machine, cpus)
            self._processors = tuple(self._machine.vcpus)
        except BaseException:
            self._abandon()
            raise

    @property
    def _vm(self) -> Vm:
        assert self._machine, "the machine is closed"
        return self._machine

    @property
    def exits(self) -> int:
        """How often a processor has left the guest for something that user space does."""
        return sum(processor.exits for processor in self._processors)

    def add(self, device: Device) -> PcRunner:
        """Put *device* on the bus, behind those before it.  Raises ValueError if it has no room."""
        runner = self._add_mmio(device) if self.transport == "mmio" else self._add_pci(device)
        self.runners.append(runner)
        return runner

    def _add_pci(self, device: Device) -> PciDeviceRunner | ExternalPciRunner:
        slot = len(self._bus.functions) + 1
        registers = PciRegisters(
            device, self._vm, self._routes, lambda level: self._set_pin(slot, level), self._doorbell_length, self.tracer
        )
        try:
            self._bus.add(registers)
        except ValueError as error:
            registers.close()
            raise ValueError(f"{device.name}: {error}") from None
        if isinstance(device, ExternalDevice):
            try:
                return ExternalPciRunner(device, registers, self.memory, self.report, lambda: self._stopping)
            except BaseException:
                registers.close()
                raise
        return PciDeviceRunner(device, registers, self.memory, self.report, self.tracer)

    def _add_mmio(self, device: Device) -> MmioRunner:
        slot = len(self.runners)
        if slot == MMIO_DEVICES_MAX:
            raise ValueError(f"{device.name}: the bus has no room for more than {MMIO_DEVICES_MAX} devices")
        # Without NOTIFICATION_DATA: what KVM matches is the queue's number alone.
        runner = mmio_runner(device, self.memory, self.report, self.tracer, lambda: self._stopping)
        notify = GuestAddress(self._mmio_range(slot).start + VIRTIO_MMIO_QUEUE_NOTIFY)
        try:
            for index, kick in enumerate(runner.kicks):
                self._vm.add_doorbell(notify, 4, kick.fd, device.name, index)
            self._vm.add_irqfd(runner.interrupt.fd, MMIO_LINES[slot % len(MMIO_LINES)], device.name)
        except BaseException:
            runner.close()
            raise
        return runner

    def _mmio_range(self, slot: int) -> GuestRange:
        return GuestRange(GuestAddress(MMIO_AT + slot * REGION_SIZE), REGION_SIZE)

    def place_firmware(self) -> GuestAddress:
        """Do what a PC's firmware does, with all devices there: where the ACPI tables begin."""
        self._bus.place(BARS.start, PCI_LINES)
        platform = Platform(
            cpus=len(self._vm.vcpus),
            sleep_port=SLEEP_PORT,
            reset_port=RESET_PORT,
            reset_value=RESET_VALUE,
            serial=[
                (serial.CONSOLE_AT, serial.CONSOLE_LINE), (serial.VERDICT_AT, serial.VERDICT_LINE),
            ],
            clock=(clock.PORT, clock.LINE),
            pci=Pci(ECAM, (BARS, HIGH_BARS), PCI_LINES) if self.transport == "pci" else None,
            mmio=[
                MmioDevice(self._mmio_range(slot), MMIO_LINES[slot % len(MMIO_LINES)])
                for slot, runner in enumerate(self.runners)
                if not isinstance(runner, PciDeviceRunner | ExternalPciRunner)
            ],
        )
        tables = acpi_tables(platform, FIRMWARE.start)
        self.memory.write(tables.at, tables.content)
        self.memory.write(RESET_VECTOR, _RESET_CODE)
        return tables.at

    def memory_map(self) -> list[E820Entry]:
        """The memory, and what is reserved."""
        reserved = (E820Entry(where, bootparam.E820_TYPE_RESERVED) for where in (FIRMWARE, ECAM))
        return sorted([*ram_map(self.memory), *reserved])

    def boot_32(
        self, entry: GuestAddress, esi: GuestAddress = GuestAddress(0), ebx: GuestAddress = GuestAddress(0)
    ) -> None:
        """Point the first processor at *entry* in protected mode."""
        self._vm.vcpus[0].enter_protected_mode(entry, esi, ebx)

    def boot_64(self, entry: GuestAddress, parameters: GuestAddress, mode: LongMode) -> None:
        """Point the first processor at *entry* in long mode."""
        enter_long_mode(self._vm.vcpus[0], entry, parameters, mode)

    def _detach(self) -> None:
        # A device of another process's may still have something to say.
        with self._pin_lock:
            machine, self._machine = self._machine, None
        if machine:
            machine.close()

    def _set_pin(self, slot: int, level: bool) -> None:
        """The function in *slot* asserts its pin or does not: its line is asserted while any function on it does."""
        line = PCI_LINES[slot]
        with self._pin_lock:
            before = any(PCI_LINES[other] == line for other in self._pins)
            self._pins.add(slot) if level else self._pins.discard(slot)
            after = any(PCI_LINES[other] == line for other in self._pins)
            if before != after and self._machine:
                self._machine.set_line(line, after)

    def _pulse(self, line: int) -> None:
        self._vm.set_line(line, True)
        self._vm.set_line(line, False)

    def _leave(self) -> None:
        self._outcomes.put(Stopped())

    def _enter(self) -> Outcome:
        """Start a thread for each processor, and end them all when one has told how the guest ends."""
        threads = [
            threading.Thread(target=self._run_processor, args=(vcpu, f"cpu{number}"), daemon=True)
            for number, vcpu in enumerate(self._vm.vcpus)
        ]
        for thread in threads:
            thread.start()
        outcome = self._outcomes.get()
        self._halting = True
        for thread, vcpu in zip(threads, self._vm.vcpus, strict=True):
            end_thread(thread, vcpu.leave)
        return outcome

    def _run_processor(self, vcpu: Vcpu, name: str) -> None:
        name_this_thread(name)
        try:
            self._outcomes.put(self._serve(vcpu))
        except Exception as error:
            self._outcomes.put(Crash(f"{name}: {type(error).__name__}: {error}"))

    def _serve(self, vcpu: Vcpu) -> Outcome:
        while not self._halting:
            reason = vcpu.run()
            if reason == abi.KVM_EXIT_MMIO:
                access = vcpu.state.mmio
                if access.is_write:
                    self._store(access.phys_addr, bytes(access.data[: access.len]))
                else:
                    access.data[: access.len] = list(self._load(access.phys_addr, access.len))
            elif reason == abi.KVM_EXIT_IO:
                if outcome := self._port(vcpu):
                    return outcome
            elif reason is not None:
                return Crash(vcpu.describe(reason))
        return Stopped()

    def _load(self, address: int, size: int) -> bytes:
        """*size* bytes the guest reads at *address*, where there is no memory."""
        if found := self._bus.at(address):
            return found[0].read(found[1], size)
        if 0 <= address - ECAM.start < ECAM.size:
            with self._shared:
                return self._bus.read_ecam(address - ECAM.start, size)
        if mmio := self._mmio_at(address):
            return mmio[0].read(mmio[1], size)
        return _ONES * size

    def _store(self, address: int, data: bytes) -> None:
        if found := self._bus.at(address):
            found[0].write(found[1], data)
        elif 0 <= address - ECAM.start < ECAM.size:
            with self._shared:
                self._bus.write_ecam(address - ECAM.start, data)
        elif mmio := self._mmio_at(address):
            mmio[0].write(mmio[1], data)

    def _mmio_at(self, address: int) -> tuple[MmioRunner, int] | None:
        slot, offset = divmod(address - MMIO_AT, REGION_SIZE)
        if not 0 <= slot < len(self.runners):
            return None
        runner = self.runners[slot]
        return None if isinstance(runner, PciDeviceRunner | ExternalPciRunner) else (runner, offset)

    def _port(self, vcpu: Vcpu) -> Outcome | None:
        io = vcpu.state.io
        for at in range(io.data_offset, io.data_offset + io.size * io.count, io.size):
            with self._shared:
                if io.direction == abi.KVM_EXIT_IO_IN:
                    vcpu.shared[at : at + io.size] = self._in(io.port, io.size)
                elif outcome := self._out(io.port, vcpu.shared[at : at + io.size]):
                    return outcome
        return None

    def _serial_at(self, port: int) -> tuple[Serial8250, int] | None:
        """The serial port that has *port*, and which of its own that is."""
        first = port // serial.PORTS * serial.PORTS
        return (self._serial[first], port - first) if first in self._serial else None

    def _in(self, port: int, size: int) -> bytes:
        if port in bus.PORTS:
            return self._bus.read_port(port, size)
        if size == 1:
            if found := self._serial_at(port):
                return bytes([found[0].read(found[1])])
            if 0 <= port - clock.PORT < 2:
                return bytes([self._clock.read(port - clock.PORT)])
            if port in (PORT_KEYBOARD, SLEEP_PORT, SLEEP_PORT + 1):
                return b"\0"
        return _ONES * size

    def _out(self, port: int, data: bytes) -> Outcome | None:
        if len(data) == 1:
            value = data[0]
            if found := self._serial_at(port):
                found[0].write(found[1], value)
                return None
            if 0 <= port - clock.PORT < 2:
                self._clock.write(port - clock.PORT, value)
                return None
            if port == RESET_PORT:
                return Reboot() if value & _RESET_CPU else None
            if port == SLEEP_PORT:
                is_off = value == POWER_OFF_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE
                return PowerOff(self._verdict.value) if is_off else None
        if port in bus.PORTS:
            self._bus.write_port(port, data)
            return None
        return self._guest_ports.write(port, data)
