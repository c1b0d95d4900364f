"""`python -m lguestlib` on a host with lguest: /dev/lguest is `lguest_double`, and its guest a shell.

    python tests/lguest_launch.py ARGUMENTS...

The guest is Linux as in `lguest_guest`, with a user space that answers who pings it, and
does what is typed.
"""

import sys
from collections.abc import Callable

from lguest_double import GuestCpu, LguestDouble
from lguest_guest import (
    BLOCK,
    CONSOLE,
    NET,
    RNG,
    BigNetDriver,
    BlockDriver,
    ConsoleDriver,
    Linux,
    NetDriver,
    PlainNetDriver,
    RngDriver,
)

from lguestlib.__main__ import run
from lguestlib.runtime.launch import lguest
from lguestlib.runtime.packets import Station, answer, arp_reply, arp_request, echo_reply, echo_request

FOREVER = 3600.0


class Shell:
    """What runs as init."""

    def __init__(self, linux: Linux) -> None:
        self.linux = linux
        self.console = ConsoleDriver(linux.of_type(CONSOLE))
        self.disks = [BlockDriver(device) for device in linux.devices if device.type == BLOCK]
        self.randomness = [RngDriver(device) for device in linux.devices if device.type == RNG]
        self.cards = [NetDriver(device) for device in linux.devices if device.type == NET]
        self.commands: dict[str, Callable[..., str]] = {
            "devices": self.devices, "line": lambda: linux.command_line, "ping": self.ping,
            "read": self.read, "write": self.write, "rand": self.rand, "rebind": self.rebind,
            "off": self.off, "reboot": self.reboot, "panic": self.panic,
        }  # fmt: skip

    def run(self) -> None:
        while True:
            self.console.write(b"\n> ")
            while not self.console.has_line:
                self.linux.wait_until(self._something_came, FOREVER)
                self.reply()
            line = self.console.read_line().decode()
            name, *words = line.split(maxsplit=2)
            self.console.write(f"{line}\n{self.commands[name](*words)}".encode())

    def _something_came(self) -> bool:
        return self.console.has_line or any(net.frames for net in self.cards)

    def reply(self) -> None:
        """To whoever has sent something."""
        for number, net in enumerate(self.cards):
            while net.frames:
                reply = answer(net.frames.pop(0), Station(net.mac, bytes([192, 168, 19 + number, 2])))
                if reply:
                    net.send(reply)

    def devices(self) -> str:
        names = {NET: "net", BLOCK: "block", RNG: "rng", CONSOLE: "console"}
        return " ".join(names[device.type] for device in self.linux.devices)

    def ping(self, count: str = "1", card: str = "0") -> str:
        """The host's address on that network."""
        net = self.cards[int(card)]
        me = Station(net.mac, bytes([192, 168, 19 + int(card), 2]))
        host = bytes([192, 168, 19 + int(card), 1])
        net.send(arp_request(me, host))
        while not (gateway := arp_reply(net.receive())):
            continue
        for number in range(int(count)):
            net.send(echo_request(me, gateway, 1, number, bytes(56)))
            while not ((reply := echo_reply(net.receive(), me.address)) and reply.sequence == number):
                continue
        return f"{count} replies"

    def read(self, sector: str, disk: str = "0") -> str:
        return self.disks[int(disk)].read(int(sector), 512).rstrip(b"\0").decode()

    def write(self, sector: str, text: str) -> str:
        self.disks[0].write(int(sector), text.encode().ljust(512, b"\0"))
        self.disks[0].flush()
        return "written"

    def rand(self) -> str:
        return self.randomness[0].read().hex()

    def rebind(self, kind: str = "new") -> str:
        """All but the console's drivers; a network card's may be another *kind*."""
        for driver in [*self.disks, *self.randomness]:
            driver.remove()
            driver.probe()
        kinds = {"new": NetDriver, "big": BigNetDriver, "plain": PlainNetDriver}
        for number, net in enumerate(self.cards):
            net.remove()
            self.cards[number] = kinds[kind](net.device)
        return "bound again"

    def off(self) -> str:
        self.linux.power_off()
        return ""

    def reboot(self) -> str:
        self.linux.reboot()
        return ""

    def panic(self, *words: str) -> str:
        self.linux.panic(f"Kernel panic - not syncing: {' '.join(words)}")
        return ""


def program(cpu: GuestCpu) -> None:
    linux = Linux(cpu)
    linux.boot()
    Shell(linux).run()


if __name__ == "__main__":
    setattr(lguest, "DevLguest", lambda: LguestDouble(program))
    sys.exit(run())
