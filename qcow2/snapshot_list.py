"""The snapshots of an image, in the order of its table, with what every change of it needs.

A list stays as it is; another one is derived from it. What is known of the snapshots there are is
taken over in bulk, so one more costs the same however many they are, but for bytes that are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .snapshot_table import Snapshot, check_size

__all__ = ["SnapshotList"]

_MAX_DIGITS = 18
"""Of an id that counts as a number; longer ones has only an image made for it."""


class SnapshotList:
    """Snapshots; ``length`` is that of their table in the file, in bytes."""

    __slots__ = ("_by_id", "_by_name", "_numbers", "_packed", "_sizes", "entries", "length")

    def __init__(self, snapshots: Iterable[Snapshot] = (), length: int = 0) -> None:
        self.entries = list(snapshots)
        """Not to be changed."""
        self.length = length
        self._packed: bytes | None = None
        self._sizes: list[int] = []
        """Bytes of each entry in ``_packed``."""
        self._numbers: list[int] = []
        self._by_id: dict[str, Snapshot] = {}
        self._by_name: dict[str, Snapshot] = {}
        for snapshot in self.entries:
            self._note(snapshot)

    def _note(self, snapshot: Snapshot) -> None:
        """Know one more; of several with one id, or one name, the first is found."""
        digits = snapshot.id.isascii() and snapshot.id.isdigit()
        short = len(snapshot.id) <= _MAX_DIGITS
        self._numbers.append(int(snapshot.id) if digits and short else 0)
        self._by_id.setdefault(snapshot.id, snapshot)
        self._by_name.setdefault(snapshot.name, snapshot)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, snapshot: Snapshot) -> bool:
        """Whether this very object is in the list."""
        return self._by_id.get(snapshot.id) is snapshot or id(snapshot) in map(id, self.entries)

    def with_id(self, id: str) -> Snapshot | None:
        """The first one with that id."""
        return self._by_id.get(id)

    def named(self, name: str) -> Snapshot | None:
        """The first one with that name."""
        return self._by_name.get(name)

    def new_id(self) -> str:
        """One more than the highest id."""
        number = max(self._numbers, default=0) + 1
        while str(number) in self._by_id:  # of more digits than count
            number += 1
        return str(number)

    def packed(self) -> bytes:
        """The whole table. Raises ImageError where it exceeds what QEMU reads."""
        if self._packed is None:
            packed = [snapshot.pack() for snapshot in self.entries]
            self._packed, self._sizes = b"".join(packed), list(map(len, packed))
        check_size(len(self.entries), len(self._packed))
        return self._packed

    # -- others --------------------------------------------------------------------------------

    def added(self, snapshot: Snapshot) -> SnapshotList:
        """With one more at the end."""
        packed, entry, other = self.packed(), snapshot.pack(), self._copy()
        other.entries.append(snapshot)
        other._note(snapshot)
        other._packed = packed + entry
        other._sizes.append(len(entry))
        return other

    def removed(self, snapshot: Snapshot) -> SnapshotList:
        """Without one that is in the list."""
        at = list(map(id, self.entries)).index(id(snapshot))
        if not len(self.entries) == len(self._by_id) == len(self._by_name):
            return SnapshotList(self.entries[:at] + self.entries[at + 1 :])
        packed, other = self.packed(), self._copy()
        start = sum(self._sizes[:at])
        other._packed = packed[:start] + packed[start + self._sizes[at] :]
        for known in (other.entries, other._sizes, other._numbers):
            del known[at]
        del other._by_id[snapshot.id], other._by_name[snapshot.name]
        return other

    def _copy(self) -> SnapshotList:
        other = SnapshotList()
        other.entries, other._sizes = self.entries[:], self._sizes[:]
        other._numbers = self._numbers[:]
        other._by_id, other._by_name = self._by_id.copy(), self._by_name.copy()
        return other
