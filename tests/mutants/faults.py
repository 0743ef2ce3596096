"""The faults: one line changed each, and the tests that must notice.

Most are what a tired programmer would do: an order changed, an off-by-one, a check or a flag
forgotten, a wrong constant. ``qcow2/`` comes first, file by file, with what is done in bulk, then
``backend/``, then what the features add, what works unseen, ``machine/``, NBD, ``virtio/``,
vhost-user.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """One fault."""

    file: str
    """The file it is put into, from the package's root."""
    what: str
    """What goes wrong."""
    old: str
    """What it replaces: it stands in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """The tests of which at least one must fail."""


def _load() -> list[Fault]:
    from backend_faults import BACKEND
    from bulk_faults import BULK
    from feature_faults import FEATURES
    from machine_faults import MACHINES
    from nbd_faults import NBD
    from qcow2_faults import QCOW2
    from quiet_faults import QUIET
    from vhost_faults import VHOST
    from virtio_faults import VIRTIO

    return [
        Fault(file, what, old, new, tuple(f"tests/{test}" for test in tests))
        for file, what, old, new, *tests in (
            *QCOW2,
            *BULK,
            *BACKEND,
            *FEATURES,
            *QUIET,
            *MACHINES,
            *NBD,
            *VIRTIO,
            *VHOST,
        )
    ]


FAULTS = _load()
