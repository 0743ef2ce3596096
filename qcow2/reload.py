"""Reading an image anew: somebody else has changed the file, or it is opened another way."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ImageError
from .header import Header, read_header
from .layout import Incompatible
from .metadata import Metadata
from .snapshots import Snapshots
from .table_io import load_table

__all__ = ["reload"]


def reload(metadata: Metadata, snapshots: Snapshots, accept: Callable[[Header], None]) -> None:
    """Forget all that is cached, written or not, and read the header and the tables (exclusively).

    ``accept(header)`` raises for a header that cannot be used. What is in use stays in use if it
    does, or if the file cannot be read. Views of snapshots are closed; a reason not to write any
    more is forgotten.
    """
    file, present = metadata.file, metadata.header
    header = read_header(file)
    for field in ("cluster_bits", "crypt_method"):
        _compare(field, getattr(present, field), getattr(header, field))
    features = Incompatible.EXTENDED_L2 | Incompatible.DATA_FILE
    _compare(
        "incompatible_features",
        present.incompatible_features & features,
        header.incompatible_features & features,
    )
    accept(header)
    load_table(file, header.l1_table_offset, header.l1_size)
    entries = header.refcount_table_clusters << (header.cluster_bits - 3)
    load_table(file, header.refcount_table_offset, entries)
    adopt_snapshots = snapshots.reload()
    snapshots.close_views()
    with metadata.health.step("Reading the image anew"):
        for name in Header.__slots__:
            setattr(present, name, getattr(header, name))
        metadata.adopt_geometry()
        metadata.reload()
        metadata.vm_state_end = None
        adopt_snapshots()
    metadata.health.reason = None


def _compare(field: str, present: int, found: int) -> None:
    """Raise ImageError if the image is one of another kind now, which nobody here is made for."""
    if found != present:
        raise ImageError(
            "The image has another layout now: it must be opened anew",
            field=field,
            value=int(found),
            limit=int(present),
        )
