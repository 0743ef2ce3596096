"""Which ring a queue has under the features that were negotiated."""

from __future__ import annotations

from .layout import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_NOTIFY_ON_EMPTY,
    VIRTIO_F_RING_PACKED,
    Structs,
)
from .memory import GuestMemory
from .packed import PackedRing
from .ring import QueueState, Ring
from .split import SplitRing

__all__ = ["make_ring"]


def make_ring(state: QueueState, features: int, memory: GuestMemory, structs: Structs) -> Ring:
    """A ring for a queue. Raises GuestError for one that cannot work."""
    indirect = bool(features >> VIRTIO_F_INDIRECT_DESC & 1)
    event_idx = bool(features >> VIRTIO_F_EVENT_IDX & 1)
    in_order = bool(features >> VIRTIO_F_IN_ORDER & 1)
    if features >> VIRTIO_F_RING_PACKED & 1:
        return PackedRing(state, memory, indirect=indirect, event_idx=event_idx, in_order=in_order)
    return SplitRing(
        state,
        memory,
        indirect=indirect,
        event_idx=event_idx,
        in_order=in_order,
        notify_on_empty=bool(features >> VIRTIO_F_NOTIFY_ON_EMPTY & 1),
        structs=structs,
    )
