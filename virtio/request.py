"""From a chain of descriptors to a block request (virtio 1.4 §5.2.6): only parsing.

How a driver cuts a request into descriptors means nothing (VQ-S-08): the header is the first 16
readable bytes, the status the last writable byte, and data is what lies between.
"""

from __future__ import annotations

from ..errors import GuestError
from .layout import CHAIN_BYTES_MAX, Structs
from .memory import GuestMemory, Segment
from .ring import Chain

__all__ = ["BlockRequest", "parse_request"]


class BlockRequest:
    """One request of a driver, as it stands in the ring: its data is still only addresses."""

    __slots__ = ("incoming", "kind", "outgoing", "sector", "status")

    def __init__(
        self,
        kind: int,
        sector: int,
        outgoing: list[Segment],
        incoming: list[Segment],
        status: int,
    ) -> None:
        self.kind = kind
        """``VIRTIO_BLK_T_…``, or whatever the driver wrote there."""
        self.sector = sector
        """In units of 512 bytes."""
        self.outgoing = outgoing
        """Data from the driver."""
        self.incoming = incoming
        """Room for data to the driver."""
        self.status = status
        """Physical address of the status byte."""

    def __repr__(self) -> str:
        return (
            f"BlockRequest(kind={self.kind}, sector={self.sector}, outgoing={self.outgoing!r}, "
            f"incoming={self.incoming!r}, status={self.status:#x})"
        )


def split_last_byte(segments: list[Segment]) -> tuple[list[Segment], int] | None:
    """The segments without their last byte, and its address; None if there is no byte."""
    for index in range(len(segments) - 1, -1, -1):
        address, length = segments[index]
        if length:
            rest = segments[:index]
            if length > 1:
                rest.append((address, length - 1))
            return rest, address + length - 1
    return None


def skip(segments: list[Segment], count: int) -> tuple[list[Segment], list[Segment]] | None:
    """The first ``count`` bytes and the rest; None if there are fewer."""
    first: list[Segment] = []
    for index, (address, length) in enumerate(segments):
        if length >= count:
            first.append((address, count))
            rest = segments[index + 1 :]
            if length > count:
                rest.insert(0, (address + count, length - count))
            return first, rest
        first.append((address, length))
        count -= length
    return None


def parse_request(chain: Chain, memory: GuestMemory, structs: Structs) -> BlockRequest:
    """The request in ``chain``. Its header is read, once; no other memory is looked at.

    Raises GuestError for a chain that has no status byte or no whole header, that is longer than
    2^32 bytes (VQ-S-16), or whose header is not in RAM.
    """
    readable = chain.readable
    writable = chain.writable
    if len(readable) + len(writable) > 3:
        total = 0
        for _, length in readable:
            total += length
        for _, length in writable:
            total += length
        if total > CHAIN_BYTES_MAX:
            raise GuestError(f"a chain of {total} bytes")
    # The status byte, in a descriptor of its own as nearly always.
    if writable and writable[-1][1] == 1:
        status = writable[-1][0]
        incoming = writable[:-1]
    else:
        ending = split_last_byte(writable)
        if ending is None:
            raise GuestError("a request without a status byte")
        incoming, status = ending
    header = structs.blk_request
    if readable and readable[0][1] == 16:
        kind, _, sector = memory.load(header, readable[0][0])
        outgoing = readable[1:]
    else:
        parts = skip(readable, 16)
        if parts is None:
            raise GuestError("a request without a whole header")
        first, outgoing = parts
        kind, _, sector = header.unpack(b"".join(memory.read(*part) for part in first))
    return BlockRequest(kind, sector, outgoing, incoming, status)
