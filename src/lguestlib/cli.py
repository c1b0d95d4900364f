"""The command line: arguments, messages, exit statuses.

Exit statuses: the guest's verdict (0 when all it was told to do succeeded),
1 for a failure, 2 for a wrong command line, 128 and a signal's number where
one ended it; three ^C count as SIGINT.
"""

import argparse
import errno
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.interface import InterfaceAddress
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
SIGNALLED = 128
"""And the signal's number."""

_HYPERVISORS = ("auto", "kvm", "inprocess")

_LINE_MAX = 4096
"""Bytes that a pipe ready for writing takes at once (pipe(7), PIPE_BUF)."""

_TELL_SECONDS = 0.05

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
  run --exec 'ping; rand 16'           type these; the exit status is the guest's verdict
  run --block disk.img --block old.img,readonly
  run --tunnet 192.168.19.1            a TAP interface on the host; the guest is 192.168.19.2
  run --tunnet bridge:br0:02:00:00:00:00:05 --append ip=10.0.0.5::10.0.0.1:255.0.0.0
  run --trace trace.json --exec ping   open the file in ui.perfetto.dev
  run 64 vmlinux --tunnet=192.168.19.1 --block=rootfile root=/dev/vda
  run 64 vmlinux -- -x --y=z           words with dashes for the kernel

Devices appear on the bus in the order given, the console last.  The built-in guest
gets what is not named too: a private network, a scratch disk, rng.  A kernel gets all
three if no device is named.

^C goes to the guest; three within a second end the launcher, and so do SIGINT, SIGTERM,
SIGHUP and SIGQUIT, and a console whose output nobody takes.  At the end of its input
the guest runs on.

exit status: the guest's verdict, 0 or 1 for the built-in one; 1 if something failed;
2 for a wrong command line; 130 after ^C, 128 and its number after a signal.
"""

_PING_EXAMPLES = """\
examples:
  ping                                 five pings, the last one drawn
  ping --count 1000 --json             every call of every ping, and percentiles
  ping --hypervisor inprocess --trace trace.json

exit status: 0 if every ping was answered, 1 if not, 2 for a wrong command line, 130 after ^C.
"""

_PROBE_EXAMPLES = """\
examples:
  probe
  probe --json | python -m json.tool
"""

_BENCH_EXAMPLES = """\
examples:
  bench
  bench ring wake
  bench block --json
"""


class _UsageError(Exception):
    """A wrong command line: one line with the thing, the value and the remedy."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, command: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            f"python -m lguestlib {command}", usage, description, epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} ({self.prog} --help shows how)")

    def print_help(self, file: object = None) -> None:
        _show(self.format_help().rstrip())


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
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT
    except BrokenPipeError:
        return FAILURE
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        remedy = " (ulimit -n raises the limit)" if error.errno == errno.EMFILE else ""
        _say(f"{about}{error.strerror or error}{remedy}")
        return FAILURE


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("--help", "-h", "help"):
        _show(_OVERVIEW.rstrip())
        return 0 if words else USAGE
    if command == "--version":
        _show(f"lguestlib {_version()}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run, "ping": _ping, "probe": _probe, "bench": _bench,
    }  # fmt: skip
    if command not in commands:
        raise _UsageError(f"{command}: no such command (one of {', '.join(commands)}; --help shows more)")
    if command == "run":
        return _run(words[1:])
    with _leaving_on_interrupt():
        return commands[command](words[1:])


@contextmanager
def _leaving_on_interrupt() -> Iterator[None]:
    """Inside the ``with`` block ^C ends the process at once: there is nothing that has to be put back."""
    if signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(SIGNALLED + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _version() -> str:
    from importlib import metadata

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


def _show(text: str) -> None:
    """What was asked for, on standard output.  Raises BrokenPipeError, LaunchError."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _abandon_output()
        raise
    except OSError as error:
        _abandon_output()
        raise LaunchError(f"standard output: {error.strerror}") from None


def _abandon_output() -> None:
    """Nobody takes our output: some interpreters (3.11.2) would try the rest of it again at their end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _say(line: str) -> None:
    """A line for people, on standard error: cut or lost rather than waited for, and nothing but text."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    _tell(f"lguestlib: {shown}".encode()[: _LINE_MAX - 1] + b"\n")


def _progress(line: str) -> None:
    """A line on a terminal, in place of the one before; an empty one leaves none."""
    if os.isatty(2):
        _tell(f"\r{line}\033[K".encode())


def _tell(text: bytes) -> None:
    try:
        if select.select((), (2,), (), _TELL_SECONDS)[1]:
            os.write(2, text)
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
    from lguestlib.runtime.machine import Crash, PowerOff
    from lguestlib.runtime.session import Session

    parser = _Parser(
        "run", "Boot a guest with its console on this terminal.", _RUN_EXAMPLES,
        "%(prog)s [OPTIONS] [MEM KERNEL [ARGS...]]",
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
    parser.add_argument(
        "--append", action="append", default=[], metavar="WORDS",
        help="more words of the guest's command line",
    )  # fmt: skip
    parser.add_argument(
        "--exec", dest="commands", type=_commands, metavar="'CMD; CMD'",
        help="type these at the guest's prompts, then switch it off; KERNEL gets them at once, and no more",
    )  # fmt: skip
    parser.add_argument(
        "--verbose", action="store_true", help="tell at the end what each queue has done"
    )
    parser.add_argument(
        "positional", nargs="*", metavar="MEM KERNEL ARGS", help="memory in MiB, a kernel, its command line"
    )
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
    if options.initrd is not None and kernel is None:
        raise _UsageError(
            f"--initrd {options.initrd}: the built-in guest has no use for it (name MEM and KERNEL too)"
        )
    with _tracing(given.trace) as tracer:
        ended = Session(options, given.commands, _say, tracer).run()
    if given.verbose:
        for queue, done in ended.counters:
            _say(
                f"{queue}: {done.chains} chains, {done.bytes} bytes, {done.kicks} kicks in {done.wakeups}"
                f" wake-ups, {done.interrupts} interrupts, {done.suppressed} suppressed, {done.errors} errors"
            )
    if ended.signal:
        return SIGNALLED + ended.signal
    if ended.hangup:
        _say(f"the console's output: {ended.hangup}")
        return FAILURE
    if isinstance(ended.outcome, Crash):
        _say(f"the guest crashed: {ended.outcome.reason}")
    return ended.outcome.verdict if isinstance(ended.outcome, PowerOff) else FAILURE


def _commands(text: str) -> list[bytes]:
    """The commands of ``cmd; cmd``."""
    return [os.fsencode(word.strip()) for word in text.replace("\n", ";").split(";") if word.strip()]


@contextmanager
def _tracing(path: str | None) -> Iterator[Tracer | None]:
    """A tracer whose calls are written to *path* at the end, or None.  Raises LaunchError."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "w")
    except OSError as error:
        raise LaunchError(f"--trace {path}: {error.strerror} (name a file that can be written)") from None
    tracer = Tracer()
    try:
        yield tracer
    except BaseException:
        file.close()
        raise
    try:
        with file:
            file.write(chrome_trace(tracer.calls))
    except OSError as error:
        raise LaunchError(f"--trace {path}: {error.strerror}") from None


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
        raise _UsageError(
            f"{words[0]}: MEM comes with a KERNEL (run 64 vmlinux; or --memory for the built-in guest)"
        )
    if memory is not None:
        raise _UsageError(f"--memory and MEM {words[0]}: give one of the two")
    try:
        return _memory(words[0]), words[1], words[2:]
    except argparse.ArgumentTypeError as error:
        raise _UsageError(f"MEM: {error}") from None


def _number(text: str, low: int, high: int) -> int | None:
    """The decimal number *text*, if it is one from *low* to *high*."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(high)):
        return None
    return int(text) if low <= int(text) <= high else None


def _memory(text: str) -> int:
    mebibytes = _number(text, 1, 1 << 40)
    if mebibytes is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number of MiB, such as 64")
    return mebibytes * MEBIBYTE


def _disk(text: str) -> DeviceOption:
    path = text.removesuffix(",readonly")
    if not path:
        raise argparse.ArgumentTypeError(f"'{text}' names no file")
    return DiskImage(path, read_only=path != text)


def _network(text: str) -> DeviceOption:
    kind, _, rest = text.partition(":")
    if kind == "bridge":
        name, _, mac = rest.partition(":")
        if not name or len(os.fsencode(name)) > 15:
            raise argparse.ArgumentTypeError(f"'{text}' names no bridge: bridge:br0, or bridge:br0:MAC")
        return BridgedNetwork(name, _mac(mac, text))
    return HostNetwork(_address(kind), _mac(rest, text))


def _address(text: str) -> InterfaceAddress:
    number, slash, length = text.partition("/")
    fields = [_number(field, 0, 255) for field in number.split(".")]
    octets = bytes(field for field in fields if field is not None)
    if len(fields) != 4 or len(octets) != 4:
        raise argparse.ArgumentTypeError(f"'{number}' is not an IPv4 address, such as 192.168.19.1")
    prefix = _number(length, 1, 30) if slash else 24
    if prefix is None:
        raise argparse.ArgumentTypeError(
            f"'/{length}' is not a prefix length from 1 to 30, such as {number}/24"
        )
    hosts = (1 << 32 - prefix) - 1
    host = int.from_bytes(octets, "big") & hosts
    if octets[0] in (0, 127) or octets[0] >= 224 or host in (0, hosts):
        raise argparse.ArgumentTypeError(f"'{number}/{prefix}' is no host's address, such as 192.168.19.1/24")
    return InterfaceAddress(octets, prefix)


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
    if mac[0] & 1 or not any(mac):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no single station's address, such as 02:00:00:00:00:05 (the first byte is even)"
        )
    return mac


def _ping(words: list[str]) -> int:
    from lguestlib.runtime.ping import percentile, run_pings
    from lguestlib.runtime.sequence import calls_by_kind, compare, draw, kind

    parser = _Parser(
        "ping", "Let the guest ping the host, and draw the last ping as the seed's analysis.", _PING_EXAMPLES
    )
    _machine_options(parser)
    parser.add_argument("--count", type=_count, default=5, metavar="N", help="how many pings (default 5)")
    parser.add_argument("--json", action="store_true", help="every call of every ping, and percentiles")
    given = parser.parse_args(words)
    say: Callable[[str], None] = (lambda line: None) if given.json else _say
    with _tracing(given.trace) as tracer:
        report = run_pings(
            MachineOptions(hypervisor=given.hypervisor), given.count, say, tracer or Tracer(),
            lambda done: _progress(f"{done} of {given.count} pings"),
        )  # fmt: skip
    _progress("")
    trips = report.round_trips
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    percentiles = {name: percentile(trips, share) for name, share in shares.items()} if trips else {}
    lost = given.count - len(trips)
    if given.json:
        _show(json.dumps({
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
    others = [sorted(map(kind, ping.calls)) for ping in report.pings]
    lines = [draw(last, report.asleep), compare(last), f"  {given.count} sent, {len(trips)} received"]
    if trips:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in percentiles.items())
        lines.append(f"  round trip in us, as the guest timed it: {figures}")
    lines.append(f"  {others.count(others[-1])} of {given.count} pings took exactly these calls")
    _show("\n".join(lines))
    return FAILURE if lost else 0


def _count(text: str) -> int:
    count = _number(text, 1, 1_000_000)
    if count is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to 1000000")
    return count


def _probe(words: list[str]) -> int:
    from lguestlib.runtime.probe import probe

    parser = _Parser("probe", "What this host offers, and what to do about the rest.", _PROBE_EXAMPLES)
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(words)
    findings = probe()
    if given.json:
        _show(json.dumps({finding.name: finding._asdict() for finding in findings}))
        return 0
    width = max(len(finding.name) for finding in findings) + 2
    for finding in findings:
        mark = {True: "yes", False: "no", None: ""}[finding.usable]
        _show(f"{finding.name:<{width}}{mark:<5}{finding.detail}")
        if finding.remedy:
            _show(f"{'':<{width + 5}}-> {finding.remedy}")
    return 0


def _bench(words: list[str]) -> int:
    from lguestlib.runtime.bench import BENCHES, Figure, run_bench

    parser = _Parser(
        "bench",
        "How fast this is here.  Each figure is also a ratio to a primitive measured in turns with it.",
        _BENCH_EXAMPLES,
    )
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
        _progress(f"{name} ...")
        for figure in run_bench(name):
            figures.append(figure)
            _progress("" if not given.json else f"{figure.name} ...")
            if not given.json:
                _show(str(figure))
    _progress("")
    if given.json:
        _show(json.dumps([figure._asdict() for figure in figures]))
    return 0
