"""The requirements of virtio 1.4 on devices: the table, and what of it no test can show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

__all__ = ["UNTESTABLE", "Requirement", "load_requirements"]

_GROUPS = {
    "BF": "Basic facilities",
    "VQ": "Split virtqueues",
    "PKD": "Packed virtqueues",
    "MMIO": "Virtio over MMIO",
    "PCI": "Virtio over PCI",
    "BLK": "Block device",
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """One rule for devices, in short words."""

    ident: str
    level: str
    """MUST, MUST NOT, SHOULD or SHOULD NOT; what a device MAY do cannot be missed."""
    section: str
    text: str

    @property
    def group(self) -> str:
        """The chapter it belongs to."""
        return _GROUPS[self.ident.split("-")[0]]

    @property
    def binding(self) -> bool:
        """A MUST or MUST NOT."""
        return self.level.startswith("MUST")


@cache
def load_requirements() -> dict[str, Requirement]:
    """All of them by id, in the order of the specification."""
    text = files(__package__).joinpath("requirements.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return {row[0]: Requirement(*row) for row in rows}


_HARDWARE = "a duty of add-in cards, which software does not show"
_TRACE = (
    "what a device begins or completes first does not show: in the ring the order is that in which "
    "it says so, and at the storage threads overtake each other"
)
_SHARED = "of shared memory regions, of which a block device has none"


UNTESTABLE = {
    "BF-90": "only who knows the platform can tell",
    "BF-95": _HARDWARE,
    "BF-96": _HARDWARE,
    "BF-104": _SHARED,
    "VQ-S-13": "reads of memory do not show",
    "PKD-02": _TRACE,
    "PKD-03": _TRACE,
    "PKD-06": "reads of memory do not show",
    "PCI-28": "which capability is best cannot be decided by a test",
    "PCI-79": _SHARED,
    "PCI-80": _SHARED,
    "PCI-101": "for device types that had such legacy drivers; block devices had none",
    "PCI-102": "for device types that had such legacy drivers; block devices had none",
    "PCI-110": "what helps performance cannot be decided by a test",
    "BLK-75": "the device would have to change a field that no device is known to change",
    "BLK-119": "the legacy feature BARRIER is offered by no device since virtio 1.0",
    "BLK-120": "the legacy feature BARRIER is offered by no device since virtio 1.0",
}
"""Why no test of a device, seen from its driver, shows these."""
