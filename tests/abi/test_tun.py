"""TAP interfaces, their settings and bridges, against the kernel, in a network namespace of their own."""

import json
import sys
from functools import cache

import interpreters
import pytest

from abi import tap_program
from lguestlib.abi.tun import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_PERSIST, IFF_TAP, IFF_TUN, IFF_VNET_HDR


@cache
def _outcome(interpreter: str) -> dict[str, object]:
    command = [interpreter] if interpreter else interpreters.i386_or_skip()
    told: dict[str, object] = json.loads(interpreters.run(command, tap_program.__file__))
    return told


@pytest.fixture(params=[pytest.param(sys.executable, id="native"), pytest.param("", id="i386")])
def made(request: pytest.FixtureRequest) -> dict[str, object]:
    told = _outcome(request.param)
    if "refused" in told:
        pytest.skip(f"{told['refused']} (run as root, with the tun module loaded)")
    return told


def test_the_kernel_names_the_interface_and_takes_the_flags(made: dict[str, object]) -> None:
    assert made["name"] == made["given"] == "lg0"
    assert isinstance(made["flags"], int)
    assert made["flags"] & ~IFF_PERSIST == IFF_TAP | IFF_NO_PI | IFF_VNET_HDR


def test_the_length_of_the_packet_header_and_the_features_come_back(made: dict[str, object]) -> None:
    assert made["header"] == tap_program.HEADER
    assert isinstance(made["features"], int)
    needed = IFF_TUN | IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
    assert made["features"] & needed == needed


def test_addresses_mtu_and_flags_of_the_interface_are_set(made: dict[str, object]) -> None:
    assert made["mac"] == tap_program.MAC.hex()
    assert (made["mtu"], made["up"], made["index"]) == (1400, True, True)
    assert (made["address"], made["mask"]) == (tap_program.ADDRESS, tap_program.MASK)


def test_a_request_refused_names_itself_and_the_interface(made: dict[str, object]) -> None:
    assert made["refusal"] == "[Errno 22] TUNSETIFF: Invalid argument: 'lg0'"


def test_a_bridge_takes_the_interface_once_and_is_gone_in_the_end(made: dict[str, object]) -> None:
    if made["bridge"] != "lgbridge":
        pytest.skip(f"{made['bridge']} (the bridge module has it)")
    assert made["twice"] == "[Errno 16] SIOCBRADDIF: Device or resource busy: 'lgbridge'"
    assert isinstance(made["left"], list)
    assert "lg0" in made["left"]
    assert "lgbridge" not in made["left"]
