"""From a chain of descriptors to a block request (virtio 1.4 §5.2.6): only parsing.

How a driver cuts a request into descriptors means nothing (VQ-S-08): the header is the first 16
readable bytes, the status the last writable byte, and data is what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..errors import GuestError
from .layout import Structs
from .memory import GuestMemory, Segment
from .ring import Chain

__all__ = ["BlockRequest", "make_parser", "parse_request"]


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


def make_parser(memory: GuestMemory, structs: Structs) -> Callable[[Chain], BlockRequest]:
    """:func:`parse_request` for one guest, made once and quick for the usual shape."""
    load_header = memory.loader(structs.blk_request)

    def parse(chain: Chain) -> BlockRequest:
        _, readable, writable, _ = chain
        if readable and writable:
            address, length = readable[0]
            status, one = writable[-1]
            if length == 16 and one == 1:  # header and status in descriptors of their own
                kind, _, sector = load_header(address)
                # tuple.__new__ is what BlockRequest() would end in.
                return tuple.__new__(
                    BlockRequest, (kind, sector, readable[1:], writable[:-1], status)
                )
        return parse_request(chain, memory, structs)

    return parse


def parse_request(chain: Chain, memory: GuestMemory, structs: Structs) -> BlockRequest:
    """The request in ``chain``. Its header is read, once; no other memory is looked at.

    Raises GuestError for a chain that has no status byte or no whole header, or whose header is not
    in RAM.
    """
    _, readable, writable, _ = chain
    ending = split_last_byte(writable)
    if ending is None:
        raise GuestError("a request without a status byte")
    beginning = skip(readable, 16)
    if beginning is None:
        raise GuestError("a request without a whole header")
    header, outgoing = beginning
    kind, _, sector = structs.blk_request.unpack(b"".join(memory.read(*part) for part in header))
    return BlockRequest(kind, sector, outgoing, *ending)
