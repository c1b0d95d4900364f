"""A kernel's modules: which files to load, and in which order, for drivers that are not built in.

Reads what depmod(8) and the kernel's build leave beside the modules:
``modules.dep`` and ``modules.builtin``.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lguestlib.runtime.errors import LaunchError


def resolve(modules: Path, names: Iterable[str]) -> list[Path]:
    """The files to load, in this order, for the modules *names* of the kernel whose folder is *modules*.

    In a name a dash is an underscore.  Those built into the kernel are left out.
    Raises LaunchError for a name the kernel does not have.
    """
    needs = {_name(file): (file, needed) for file, needed in _dependencies(modules)}
    built_in = {_name(line) for line in _lines(modules / "modules.builtin")}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in order or name in built_in:
            return
        if name not in needs:
            raise LaunchError(f"{modules}: the kernel has no module {name} (built without that driver)")
        file, needed = needs[name]
        for other in needed:
            add(_name(other))
        order[name] = modules / file

    for name in names:
        add(name.replace("-", "_"))
    return list(order.values())


def read_module(file: Path) -> bytes:
    """The module in *file*, unpacked.  Raises LaunchError."""
    unpackers: dict[str, Callable[[bytes], bytes]] = {".ko": bytes, ".gz": _gunzip, ".xz": _unxz}
    if file.suffix not in unpackers:
        raise LaunchError(f"{file}: compressed in a way that is not known here (unpack it with unzstd)")
    try:
        return unpackers[file.suffix](file.read_bytes())
    except OSError as error:
        raise LaunchError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"{file}: damaged: {error}") from None


def _gunzip(data: bytes) -> bytes:
    import gzip
    import zlib

    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(str(error)) from None


def _unxz(data: bytes) -> bytes:
    import lzma

    try:
        return lzma.decompress(data)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from None


def _dependencies(modules: Path) -> Iterator[tuple[str, list[str]]]:
    """The lines of modules.dep: a file, relative to *modules*, and those it needs."""
    for line in _lines(modules / "modules.dep"):
        file, _, needed = line.partition(":")
        yield file, needed.split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError as error:
        remedy = f"depmod -b {file.parents[3]} {file.parent.name}"
        raise LaunchError(f"{file}: {error.strerror} ({remedy} makes it)") from None


def _name(file: str) -> str:
    """The name of the module in *file*: kernel/a/virtio-rng.ko.xz is virtio_rng."""
    return file.rpartition("/")[2].partition(".ko")[0].replace("-", "_")
