"""From a chain of descriptors to a block request (virtio 1.4 §5.2.6): only parsing.

How a driver cuts a request into descriptors means nothing (VQ-S-08): the header is the first 16
readable bytes, the status the last writable byte, and data is what lies between.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import GuestError
from .layout import CHAIN_BYTES_MAX, Structs
from .memory import GuestMemory, Segment
from .ring import Chain

__all__ = ["BlockRequest", "parse_request"]


class BlockRequest(NamedTuple):
    """One request of a driver, as it stands in the ring: its data is still only addresses."""

    kind: int
    """``VIRTIO_BLK_T_…``, or whatever the driver wrote there."""
    sector: int
    """In units of 512 bytes."""
    outgoing: list[Segment]
    """Data from the driver."""
    incoming: list[Segment]
    """Room for data to the driver."""
    status: int
    """Physical address of the status byte."""


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
    _, readable, writable = chain
    if len(readable) + len(writable) > 3:
        _check_length(readable, writable)
    if readable and writable and readable[0][1] == 16 and writable[-1][1] == 1:
        # The usual shape: header and status in descriptors of their own.
        kind, _, sector = memory.load(structs.blk_request, readable[0][0])
        # tuple.__new__ is what BlockRequest() would end in.
        return tuple.__new__(
            BlockRequest, (kind, sector, readable[1:], writable[:-1], writable[-1][0])
        )
    ending = split_last_byte(writable)
    if ending is None:
        raise GuestError("a request without a status byte")
    beginning = skip(readable, 16)
    if beginning is None:
        raise GuestError("a request without a whole header")
    header, outgoing = beginning
    kind, _, sector = structs.blk_request.unpack(b"".join(memory.read(*part) for part in header))
    return BlockRequest(kind, sector, outgoing, *ending)


def _check_length(readable: list[Segment], writable: list[Segment]) -> None:
    total = 0
    for _, length in readable:
        total += length
    for _, length in writable:
        total += length
    if total > CHAIN_BYTES_MAX:
        raise GuestError(f"a chain of {total} bytes")
