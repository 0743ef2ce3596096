"""Which modules hold the image formats and the other block drivers; nothing is imported before it
is needed."""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; importing typing takes time at every start
if TYPE_CHECKING:
    from collections.abc import Callable

    from .registry import Driver, Format

__all__ = ["driver_loaders", "loaders", "protocols", "register_driver", "register_format"]

loaders: dict[str, Callable[[], Format]] = {}
"""What gives the format of a name."""

driver_loaders: dict[str, Callable[[], Driver]] = {}
"""What gives any other driver of a name."""

protocols: dict[str, str] = {}
"""The drivers' names by the prefixes of file names that are theirs."""


def register_format(name: str, module: str, attribute: str = "FORMAT") -> None:
    """Have format ``name`` found as ``attribute`` of ``module``, which is imported when needed."""

    def load() -> Format:
        from importlib import import_module

        found: Format = getattr(import_module(module), attribute)
        return found

    loaders[name] = load


def register_driver(
    name: str, module: str, attribute: str = "DRIVER", *, prefixes: tuple[str, ...] = ()
) -> None:
    """Have driver ``name`` found as ``attribute`` of ``module``; file names that begin with one of
    the ``prefixes`` and a colon are its own."""

    def load() -> Driver:
        from importlib import import_module

        found: Driver = getattr(import_module(module), attribute)
        return found

    driver_loaders[name] = load
    for prefix in prefixes:
        protocols[prefix] = name
