"""Writes an initramfs: a cpio archive in the "newc" format.

Documentation/driver-api/early-userspace/buffer-format.rst.  The same content
added in the same order gives the same bytes: inode numbers count up, everything
belongs to root, and the time is 0.
"""

import os
import stat

MAGIC = b"070701"
TRAILER = b"TRAILER!!!"
"""The name that ends an archive."""

FIELD_MAX = 0xFFFF_FFFF
PATH_MAX = 4096
"""Bytes of a name or of a symbolic link's target, its NUL included, as the kernel unpacks them."""


class NewcArchive:
    """An archive to be filled; missing parent directories are added.

    Paths are relative to the root, such as ``bin/sh``.  Every method raises
    ValueError for a path that is not, is there already, or is too long, and for
    what the format cannot hold.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._modes: dict[bytes, int] = {}

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory; one that is only there as a parent's name cannot be added again."""
        self._add(path, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, _name(target, "target"))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._add(path, stat.S_IFCHR | mode, device=(major, minor))

    def block_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a block device."""
        self._add(path, stat.S_IFBLK | mode, device=(major, minor))

    def pack(self) -> bytes:
        """The archive, ready to be given to a kernel; more can be added afterwards."""
        return b"".join([*self._parts, *_entry(TRAILER)])

    def _add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = _name(path, "path")
        components = name.split(b"/")
        if any(component in (b"", b".", b"..") for component in components) or name == TRAILER:
            raise ValueError(f"{path!r} is no path inside an archive, such as bin/sh")
        if name in self._modes:
            raise ValueError(f"{path}: is in the archive already")
        if not all(0 <= number <= FIELD_MAX for number in (len(data), *device)):
            raise ValueError(f"{path}: {len(data)} bytes, device {device}: 32 bits hold {FIELD_MAX}")
        for depth in range(1, len(components)):
            parent = b"/".join(components[:depth])
            if parent not in self._modes:
                self._put(parent, stat.S_IFDIR | 0o755)
            elif not stat.S_ISDIR(self._modes[parent]):
                raise ValueError(f"{path}: {os.fsdecode(parent)} is no directory")
        self._put(name, mode, data, device)

    def _put(self, name: bytes, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._modes[name] = mode
        self._parts += _entry(name, len(self._modes), mode, data, device)


def _name(text: str, what: str) -> bytes:
    name = os.fsencode(text)
    if not name or b"\0" in name or len(name) >= PATH_MAX:
        raise ValueError(f"{what} {text[:100]!r}: not 1 to {PATH_MAX - 1} bytes without a NUL")
    return name


def _entry(
    name: bytes, inode: int = 0, mode: int = 0, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> list[bytes]:
    links = 2 if stat.S_ISDIR(mode) else 1
    # c_ino, c_mode, c_uid, c_gid, c_nlink, c_mtime, c_filesize, c_maj, c_min, c_rmaj, c_rmin, c_namesize,
    # c_chksum
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = MAGIC + b"".join(b"%08x" % field for field in fields) + name + b"\0"
    return [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
