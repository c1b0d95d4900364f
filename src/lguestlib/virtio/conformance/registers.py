"""Runs a case of register accesses against this library's virtio-mmio transport."""

from collections.abc import Sequence

from lguestlib.virtio.chain import Chain
from lguestlib.virtio.conformance.case import RegisterCase
from lguestlib.virtio.conformance.register_cases import DEVICE_FEATURE, QUEUE_SIZES
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.effects import Notify
from lguestlib.virtio.features import Feature
from lguestlib.virtio.mmio import MmioTransport


class _Idle(Device):
    """Queues that nobody serves."""

    device_type = 42

    def __init__(self) -> None:
        super().__init__("registers")

    @property
    def features(self) -> int:
        return DEVICE_FEATURE

    def queues(self) -> Sequence[Queue]:
        return [Queue(f"queue {index}", self.serve, size) for index, size in enumerate(QUEUE_SIZES)]

    def serve(self, chain: Chain) -> int:
        """Nothing comes."""
        return 0


def run_registers(case: RegisterCase) -> list[str]:
    """What was wrong, which is nothing as a rule."""
    transport = MmioTransport(_Idle(), own=int(Feature.NOTIFICATION_DATA))
    problems = []
    for access in case.accesses:
        if access.write is not None:
            effect = transport.write(access.offset, access.write.to_bytes(access.size, "little"))
            notified = effect.index if isinstance(effect, Notify) else -1
            if notified != access.notifies:
                problems.append(f"{access.write:#x} at {access.offset:#05x} notifies {notified}, not {access.notifies}")
        if access.expect is not None:
            found = int.from_bytes(transport.read(access.offset, access.size), "little")
            if found != access.expect:
                problems.append(f"{access.offset:#05x} reads {found:#x}, not {access.expect:#x}")
    return problems
