"""Archives that Linux takes its first file system from: cpio, the "newc" kind.

Documentation/driver-api/early-userspace/buffer-format.rst in Linux's sources.
"""

from __future__ import annotations

import stat

__all__ = ["Archive"]


class Archive:
    """An archive in the making; everything in it belongs to root. :meth:`finish` gives the bytes.

    Folders have to be added before what is in them.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = 0

    def folder(self, name: str, mode: int = 0o755) -> None:
        """An empty folder."""
        self._add(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A file."""
        self._add(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._add(name, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive."""
        self._add("TRAILER!!!", 0)
        return bytes(self._data)

    def _add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, device of a node, name, no checksum
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (encoded, data):
            self._data += part
            self._data += bytes(-len(self._data) % 4)
