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
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.gil import gil_enabled
from lguestlib.runtime.interface import InterfaceAddress
from lguestlib.runtime.options import (
    DEFAULT_DEVICES,
    DEFAULT_NETWORK,
    MEBIBYTE,
    MEMORY,
    LINUX_MEMORY,
    BridgedNetwork,
    DeviceOption,
    DiskImage,
    HostNetwork,
    LoopbackNetwork,
    MachineOptions,
    NamedTap,
    PtyConsole,
    Randomness,
    ScratchDisk,
    TerminalConsole,
    VhostUserDisk,
)
from lguestlib.runtime.trace import Tracer, chrome_trace

if TYPE_CHECKING:
    from lguestlib.runtime.vhost_user.serve import ServedDevice
    from lguestlib.virtio.conformance.case import Case

USAGE = 2
FAILURE = 1
SIGNALLED = 128
"""And the signal's number."""

_HYPERVISORS = ("auto", "kvm", "lguest", "inprocess", "uml")

CPUS_MAX = 255
"""What an 8-bit APIC ID tells apart."""

_LINE_MAX = 4096
"""Bytes that a pipe ready for writing takes at once (pipe(7), PIPE_BUF)."""

_TELL_SECONDS = 0.05

_OVERVIEW = """\
usage: python -m lguestlib COMMAND [OPTIONS]

Virtio devices whose every queue is a thread, and a guest to drive them.

commands:
  run      boot a guest, its console on this terminal
  serve    devices for other virtual machines (QEMU, ...), over vhost-user
  ping     let the guest ping the host, and draw the last ping call by call
  probe    what this host offers, and what to do about the rest
  conform  hold anybody's vhost-user back-end against everything that goes wrong with one
  bench    how fast the rings, the wake-ups, the disk and the network are here

examples:
  python -m lguestlib run                              the built-in guest: try help
  python -m lguestlib run --block disk.img --exec 'read 0; write 1 hello; flush'
  python -m lguestlib ping --count 100
  python -m lguestlib serve blk --socket-path disk.sock --blk-file disk.img
  python -m lguestlib conform --socket disk.sock
  python -m lguestlib COMMAND --help                   more about one command
"""

_RUN_EXAMPLES = """\
examples:
  run                                  built-in guest, scratch disk, rng, private network
  run --exec 'ping; rand 16'           type these; the exit status is the guest's verdict
  run --block disk.img --block old.img,readonly
  run --block vhost-user:disk.sock     a disk that qemu-storage-daemon, SPDK or another serves
  run --tunnet 192.168.19.1            a TAP interface on the host; the guest is 192.168.19.2
  run --tunnet bridge:br0:02:00:00:00:00:05 --append ip=10.0.0.5::10.0.0.1:255.0.0.0
  run --trace trace.json --exec ping   open the file in ui.perfetto.dev
  run 64 vmlinux --tunnet=192.168.19.1 --block=rootfile root=/dev/vda    on lguest, or kvm
  run 64 vmlinux -- -x --y=z           words with dashes for the kernel
  run --linux                          this host's own Linux on kvm: a busybox shell
  run --linux --cpus 2 --exec 'cat /proc/interrupts; ping -c 1 192.168.19.1'
  run 512 /boot/vmlinuz --initrd /boot/initrd.img --block disk.img root=/dev/vda
  run --hypervisor uml                 User-mode Linux: the same without kvm
  run --hypervisor uml --exec 'cat /proc/version; ping -c 1 192.168.19.1'
  run --hypervisor uml --root disk.img  the system that is on a disk

Devices appear on the bus in the order given, the console last.  The built-in guest
gets what is not named too: a private network, a scratch disk, rng.  A kernel gets all
three if no device is named, and so does --linux.  User-mode Linux gets a network and a disk,
and is KERNEL if that is named.  Either Linux has the host's static busybox for a user space if
no --initrd is named.

^C goes to the guest; three within a second end the launcher, and so do SIGINT, SIGTERM,
SIGHUP and SIGQUIT, and a console whose output nobody takes.  At the end of its input
the guest runs on.

exit status: the guest's verdict, 0 or 1 for the built-in one, its shell's with --linux and in
User-mode Linux (any guest there writes it to /proc/exitcode, one on kvm to /dev/ttyS1);
1 if something failed; 2 for a wrong command line; 130 after ^C, 128 and its number after a
signal.
"""

_SERVE = """\
usage: python -m lguestlib serve KIND OPTIONS [KIND OPTIONS]...

Devices for other people's virtual machines: vhost-user back-ends, each behind a Unix
socket of its own, any number of them in one process.  A front-end (QEMU, User-mode Linux,
cloud-hypervisor, ...) may come and go as often as it likes.

each device:
  --socket-path PATH   listen there; what is left there by a process that was killed is replaced
  --fd N               or serve the Unix socket inherited under this number
  --without NAME,...   do not offer these features (event_idx, indirect_desc, ring_packed, ...)
  --with NAME,...      offer these, which are not otherwise (ring_reset: QEMU has it, and keeps it to
                       itself when a guest resets a queue)
  --poll MICROSECONDS  look for work up to that long before a sleep, as long as that pays: saves
                       a busy queue its wake-ups, and costs a processor
  --print-capabilities what KIND can do, as JSON, and no more

serve blk              a disk
  --blk-file FILE      a raw image or a block device; after it has grown: kill -USR1
  --read-only          refuse writing
  --num-queues N       queues, each with a thread of its own (default 1)
  --aio sync|io_uring  a queue's requests one after the other, right for what is in the page
                       cache (default), or many at a time, for a disk that takes its time
  --direct             past the page cache (O_DIRECT)
  --processes          a process for each queue: threads of one interpreter take turns, which
                       small blocks on several busy queues feel; a process is 10 MiB or so
serve net              a network card
  --tap NAME           on the TAP interface of that name, which is there already
  --tunnet IP[/LEN][:MAC]|bridge:BR[:MAC]
                       or on a new one with that address, or in that bridge
  --loopback           or with nobody else: every frame comes back, to try a driver
  --mac MAC            the card's station address
serve console          a console on this terminal; three ^C within a second end the server
  --pty                or on a new pseudo-terminal
serve rng              random numbers

anywhere:
  --stats SECONDS      tell that often what each queue does
  --trace FILE         record the queue threads' system calls as Chrome trace JSON

examples:
  serve blk --socket-path disk.sock --blk-file disk.img --num-queues 2 --stats 1
  serve net --socket-path net.sock --tap tap0 rng --socket-path rng.sock
  qemu-system-x86_64 -object memory-backend-memfd,id=m,size=512M,share=on -m 512 \\
      -machine memory-backend=m -chardev socket,id=c,path=disk.sock,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=c ...
  linux mem=256M virtio_uml.device=disk.sock:2 ...

exit status: 0 after SIGTERM, or when the socket given by --fd is closed; 1 if something
failed; 2 for a wrong command line; 128 and the number after another signal.
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


_CONFORM_EXAMPLES = """\
examples:
  conform --list                       every case: who can run it, and what demands it
  conform --socket disk.sock           those that only read
  conform --socket disk.sock --write   all of them, on a scratch image that may be written to
  conform --socket disk.sock --only S8,T14,CVE-2022-2132
  conform --socket net.sock --device net
  conform --socket disk.sock --start 'exec my-backend --socket disk.sock --image scratch.img'
  conform --socket a.sock --against b.sock --count 10000 --seed 7

The back-end has to take one connection after another.  A disk has to have 64 KiB, and nobody
else may write to it; without --write nothing is written to it.  A case is hostile to one
connection, and may end the process: with --start it is started again.

What counts as a failure is what no device may do, whatever its driver does: die, hang, write
outside the buffers it was given, say more was written than there is room for, give wrong
data, lose a request, keep descriptors.  Beside a pass is what the back-end did.

exit status: 0 if nothing has failed (or differs); 1 if something has; 2 for a wrong command line.
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
        "run": _run, "serve": _serve, "ping": _ping, "probe": _probe, "bench": _bench,
        "conform": _conform,
    }  # fmt: skip
    if command not in commands:
        raise _UsageError(f"{command}: no such command (one of {', '.join(commands)}; --help shows more)")
    if command in ("run", "serve", "conform"):
        return commands[command](words[1:])
    with _leaving_on_interrupt():
        return commands[command](words[1:])


@contextmanager
def _leaving_on_interrupt(before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the ``with`` block ^C ends the process at once, but for *before*: nothing else has to be put back."""
    if signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield
        return

    def leave(number: int, frame: object) -> None:
        before()
        os._exit(SIGNALLED + number)

    signal.signal(signal.SIGINT, leave)
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
        help="kvm; lguest: a 32-bit Linux on a 32-bit host of its time; inprocess: a guest in Python, works"
        " everywhere; uml: User-mode Linux, a kernel as a process; auto: lguest for a KERNEL it can run where it"
        " is usable, else kvm, else inprocess (default)",
    )  # fmt: skip
    parser.add_argument(
        "--trace", metavar="FILE", help="record the queue threads' system calls as Chrome trace JSON"
    )


def _pc_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpus", type=_cpus, default=1, metavar="N", help="processors of a Linux on kvm (default 1)")
    parser.add_argument(
        "--transport", choices=("pci", "mmio"),
        help="how a guest on kvm finds its devices: by PCI, each queue with an interrupt of its own (default for"
        " Linux), or by virtio-mmio (default for the built-in guest)",
    )  # fmt: skip


def _run(words: list[str]) -> int:
    from lguestlib.runtime.machine import Crash, PowerOff
    from lguestlib.runtime.session import Session

    parser = _Parser(
        "run", "Boot a guest with its console on this terminal.", _RUN_EXAMPLES,
        "%(prog)s [OPTIONS] [MEM KERNEL [ARGS...]]",
    )  # fmt: skip
    _machine_options(parser)
    parser.add_argument(
        "--memory", type=_memory, metavar="MIB",
        help=f"guest memory in MiB (default {MEMORY // MEBIBYTE}; --linux and uml: {LINUX_MEMORY // MEBIBYTE})",
    )
    parser.add_argument(
        "--block", dest="devices", action=_AppendDevice, type=_disk,
        metavar="FILE[,readonly]|vhost-user:SOCKET",
        help="a disk: a raw image, a block device, or a vhost-user back-end's; repeat for more",
    )  # fmt: skip
    parser.add_argument(
        "--tunnet", dest="devices", action=_AppendDevice, type=_network,
        metavar="IP[/LEN][:MAC]|bridge:BR[:MAC]",
        help="a network card on a TAP interface of the host, with its address there or in a bridge",
    )  # fmt: skip
    parser.add_argument(
        "--rng", dest="devices", action=_AppendDevice, nargs=0, help="an entropy device"
    )
    parser.add_argument(
        "--linux", action="store_true",
        help="this host's own Linux on kvm, with a busybox shell or the system on --root",
    )  # fmt: skip
    _pc_options(parser)
    parser.add_argument("--initrd", metavar="FILE", help="an initial ramdisk for KERNEL, for --linux or uml")
    parser.add_argument(
        "--root", metavar="IMAGE", help="a disk before all others, and root=/dev/vda: its system is what is booted"
    )
    parser.add_argument(
        "--append", action="append", default=[], metavar="WORDS",
        help="more words of the guest's command line",
    )  # fmt: skip
    parser.add_argument(
        "--exec", dest="commands", type=os.fsencode, metavar="'CMD; CMD'",
        help="type these at the guest's prompts, then switch it off; KERNEL gets them at once, and no more;"
        " with --linux and uml a shell runs them",
    )  # fmt: skip
    parser.add_argument(
        "--verbose", action="store_true",
        help="tell at the end what each queue has done, and with lguest where each device is",
    )
    parser.add_argument(
        "positional", nargs="*", metavar="MEM KERNEL ARGS", help="memory in MiB, a kernel, its command line"
    )
    given = parser.parse_intermixed_args(words)
    memory, kernel, kernel_words = _positional(given.positional, given.memory)
    is_uml = given.hypervisor == "uml"
    is_ours = is_uml or given.linux
    if given.linux and kernel is not None:
        raise _UsageError(f"--linux and KERNEL {kernel}: give one of the two")
    if given.linux and is_uml:
        raise _UsageError("--linux and --hypervisor uml: give one of the two, either is a Linux")
    devices = _devices(given.devices or (), built_in=kernel is None, has_rng=not is_uml)
    if given.root is not None:
        devices = (DiskImage(given.root, asked=("--root ", "")), *devices)
        kernel_words = ["root=/dev/vda", "rw", *kernel_words]
    for option, value in (("--initrd", given.initrd), ("--root", given.root)):
        if value is not None and kernel is None and not is_ours:
            raise _UsageError(f"{option} {value}: the built-in guest has no use for it (name MEM and KERNEL too)")
    # Of the shell in an initramfs of ours.
    has_script = is_ours and given.commands is not None and given.initrd is None and given.root is None
    options = MachineOptions(
        hypervisor=given.hypervisor,
        memory=memory or (LINUX_MEMORY if is_ours else MEMORY),
        devices=devices,
        kernel=kernel,
        initrd=given.initrd,
        script=given.commands if has_script else None,
        arguments=(*kernel_words, *(word for words in given.append for word in words.split())),
        verbose=given.verbose,
        linux=given.linux,
        cpus=given.cpus,
        transport=given.transport,
    )
    commands = None if given.commands is None else [] if has_script else _commands(given.commands)
    with _tracing(given.trace) as tracer:
        ended = Session(options, commands, _say, tracer).run()
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


_KINDS = ("blk", "net", "console", "rng")


def _serve(words: list[str]) -> int:
    from lguestlib.runtime.vhost_user.serve import QueueRate, Serving

    if not words or words[0] == "help" or {"--help", "-h"} & set(words):
        _show(_SERVE.rstrip())
        return 0 if words else USAGE
    if words[0] not in _KINDS:
        raise _UsageError(f"serve {words[0]}: no such device (one of {', '.join(_KINDS)}; serve --help shows how)")
    groups = [_served(group) for group in _by_kind(words)]
    if any(given.print_capabilities for given in groups):
        kind, features = _capabilities(words[0])
        _show(json.dumps({"type": kind, "features": features}))
        return 0
    if sum(given.kind == "console" and not given.pty for given in groups) > 1:
        raise _UsageError("serve console: there is one terminal (the others need --pty)")
    trace = next((given.trace for given in groups if given.trace), None)
    if trace and any(given.processes for given in groups):
        raise _UsageError(f"--trace {trace}: it does not reach other processes (leave --processes away)")
    stats = next((given.stats for given in groups if given.stats), 0.0)
    in_place = os.isatty(1)
    shown = False

    def show(rates: Sequence[QueueRate]) -> None:
        nonlocal shown
        # On a terminal they stay where they are.
        up = f"\033[{len(rates)}A" if in_place and shown else ""
        end = "\033[K" if in_place else ""
        shown = True
        _show(up + "\n".join(f"{rate}{end}" for rate in rates))

    with _tracing(trace) as tracer:
        number = Serving([_served_device(given) for given in groups], _say, stats, show, tracer).run()
    return 0 if number in (0, signal.SIGTERM) else SIGNALLED + number


def _by_kind(words: list[str]) -> Iterator[list[str]]:
    """The words of each device: its kind, and what follows up to the next one's."""
    group: list[str] = []
    value_follows = False
    for word in words:
        if word in _KINDS and group and not value_follows:
            yield group
            group = []
        group.append(word)
        value_follows = word.startswith("--") and "=" not in word and word not in _SERVE_SWITCHES
    yield group


_SERVE_SWITCHES = (
    "--read-only", "--direct", "--processes", "--loopback", "--pty", "--print-capabilities", "--help",
)  # fmt: skip


def _served(words: list[str]) -> argparse.Namespace:
    kind = words[0]
    parser = _Parser(f"serve {kind}", "", "", _SERVE.partition("usage: ")[2].rstrip())
    parser.add_argument("--socket-path", metavar="PATH", default="")
    parser.add_argument("--fd", type=_descriptor, metavar="N", default=-1)
    parser.add_argument("--without", type=_names, default=())
    parser.add_argument("--with", type=_names, default=(), dest="offered")
    parser.add_argument("--poll", type=_microseconds, metavar="MICROSECONDS", default=0)
    parser.add_argument("--print-capabilities", action="store_true")
    parser.add_argument("--stats", type=_seconds, metavar="SECONDS", default=0.0)
    parser.add_argument("--trace", metavar="FILE")
    parser.set_defaults(kind=kind, blk_file="", processes=False, pty=False, tap=None, tunnet=None)
    if kind == "blk":
        parser.add_argument("--blk-file", metavar="FILE", default="")
        parser.add_argument("--read-only", action="store_true")
        parser.add_argument("--num-queues", type=_queue_count, metavar="N", default=1)
        parser.add_argument("--aio", choices=("sync", "io_uring"), default="sync")
        parser.add_argument("--direct", action="store_true")
        parser.add_argument("--processes", action="store_true")
    elif kind == "net":
        network = parser.add_mutually_exclusive_group()
        network.add_argument("--tap", metavar="NAME")
        network.add_argument("--tunnet", type=_network, metavar="IP|bridge:BR")
        network.add_argument("--loopback", action="store_true")
        parser.add_argument("--mac", type=lambda text: _mac(text, text), metavar="MAC")
    elif kind == "console":
        parser.add_argument("--pty", action="store_true")
    given = parser.parse_args(words[1:])
    if given.print_capabilities:
        return given
    if bool(given.socket_path) == (given.fd >= 0):
        raise _UsageError(f"serve {kind}: give one of --socket-path PATH and --fd N")
    if kind == "blk" and not given.blk_file:
        raise _UsageError("serve blk: --blk-file FILE is missing")
    if kind == "blk" and given.poll and given.aio != "sync":
        raise _UsageError(f"serve blk: --poll {given.poll} is for --aio sync: a thread of io_uring's has requests out")
    if kind == "blk" and given.poll and given.num_queues > 1 and gil_enabled() and not given.processes:
        raise _UsageError(
            f"serve blk: --poll {given.poll} with {given.num_queues} queues: their threads would take the"
            " interpreter from each other (--processes gives each one of its own)"
        )
    if kind == "net" and given.tap is None and given.tunnet is None and not given.loopback:
        raise _UsageError("serve net: give one of --tap NAME, --tunnet IP and --loopback")
    return given


def _capabilities(kind: str) -> tuple[str, list[str]]:
    """The back-end's type and features, as QEMU's docs/interop/vhost-user.json has them."""
    return ("block", ["read-only", "blk-file"]) if kind == "blk" else (kind, [])


def _served_device(given: argparse.Namespace) -> "ServedDevice":
    from lguestlib.runtime.vhost_user.serve import ServedDevice

    device: DeviceOption | TerminalConsole
    match given.kind:
        case "blk":
            device = DiskImage(
                given.blk_file, given.read_only, given.num_queues, ("--blk-file ", " --read-only"), given.aio,
                given.direct,
            )  # fmt: skip
        case "net" if given.tap is not None:
            device = NamedTap(given.tap, given.mac)
        case "net" if given.loopback:
            device = LoopbackNetwork(given.mac)
        case "net":
            device = replace(given.tunnet, mac=given.mac or given.tunnet.mac)
        case "console":
            device = PtyConsole() if given.pty else TerminalConsole()
        case _:
            device = Randomness()
    return ServedDevice(
        device, given.socket_path, given.fd, given.without, given.offered, 1000 * given.poll, given.processes
    )


def _descriptor(text: str) -> int:
    fd = _number(text, 0, 1 << 20)
    if fd is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a descriptor's number, such as 3")
    return fd


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def _cpus(text: str) -> int:
    count = _number(text, 1, CPUS_MAX)
    if count is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of processors from 1 to {CPUS_MAX}")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from 0.01 on, such as 1")
    return seconds


def _microseconds(text: str) -> int:
    number = _number(text, 0, 1_000_000)
    if number is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of microseconds up to 1000000, such as 50")
    return number


def _queue_count(text: str) -> int:
    count = _number(text, 1, 64)
    if count is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of queues from 1 to 64")
    return count


def _commands(text: bytes) -> list[bytes]:
    """The commands of ``cmd; cmd``."""
    return [word.strip() for word in text.replace(b"\n", b";").split(b";") if word.strip()]


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


def _devices(named: Sequence[DeviceOption], built_in: bool, has_rng: bool = True) -> tuple[DeviceOption, ...]:
    """The devices *named*, and for a guest of ours one of each kind that was not, and that it *has* a driver for."""
    if not named:
        return DEFAULT_DEVICES if has_rng else DEFAULT_DEVICES[:-1]
    missing: list[DeviceOption] = []
    if built_in:
        networks, disks = (HostNetwork, BridgedNetwork), (DiskImage, VhostUserDisk)
        if not any(isinstance(device, networks) for device in named):
            missing.append(DEFAULT_NETWORK)
        if not any(isinstance(device, disks) for device in named):
            missing.append(ScratchDisk())
        if has_rng and Randomness() not in named:
            missing.append(Randomness())
    return (*named, *missing)


def _positional(words: list[str], memory: int | None) -> tuple[int | None, str | None, list[str]]:
    """Memory in bytes, kernel and its words from ``[MEM KERNEL [ARGS...]]``."""
    if not words:
        return memory, None, []
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
    if text.startswith("vhost-user:"):
        return _external_disk(text.removeprefix("vhost-user:"))
    path = text.removesuffix(",readonly")
    if not path:
        raise argparse.ArgumentTypeError(f"'{text}' names no file")
    return DiskImage(path, read_only=path != text)


def _external_disk(path: str) -> DeviceOption:
    if not path:
        raise argparse.ArgumentTypeError("'vhost-user:' names no socket: vhost-user:/run/disk.sock")
    if path.endswith(",readonly"):
        raise argparse.ArgumentTypeError(f"'vhost-user:{path}': whether it is read-only is its back-end's to say")
    return VhostUserDisk(path)


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
    parser.add_argument("--linux", action="store_true", help="from this host's own Linux as the guest, on kvm")
    _pc_options(parser)
    parser.add_argument("--count", type=_count, default=5, metavar="N", help="how many pings (default 5)")
    parser.add_argument("--json", action="store_true", help="every call of every ping, and percentiles")
    given = parser.parse_args(words)
    say: Callable[[str], None] = (lambda line: None) if given.json else _say
    with _tracing(given.trace) as tracer:
        report = run_pings(
            MachineOptions(
                given.hypervisor, LINUX_MEMORY if given.linux else MEMORY,
                _devices((), True, given.hypervisor != "uml"), linux=given.linux, cpus=given.cpus,
                transport=given.transport,
            ), given.count,
            say, tracer or Tracer(),
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


def _conform(words: list[str]) -> int:
    parser = _Parser(
        "conform",
        "Hold a vhost-user back-end against a catalogue of what goes wrong with rings and transports.",
        _CONFORM_EXAMPLES,
    )
    parser.add_argument("--socket", metavar="PATH", help="where the back-end listens")
    parser.add_argument(
        "--device", choices=("blk", "net", "console", "rng"), default="blk", help="what it is (default blk)"
    )
    parser.add_argument("--only", type=_case_names, default=(), metavar="IDS", help="rows, CVEs or names, with commas")
    parser.add_argument("--write", action="store_true", help="those too that write: the disk is a scratch image")
    parser.add_argument("--start", metavar="COMMAND", help="start the back-end by this, and again when it has died")
    parser.add_argument(
        "--timeout", type=_seconds, default=2.0, metavar="SECONDS", help="how long an answer may take (default 2)"
    )
    parser.add_argument("--list", action="store_true", help="show the cases and run none")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--junit", metavar="FILE", help="for test servers")
    parser.add_argument(
        "--against", metavar="PATH", help="no cases: random requests to both back-ends, and where they differ"
    )
    parser.add_argument("--seed", type=_seed, default=None, metavar="N", help="what replays them")
    parser.add_argument("--count", type=_count, default=1000, metavar="N", help="how many requests (default 1000)")
    given = parser.parse_args(words)
    if given.list:
        return _list_cases(given)
    if not given.socket:
        raise _UsageError("conform: --socket PATH is missing (--list shows the cases without)")
    if given.against:
        with _leaving_on_interrupt():
            return _compare(given)
    if given.seed is not None:
        raise _UsageError(f"conform: --seed {given.seed} goes with --against PATH")
    return _examine(given)


def _list_cases(given: argparse.Namespace) -> int:
    from lguestlib.runtime.vhost_user.conform_report import listed

    cases = _cases(given.only)
    if given.json:
        _show(json.dumps([
            {"name": case.name, "ids": list(case.ids), "clause": case.clause, "runners": list(case.runners)}
            for case in cases
        ]))  # fmt: skip
    else:
        _show("\n".join(map(listed, cases)))
    return 0


def _examine(given: argparse.Namespace) -> int:
    from lguestlib.runtime.vhost_user.conform import Examination, Result, Unsuitable
    from lguestlib.runtime.vhost_user.conform_report import junit, line, report, table
    from lguestlib.runtime.vhost_user.started import StartedBackEnd

    cases = _cases(given.only)
    results: list[Result] = []
    with StartedBackEnd(given.start or "", given.socket) as started, _leaving_on_interrupt(started.close):
        if given.start:
            started.start()
        try:
            examination = Examination(
                given.socket, given.device, given.write, given.timeout, started.start if given.start else None
            )
        except Unsuitable as error:
            raise LaunchError(f"{given.socket}: {error}") from None
        for result in examination.run(cases):
            results.append(result)
            if given.json:
                _progress(f"{len(results)} of {len(cases)} cases")
            else:
                _show(line(result))
    _progress("")
    if given.junit:
        try:
            with open(given.junit, "w") as file:
                file.write(junit(results))
        except OSError as error:
            raise LaunchError(f"--junit {given.junit}: {error.strerror} (name a file that can be written)") from None
    if given.json:
        _show(json.dumps({"socket": given.socket, "device": given.device, "cases": report(results)}))
    else:
        _show("\n" + table(results))
    return 0 if all(result.verdict.is_good for result in results) else FAILURE


def _compare(given: argparse.Namespace) -> int:
    from random import SystemRandom

    from lguestlib.runtime.vhost_user.compare import compare
    from lguestlib.runtime.vhost_user.conform_session import Skip
    from lguestlib.virtio.errors import VirtioError

    if given.only or given.junit or given.json or given.start:
        raise _UsageError("conform --against: it has no cases, only --device, --write, --seed, --count, --timeout")
    seed = SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    writes = " --write" if given.write else ""
    replay = f"--device {given.device}{writes} --seed {seed} --count {given.count}"
    differences = done = 0
    try:
        for difference in compare(
            given.socket, given.against, given.device, seed, given.count, given.write, given.timeout
        ):
            done += 1
            if difference:
                differences += 1
                _show(str(difference))
            elif not done % 64:
                _progress(f"{done} of {given.count} requests")
    except (VirtioError, Skip) as error:
        _progress("")
        raise LaunchError(f"{error} (again: {replay})") from None
    _progress("")
    _show(f"{done} requests, {differences} answered differently (again: {replay})")
    return FAILURE if differences else 0


def _cases(only: Sequence[str]) -> "list[Case]":
    from lguestlib.virtio.conformance.catalogue import select

    for each in only:
        if not list(select([each])):
            raise _UsageError(f"--only {each}: no such case (--list shows them)")
    return list(select(only))


def _case_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seed(text: str) -> int:
    seed = _number(text, 0, (1 << 64) - 1)
    if seed is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 18446744073709551615")
    return seed
