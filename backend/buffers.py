"""Lists of buffers (scatter/gather vectors): the data of every request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["as_views", "clear", "copy_in", "gather", "is_zero", "split", "total"]

_ZEROES = bytes(1 << 16)


def as_views(buffers: Iterable[ReadableBuffer]) -> tuple[list[memoryview], int]:
    """The buffers as flat memoryviews of bytes, and their length together in bytes.

    Raises TypeError for something that is no buffer, or whose memory is not contiguous.
    """
    views = []
    length = 0
    for buffer in buffers:
        view = buffer if type(buffer) is memoryview else memoryview(buffer)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        elif not view.c_contiguous:
            raise TypeError("a buffer of a request must be contiguous")
        views.append(view)
        length += len(view)
    return views, length


def total(views: Iterable[memoryview]) -> int:
    """Length of all views together, in bytes."""
    return sum(map(len, views))


def split(views: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The ``length`` bytes from byte ``start`` on, as (parts of) the same views."""
    if start == 0 and len(views) == 1:
        view = views[0]
        return [view] if len(view) == length else [view[:length]]
    part = []
    for view in views:
        size = len(view)
        if start >= size:
            start -= size
            continue
        if length <= 0:
            break
        piece = view[start : start + length]
        part.append(piece)
        length -= len(piece)
        start = 0
    return part


def gather(views: Sequence[memoryview]) -> bytes:
    """A copy of everything in ``views`` as one bytes object."""
    return bytes(views[0]) if len(views) == 1 else b"".join(views)


def copy_in(views: Iterable[memoryview], data: ReadableBuffer) -> None:
    """Scatter ``data`` over ``views``; the two must be of one length."""
    source = memoryview(data)
    start = 0
    for view in views:
        end = start + len(view)
        view[:] = source[start:end]
        start = end


def clear(views: Iterable[memoryview]) -> None:
    """Fill all of ``views`` with zero bytes."""
    for view in views:
        size = len(view)
        for start in range(0, size, len(_ZEROES)):
            part = min(len(_ZEROES), size - start)
            view[start : start + part] = _ZEROES[:part]


def is_zero(views: Iterable[memoryview]) -> bool:
    """True if there is nothing but zero bytes in ``views``."""
    for view in views:
        for start in range(0, len(view), len(_ZEROES)):
            part = view[start : start + len(_ZEROES)]
            if part != _ZEROES[: len(part)]:
                return False
    return True
