"""Which tests a module answers to: what of the catalogue plays on it, and then its unit tests."""

from typing import NamedTuple

from lguestlib.virtio.conformance.case import WatchedCase
from lguestlib.virtio.conformance.catalogue import CASES

_RINGS = "tests/virtio/test_conformance.py::test_a_ring_case_comes_out_as_it_says"
_PACKED = "tests/virtio/test_conformance.py::test_a_packed_rings_case_comes_out_as_it_says"
_REGISTERS = "tests/virtio/test_conformance.py::test_a_register_case_comes_out_as_it_says"
_THREADS = "tests/runtime/test_conformance_threads.py::test_a_ring_case_against_a_live_thread_ends_in_the_five_assertions"
_SUPPRESSION = "tests/virtio/test_suppression.py"
_SOCKET = "tests/cli/test_conform.py::test_every_case_that_goes_over_a_socket_passes_against_our_own_disk"


class Suite(NamedTuple):
    """The tests that play the *catalogue*'s cases, and *unit* tests, in the order in which they run."""

    catalogue: tuple[str, ...]
    unit: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.catalogue + self.unit))


def _suite(players: tuple[str, ...], *modules: str) -> Suite:
    """Of these test modules under tests/virtio, those tests that the catalogue names are its own."""
    files = tuple(f"tests/virtio/test_{module}.py" for module in modules)
    watched = tuple(
        test for case in CASES if isinstance(case, WatchedCase) for test in case.tests
        if test.partition("::")[0] in (*files, _SUPPRESSION) and (players or _SUPPRESSION not in test)
    )  # fmt: skip
    return Suite(players + watched, files)


SUITES = {
    "split_device": _suite((_RINGS, _THREADS), "order", "split_device", "queue_log", "inflight", "decoding"),
    "packed_device": _suite((_PACKED,), "order", "packed_device", "queue_log", "inflight_packed", "packed_decoding"),
    "chain": _suite((_RINGS, _PACKED, _THREADS), "chain", "split_device", "order", "decoding"),
    "packed_chain": _suite((_PACKED,), "packed_device", "packed_decoding"),
    "packed_ring": _suite((_PACKED,), "order", "packed_device", "packed_driver"),
    "layout": _suite((_RINGS, _PACKED, _REGISTERS), "layout", "split_device", "packed_device"),
    "registers": _suite((_REGISTERS,), "mmio", "pci_transport"),
    "mmio": _suite((_REGISTERS,), "mmio"),
    "status": _suite((_REGISTERS,), "status", "mmio"),
    "pci/bus": _suite((), "pci_bus"),
    "pci/config": _suite((), "pci_config", "pci_function"),
    "pci/function": _suite((), "pci_function"),
    "pci/msix": _suite((), "pci_msix", "pci_function"),
    "pci/transport": _suite((), "pci_transport", "pci_function"),
    "lguest": _suite((), "lguest", "lguest_page"),
    "inflight": _suite((), "inflight"),
    "inflight_packed": _suite((), "inflight_packed"),
    "queue_log": _suite((), "queue_log"),
    "queue_state": _suite((_PACKED,), "device_queue", "packed_device"),
    "device_queue": _suite((_RINGS, _PACKED), "device_queue"),
    "vhost_user/backend": _suite((_SOCKET,), "vhost_user_backend"),
    "vhost_user/memory_table": _suite((_SOCKET,), "vhost_user_memory_table", "vhost_user_backend"),
    "vhost_user/message": _suite((_SOCKET,), "vhost_user_message"),
}  # fmt: skip
"""By module, as a path under src/lguestlib/virtio."""
