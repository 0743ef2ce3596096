"""Which modules hold the image formats; nothing is imported before it is needed."""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; importing typing takes time at every start
if TYPE_CHECKING:
    from collections.abc import Callable

    from .registry import Format

__all__ = ["loaders", "register_format"]

loaders: dict[str, Callable[[], Format]] = {}
"""What gives the format of a name."""


def register_format(name: str, module: str, attribute: str = "FORMAT") -> None:
    """Have format ``name`` found as ``attribute`` of ``module``, which is imported when needed."""

    def load() -> Format:
        from importlib import import_module

        found: Format = getattr(import_module(module), attribute)
        return found

    loaders[name] = load
