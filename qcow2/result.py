"""What a check found and a repair did, in the numbers of ``qemu-img check --output=json``."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CheckResult", "Report"]

_MAX_MESSAGES = 1000


class Report(str):
    """A message that QEMU's programs print under their own name, as they do other errors."""

    __slots__ = ()


@dataclass(slots=True)
class CheckResult:
    """What is wrong with an image (after a repair: what still is)."""

    corruptions: int = 0
    leaks: int = 0
    """Clusters with a refcount that is too high."""
    check_errors: int = 0
    """Parts that could not be checked."""
    failure: int | None = None
    """The number of the error (``errno``) that ended the check before its end."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    allocated_clusters: int = 0
    """Guest clusters of the active disk that are stored."""
    total_clusters: int = 0
    """Guest clusters of the disk."""
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    """Stored guest clusters that do not follow the one before them in the host file."""
    image_end_offset: int = 0
    """Host byte after the last cluster in use."""
    messages: list[str] = field(default_factory=list)
    """One line for each finding, in QEMU's words; the first thousand."""

    @property
    def clean(self) -> bool:
        """True if nothing is wrong."""
        return not (self.corruptions or self.leaks or self.check_errors or self.failure)

    def say(self, message: str) -> None:
        """Add a line."""
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(message)

    def corrupt(self, message: str, times: int = 1, *, mark: str = "ERROR ") -> None:
        """Count a corruption, found ``times`` times."""
        self.corruptions += times
        self.say(mark + message)

    def fixed(self, message: str, times: int = 1) -> None:
        """Count a corruption that was repaired at once."""
        self.corruptions_fixed += times
        self.say(f"Repairing {message}")

    def unreadable(self, message: str) -> None:
        """Count a part that could not be checked."""
        self.check_errors += 1
        self.say(f"ERROR {message}")
