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
_TRACE = "the order inside the device does not show in the ring"
_SLOW = "a reset takes no time that could be seen from outside without a backend that waits"
_NONE = "block devices have none"
_POWER = "shows only when power fails: a test of the storage behind the device, not of its queues"
_STORAGE = "only who knows the storage can tell"


UNTESTABLE = {
    "BF-90": "only who knows the platform can tell",
    "BF-95": _HARDWARE,
    "BF-96": _HARDWARE,
    "BF-104": _NONE,
    "VQ-S-13": "reads of memory do not show",
    "PKD-02": _TRACE,
    "PKD-03": _TRACE,
    "PKD-06": "reads of memory do not show",
    "MMIO-12": _SLOW,
    "PCI-28": "which capability is best cannot be decided by a test",
    "PCI-43": _SLOW,
    "PCI-47": _NONE,
    "PCI-48": _NONE,
    "PCI-79": _NONE,
    "PCI-80": _NONE,
    "PCI-101": "for device types that had such legacy drivers; block devices had none",
    "PCI-102": "for device types that had such legacy drivers; block devices had none",
    "PCI-110": "what helps performance cannot be decided by a test",
    "BLK-75": "the device would have to change a field that no device is known to change",
    "BLK-76": _POWER,
    "BLK-78": _STORAGE,
    "BLK-79": _STORAGE,
    "BLK-119": "the legacy feature BARRIER is offered by no device since virtio 1.0",
    "BLK-120": "the legacy feature BARRIER is offered by no device since virtio 1.0",
}
"""Why no test of a device, seen from its driver, shows these."""
