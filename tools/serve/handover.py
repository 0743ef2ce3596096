"""An image that is held only while a guest uses it, so that a server on another machine, or another
server here, can take it over: live migration.

While it is not held the image is open read-only and without a lock, so that the guest can be told
how large it is; nobody's data is read then. Holding it opens it anew, with everything that somebody
else has written meanwhile, and with QEMU's locks: two servers never hold it together.
"""

from __future__ import annotations

from collections.abc import Callable

from ... import Disk
from ...backend.filter import FilterDisk
from ...errors import UnsupportedError

__all__ = ["HandoverDisk"]


class HandoverDisk(FilterDisk):
    """``open_image(read_only, locking)`` opens the image. Raises what that raises."""

    def __init__(self, open_image: Callable[[bool, bool], Disk], *, read_only: bool) -> None:
        self._open = open_image
        super().__init__(open_image(True, False))
        self.format_name = self.below.format_name
        self.read_only = read_only
        self.held = False

    def hold(self) -> None:
        """Have the image for this process alone. Raises InUseError while somebody else has it."""
        if self.held:
            return
        disk = self._open(self.read_only, True)
        look, self.below = self.below, disk
        look.close()
        self.held = True
        self._follow()

    def let_go(self) -> None:
        """Bring everything to the image, and let others have it. Raises what a flush raises; the
        image is let go of all the same."""
        if not self.held:
            return
        self.held = False
        try:
            self.below.close()
        finally:
            self.below = self._open(True, False)

    def _truncate(self, size: int, preallocation: str) -> None:
        if not self.held:
            raise UnsupportedError("the image is not held: no guest is running", feature="resize")
        super()._truncate(size, preallocation)

    def _flush(self) -> None:
        if self.held:
            super()._flush()
