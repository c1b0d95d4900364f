"""A machine on /dev/lguest: a 32-bit Linux that knows it is a guest, on a 32-bit host.

The thread that runs the guest sleeps in a read of the device; the guest's
notifications go from the kernel straight to the queues' threads, and their
interrupts straight back.  What else the guest notifies the read returns: the status
of a device, a first kick, text of its early console.
"""

import errno
from collections.abc import Callable

from lguestlib.abi.lguest import ERESTART, WORD, initialize_request
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import Image
from lguestlib.memory.image.lguest_boot import LguestBoot
from lguestlib.memory.region import Region
from lguestlib.runtime.lguest.file import DEVICE, DevLguest, LguestFile
from lguestlib.runtime.lguest.runner import LguestDeviceRunner
from lguestlib.runtime.machine import Crash, Machine, Outcome, PowerOff, Reboot, Stopped
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device
from lguestlib.virtio.lguest import DEVICE_PAGES, PAGE, EarlyText, LguestBus, Stray, Told

POWER_DOWN = "CRASH: Power down"
"""The last words of a guest that has switched itself off."""

BY_ITSELF = "CRASH: "
"""How last words begin that are the guest's own: a panic's. Others are the hypervisor's."""

REASON_MAX = 4096

_LINE_MAX = 500


class LguestMachine(Machine[LguestDeviceRunner]):
    """A guest with *memory* bytes of RAM.

    What it says before it has a console goes to *early*, as it comes; without, to *report*
    by the line.  Raises LguestUnusable, OSError (ENOMEM).
    """

    def __init__(
        self,
        memory: int,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
        open_file: Callable[[], LguestFile] = DevLguest,
        early: Callable[[bytes], object] | None = None,
    ) -> None:
        self._file = open_file()
        try:
            region = Region.guarded(GuestAddress(0), memory + DEVICE_PAGES * PAGE)
        except BaseException:
            self._file.close()
            raise
        super().__init__(GuestMemory([region]), report, tracer)
        self.bus = LguestBus(self.memory, memory)
        """What the guest finds behind its RAM."""
        self._base = region.host_address
        self._start_at = GuestAddress(0)
        self._lines = _Lines(report)
        self._early = early or self._lines.take
        self._came_up = self._strayed = False

    def add(self, device: Device) -> LguestDeviceRunner:
        """Put *device* on the bus, behind those before it.  Raises BusFull."""
        transport = self.bus.add(device)
        runner = LguestDeviceRunner(transport, self._file, self.memory, self.report, self.tracer)
        self.runners.append(runner)
        return runner

    def check_kernel(self, kernel: Image) -> None:
        """Raise ImageError for a *kernel* that this guest cannot be."""
        LguestBoot(kernel, self.bus.size).check_kernel()

    def boot(self, kernel: Image, initrd: bytes | memoryview | None, command_line: bytes) -> None:
        """Put *kernel* and what it is told into memory, all devices being there.  Raises ImageError."""
        LguestBoot(kernel, self.bus.size, command_line, initrd).place(self.memory)
        kernel.place(self.memory)
        self._start_at = kernel.entry

    def _enter(self) -> Outcome:
        try:
            self._file.write(initialize_request(self._base, self.bus.end // PAGE, self._start_at))
        except OSError as error:
            remedies = {errno.EBUSY: "it has a guest already", errno.ENOMEM: "the host has too little memory"}
            remedy = remedies.get(error.errno or 0)
            return Crash(f"{DEVICE}: {error.strerror}" + (f" ({remedy})" if remedy else ""))
        while not self._stopping:
            self._see_to_first_kicks()
            try:
                address = int.from_bytes(self._file.pread(WORD), "little")
            except InterruptedError:
                continue
            except OSError as error:
                return self._outcome_of(error)
            self._notified(address)
        return Stopped()

    def _see_to_first_kicks(self) -> None:
        for runner in self.runners:
            if runner.first_kick and (effect := runner.transport.kicked(0)):
                runner.apply(effect)

    def _notified(self, address: int) -> None:
        self._came_up = True
        match self.bus.notify(address):
            case EarlyText(text):
                self._early(text)
            case Told(slot, effect):
                self.runners[slot].apply(effect)
            case Stray() if not self._strayed:
                self._strayed = True
                self.report(f"the guest notifies {address:#x}, where nothing is; more of that is not told")

    def _outcome_of(self, error: OSError) -> Outcome:
        """What becomes of a guest whose run ended with *error*."""
        self._lines.end()
        if error.errno == ERESTART:
            return Reboot()
        if error.errno != errno.ENOENT:
            return Crash(f"{DEVICE}: {error.strerror}")
        reason = self._file.pread(REASON_MAX).partition(b"\0")[0].decode(errors="replace")
        if reason == POWER_DOWN:
            return PowerOff()
        if not self._came_up and not reason.startswith(BY_ITSELF):
            reason += " (at once: a kernel without lguest support, CONFIG_LGUEST_GUEST, does so)"
        return Crash(reason)

    def _leave(self) -> None:
        """Nothing: the signal ends the read."""

    def _detach(self) -> None:
        self._file.close()


class _Lines:
    """Puts text together to lines, and gives each to *report*."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._begun = b""

    def take(self, text: bytes) -> None:
        *lines, self._begun = (self._begun + text).split(b"\n")
        if len(self._begun) > _LINE_MAX:
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            self._report(line.rstrip(b"\r").decode(errors="replace"))

    def end(self) -> None:
        """No more comes: what is begun is a line."""
        if self._begun:
            self.take(b"\n")
