"""The command line: arguments, messages, exit statuses.

Exit statuses: the guest's verdict (0 when all it was told to do succeeded),
1 for a failure, 2 for a wrong command line, 128 and a signal's number where
one ended it; three ^C count as SIGINT.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import NoReturn

from lguestlib.abi.memfd import memfd
from lguestlib.runtime.attachments import LaunchError
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.interface import InterfaceAddress
from lguestlib.runtime.launcher import Launcher
from lguestlib.runtime.machine import Crash, Machine, PowerOff
from lguestlib.runtime.options import (
    DEFAULT_DEVICES,
    DEFAULT_NETWORK,
    MEBIBYTE,
    MEMORY,
    BridgedNetwork,
    DeviceOption,
    DiskImage,
    HostNetwork,
    MachineOptions,
    Randomness,
    ScratchDisk,
)
from lguestlib.runtime.trace import Tracer, chrome_trace

USAGE = 2
FAILURE = 1
ESCAPED = 128 + signal.SIGINT

_HYPERVISORS = ("auto", "kvm", "inprocess")

_OVERVIEW = """\
usage: python -m lguestlib COMMAND [OPTIONS]

Virtio devices whose every queue is a thread, and a guest to drive them.

commands:
  run      boot a guest, its console on this terminal
  ping     let the guest ping the host, and draw the last ping call by call
  probe    what this host offers, and what to do about the rest
  bench    how fast the rings, the wake-ups, the disk and the network are here

examples:
  python -m lguestlib run                              the built-in guest: try help
  python -m lguestlib run --block disk.img --exec 'read 0; write 1 hello; flush'
  python -m lguestlib ping --count 100
  python -m lguestlib COMMAND --help                   more about one command
"""

_RUN_EXAMPLES = """\
examples:
  run                                  built-in guest, scratch disk, rng, private network
  run --exec 'ping; rand 16'           feed commands; the exit status is the guest's verdict
  run --block disk.img --block old.img,readonly
  run --tunnet 192.168.19.1            a TAP interface on the host; the guest is 192.168.19.2
  run --tunnet bridge:br0:02:00:00:00:00:05 --append ip=10.0.0.5::10.0.0.1:255.0.0.0
  run --trace trace.json --exec ping   open the file in ui.perfetto.dev
  run 64 vmlinux --tunnet=192.168.19.1 --block=rootfile root=/dev/vda

Devices appear on the bus in the order given, the console last.  The built-in
guest gets what is not named too: a private network, a scratch disk, rng.  ^C three times
within a second ends the launcher; so do SIGTERM and SIGHUP.

exit status: the guest's verdict; 1 if something failed; 2 for a wrong command
line; 130 after ^C, 143 after SIGTERM, 129 after SIGHUP.
"""

_PING_EXAMPLES = """\
examples:
  ping                                 five pings, the last one drawn
  ping --count 1000 --json             every call of every ping, and percentiles
  ping --hypervisor inprocess --trace trace.json
"""


class _UsageError(Exception):
    """A wrong command line: one line with the thing, the value and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} ({self.prog} --help shows how)")


class _AppendDevice(argparse.Action):
    """Keeps devices of all kinds in one list, in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        devices = list(getattr(namespace, self.dest) or ())
        devices.append(Randomness() if self.nargs == 0 else values)
        setattr(namespace, self.dest, devices)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line *arguments* (`sys.argv` by default) and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _fill_standard_descriptors()
    try:
        return _dispatch(words)
    except _UsageError as error:
        _say(str(error))
        return USAGE
    except LaunchError as error:
        _say(str(error))
        return FAILURE
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILURE


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("--help", "-h", "help"):
        print(_OVERVIEW, end="")
        return 0 if words else USAGE
    if command == "--version":
        print(f"lguestlib {_version()}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run, "ping": _ping, "probe": _probe, "bench": _bench,
    }  # fmt: skip
    if command not in commands:
        raise _UsageError(f"{command}: no such command (one of {', '.join(commands)}; --help shows more)")
    return commands[command](words[1:])


def _version() -> str:
    try:
        return metadata.version("lguestlib")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _fill_standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2, so that no disk or TAP device gets such a number."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return


def _say(line: str) -> None:
    """A line for people, on standard error; lost if nobody reads that."""
    try:
        os.write(2, f"lguestlib: {line}\n".encode(errors="backslashreplace"))
    except OSError:
        return


def _machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hypervisor", choices=_HYPERVISORS, default="auto",
        help="kvm; inprocess: a guest in Python, works everywhere; auto: kvm if it is usable (default)",
    )  # fmt: skip
    parser.add_argument(
        "--trace", metavar="FILE", help="record the queue threads' system calls as Chrome trace JSON"
    )


def _run(words: list[str]) -> int:
    parser = _Parser(
        prog="python -m lguestlib run", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Boot a guest with its console on this terminal.", epilog=_RUN_EXAMPLES,
        usage="%(prog)s [OPTIONS] [MEM KERNEL [ARGS...]]",
    )  # fmt: skip
    _machine_options(parser)
    parser.add_argument(
        "--memory", type=_memory, metavar="MIB", help=f"guest memory in MiB (default {MEMORY // MEBIBYTE})"
    )
    parser.add_argument(
        "--block", dest="devices", action=_AppendDevice, type=_disk, metavar="FILE[,readonly]",
        help="a disk: a raw image or a block device; repeat for more",
    )  # fmt: skip
    parser.add_argument(
        "--tunnet", dest="devices", action=_AppendDevice, type=_network,
        metavar="IP[/LEN][:MAC]|bridge:BR[:MAC]",
        help="a network card on a TAP interface of the host, with its address there or in a bridge",
    )  # fmt: skip
    parser.add_argument(
        "--rng", dest="devices", action=_AppendDevice, nargs=0, help="an entropy device"
    )
    parser.add_argument("--initrd", metavar="FILE", help="an initial ramdisk for KERNEL")
    parser.add_argument("--append", action="append", default=[], metavar="WORDS", help="more words of the guest's command line")
    parser.add_argument("--exec", dest="commands", metavar="'CMD; CMD'", help="feed the guest these commands, then switch it off")
    parser.add_argument("--verbose", action="store_true", help="tell of the counters of each queue at the end")
    parser.add_argument("positional", nargs="*", metavar="MEM KERNEL ARGS", help="memory in MiB, a kernel, its command line")
    given = parser.parse_intermixed_args(words)
    memory, kernel, kernel_words = _positional(given.positional, given.memory)
    options = MachineOptions(
        hypervisor=given.hypervisor,
        memory=memory,
        devices=_devices(given.devices or (), built_in=kernel is None),
        kernel=kernel,
        initrd=given.initrd,
        arguments=(*kernel_words, *(word for words in given.append for word in words.split())),
    )
    if options.initrd and not kernel:
        raise _UsageError(f"--initrd {options.initrd}: the built-in guest has no use for it (name a KERNEL too)")
    with _trace_file(given.trace) as tracer:
        return _Run(options, given.commands, given.verbose, tracer).run()


class _Run:
    """One `run`: the terminal, the signals, and what is said at the end."""

    def __init__(
        self, options: MachineOptions, commands: str | None, verbose: bool, tracer: Tracer | None
    ) -> None:
        self._options = options
        self._commands = commands
        self._verbose = verbose
        self._tracer = tracer
        self._status: int | None = None
        self._launcher: Launcher | None = None
        self._machine: Machine | None = None

    def run(self) -> int:
        input_fd = 0 if self._commands is None else _script(self._commands, not self._options.kernel)
        terminal = Terminal(input_fd, 1, self._escaped, self._hung_up, self._tracer)
        try:
            with Launcher(self._options, terminal, _say, self._tracer) as launcher:
                self._launcher = launcher
                with self._signals():
                    terminal.enter_raw()
                    try:
                        outcome = launcher.run(self._booted)
                    finally:
                        terminal.restore()
        finally:
            if input_fd:
                os.close(input_fd)
        if self._status is not None:
            return self._status
        if isinstance(outcome, Crash):
            _say(f"the guest crashed: {outcome.reason}")
            return FAILURE
        return outcome.verdict if isinstance(outcome, PowerOff) else FAILURE

    def _booted(self, machine: Machine) -> None:
        self._machine = machine

    def _end(self, status: int) -> None:
        if self._status is None:
            self._status = status
        if self._launcher:
            self._launcher.request_stop()

    def _escaped(self) -> None:
        self._end(ESCAPED)

    def _hung_up(self, error: OSError) -> None:
        _say(f"the console's output is gone: {error.strerror}")
        self._end(FAILURE)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """End the machine on the usual signals, and follow the terminal's size."""

        def end(number: int, frame: FrameType | None) -> None:
            self._end(128 + number)

        def resize(number: int, frame: FrameType | None) -> None:
            if self._launcher:
                self._launcher.resized()

        handlers = {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGWINCH: resize}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _script(commands: str, switch_off: bool) -> int:
    """A file of command lines from ``cmd; cmd``, open for reading; the guest is switched off after them."""
    lines = [line.strip() for line in commands.replace("\n", ";").split(";")]
    lines = [line for line in lines if line]
    if switch_off and (not lines or lines[-1] not in ("off", "reboot")):
        lines.append("off")
    text = "".join(f"{line}\n" for line in lines).encode()
    fd = memfd("commands", 0)
    os.write(fd, text)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@contextmanager
def _trace_file(path: str | None) -> Iterator[Tracer | None]:
    """A tracer whose calls are written to *path* at the end, or None."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "w")
    except OSError as error:
        raise LaunchError(f"--trace {path}: {error.strerror} (name a file that can be written)") from None
    tracer = Tracer()
    with file:
        try:
            yield tracer
        finally:
            file.write(chrome_trace(tracer.calls))


def _devices(named: Sequence[DeviceOption], built_in: bool) -> tuple[DeviceOption, ...]:
    """The devices *named*, and for the built-in guest one of each kind that was not."""
    if not named:
        return DEFAULT_DEVICES
    missing: list[DeviceOption] = []
    if built_in:
        networks, disks = (HostNetwork, BridgedNetwork), DiskImage
        if not any(isinstance(device, networks) for device in named):
            missing.append(DEFAULT_NETWORK)
        if not any(isinstance(device, disks) for device in named):
            missing.append(ScratchDisk())
        if Randomness() not in named:
            missing.append(Randomness())
    return (*named, *missing)


def _positional(words: list[str], memory: int | None) -> tuple[int, str | None, list[str]]:
    """Memory in bytes, kernel and its words from ``[MEM KERNEL [ARGS...]]``."""
    if not words:
        return memory or MEMORY, None, []
    if len(words) == 1:
        raise _UsageError(f"{words[0]}: MEM comes with a KERNEL (run 64 vmlinux; or --memory for the built-in guest)")
    if memory is not None:
        raise _UsageError(f"--memory and MEM {words[0]}: give one of the two")
    try:
        return _memory(words[0]), words[1], words[2:]
    except argparse.ArgumentTypeError as error:
        raise _UsageError(f"MEM: {error}") from None


def _memory(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of MiB, such as 64")
    return int(text) * MEBIBYTE


def _disk(text: str) -> DeviceOption:
    path, comma, mode = text.rpartition(",")
    if comma and mode == "readonly":
        return DiskImage(path, read_only=True)
    return DiskImage(text)


def _network(text: str) -> DeviceOption:
    if text.startswith("bridge:"):
        name, _, mac = text.removeprefix("bridge:").partition(":")
        if not name or len(name.encode()) > 15:
            raise argparse.ArgumentTypeError(f"'{text}' names no bridge: bridge:br0, or bridge:br0:MAC")
        return BridgedNetwork(name, _mac(mac, text))
    address, _, mac = text.partition(":")
    return HostNetwork(_address(address), _mac(mac, text))


def _address(text: str) -> InterfaceAddress:
    number, slash, length = text.partition("/")
    fields = number.split(".")
    good = len(fields) == 4 and all(field.isascii() and field.isdigit() and int(field) < 256 for field in fields)
    if not good:
        raise argparse.ArgumentTypeError(f"'{number}' is not an IPv4 address, such as 192.168.19.1")
    prefix = int(length) if length.isascii() and length.isdigit() else 24
    if slash and not (length.isascii() and length.isdigit() and 1 <= prefix <= 30):
        raise argparse.ArgumentTypeError(f"'/{length}' is not a prefix length from 1 to 30, such as {number}/24")
    return InterfaceAddress(bytes(int(field) for field in fields), prefix)


def _mac(text: str, whole: str) -> bytes | None:
    if not text and not whole.endswith(":"):
        return None
    fields = text.split(":")
    try:
        mac = bytes(int(field, 16) for field in fields if 0 < len(field) <= 2)
    except ValueError:
        mac = b""
    if len(fields) != 6 or len(mac) != 6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a station address, such as 02:00:00:00:00:05")
    if mac[0] & 1:
        raise argparse.ArgumentTypeError(f"'{text}' is a multicast address: its first byte has to be even")
    return mac


def _ping(words: list[str]) -> int:
    from lguestlib.runtime.ping import percentile, run_pings
    from lguestlib.runtime.sequence import calls_by_kind, compare, draw, kind

    parser = _Parser(
        prog="python -m lguestlib ping", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Let the guest ping the host, and draw the last ping as the seed's analysis.",
        epilog=_PING_EXAMPLES,
    )  # fmt: skip
    _machine_options(parser)
    parser.add_argument("--count", type=_count, default=5, metavar="N", help="how many pings (default 5)")
    parser.add_argument("--json", action="store_true", help="every call of every ping, and percentiles")
    given = parser.parse_args(words)
    say: Callable[[str], None] = (lambda line: None) if given.json else _say
    with _trace_file(given.trace) as trace:
        report = run_pings(
            MachineOptions(hypervisor=given.hypervisor), given.count, say, trace or Tracer(), _progress(given.count)
        )
    trips = report.round_trips
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    percentiles = {name: percentile(trips, share) for name, share in shares.items()} if trips else {}
    lost = given.count - len(trips)
    if given.json:
        print(json.dumps({
            "hypervisor": report.hypervisor, "sent": given.count, "received": len(trips),
            "round_trip_us": percentiles,
            "calls": dict(calls_by_kind(report.pings)),
            "pings": [{
                "round_trip_us": ping.round_trip,
                "calls": [{
                    "thread": call.thread, "call": call.call, "role": call.role, "result": call.result,
                    "start_ns": call.start, "duration_ns": call.duration,
                } for call in ping.calls],
            } for ping in report.pings],
        }))  # fmt: skip
        return FAILURE if lost else 0
    last = report.pings[-1]
    print(draw(last, report.asleep))
    print(compare(last))
    print(f"  {given.count} sent, {len(trips)} received")
    if trips:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in percentiles.items())
        print(f"  round trip in us, as the guest timed it: {figures}")
    others = [sorted(map(kind, ping.calls)) for ping in report.pings]
    same = others.count(others[-1])
    print(f"  {same} of {given.count} pings took exactly these calls")
    return FAILURE if lost else 0


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to 1000000")
    return int(text)


def _progress(total: int) -> Callable[[int], None]:
    """A line on a terminal that says how many pings are done."""

    def show(done: int) -> None:
        if os.isatty(2):
            end = "\n" if done == total else ""
            os.write(2, f"\r{done} of {total} pings{end}".encode())

    return show


def _probe(words: list[str]) -> int:
    from lguestlib.runtime.probe import probe

    parser = _Parser(
        prog="python -m lguestlib probe", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What this host offers, and what to do about the rest.",
        epilog="examples:\n  probe\n  probe --json | python -m json.tool\n",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(words)
    findings = probe()
    if given.json:
        print(json.dumps({finding.name: finding._asdict() for finding in findings}))
        return 0
    for finding in findings:
        mark = {True: "yes", False: "no", None: ""}[finding.usable]
        print(f"{finding.name:<18}{mark:<5}{finding.detail}")
        if finding.remedy:
            print(f"{'':<23}-> {finding.remedy}")
    return 0


def _bench(words: list[str]) -> int:
    from lguestlib.runtime.bench import BENCHES, Figure, run_bench

    parser = _Parser(
        prog="python -m lguestlib bench", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="How fast this is here.  Each figure is also a ratio to a primitive measured in turns with it.",
        epilog="examples:\n  bench\n  bench ring wake\n  bench block --json\n",
    )  # fmt: skip
    parser.add_argument(
        "what", nargs="*", metavar="|".join(BENCHES), help="which benchmarks (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(words)
    for name in given.what:
        if name not in BENCHES:
            raise _UsageError(f"{name}: no such benchmark (one of {', '.join(BENCHES)})")
    figures: list[Figure] = []
    for name in given.what or BENCHES:
        for figure in run_bench(name):
            figures.append(figure)
            if not given.json:
                print(figure, flush=True)
    if given.json:
        print(json.dumps([figure._asdict() for figure in figures]))
    return 0
