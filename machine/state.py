"""What a machine consists of, and its whole state as one stream.

An emulator gives its CPU and its devices names, and its RAM as buffers. Each of the former is a
:class:`Component`; it is kept in a section ``component/NAME`` (values as :mod:`..backend.state`
has them), each RAM in a section ``ram/NAME``: as :mod:`.ram` lays it out in a stream of its own,
as :mod:`.placed` does in an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from ..backend.state import StateReader, StateWriter
from ..errors import ImageError
from .lineage import LINEAGE, known_lineage
from .placed import (
    PLACED_VERSION,
    WINDOW,
    Placed,
    check_placed,
    load_placed,
    payload_length,
    read_placed,
)
from .ram import check_ram, load_ram, packed_length, save_ram
from .stream import Known, Source, StreamReader, StreamWriter, Target

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Component", "Machine"]

MAX_COMPONENT = 64 << 20
"""Bytes of a component's state; what has more is to be given as RAM."""


class Component(Protocol):
    """A part of a machine with a state of its own: a CPU, a device."""

    @property
    def state_version(self) -> int:
        """The version of what :meth:`save_state` writes."""

    def save_state(self, stream: StateWriter, /) -> None:
        """Write everything that the guest could tell apart, and change nothing."""

    def load_state(self, stream: StateReader, /) -> Callable[[], object]:
        """Read what :meth:`save_state` has written; returns how to put it in force.

        ``stream.version`` is never newer than :attr:`state_version`. Here everything is read and
        checked (``stream.malformed`` is the error to raise) and nothing is changed: only when all
        components have been read, are the functions they returned called. Those must not fail.
        """


class Machine:
    """The parts of a machine, by name.

    ``ram``: writable buffers, of a size that stays. The machine must stand still while it is saved
    or loaded, its requests to disks included.
    """

    def __init__(
        self, components: Mapping[str, Component], ram: Mapping[str, WriteableBuffer]
    ) -> None:
        self._components = {f"component/{name}": part for name, part in components.items()}
        self._ram = {f"ram/{name}": part for name, part in ram.items()}
        for name, view in self.ram_views().items():
            if view.readonly:
                raise ValueError(f"the buffer {name!r} cannot be written")

    def ram_views(self) -> dict[str, memoryview]:
        """The RAM as it is now; not kept, so that an mmap can be closed."""
        return {name: memoryview(part).cast("B") for name, part in self._ram.items()}

    def save(self, target: Target) -> int:
        """Write everything to ``target``, from its byte 0 on; returns the bytes written."""
        writer = StreamWriter(target)
        self.save_components(writer)
        for name, ram in self.ram_views().items():
            save_ram(writer, name, ram)
        return writer.finish()

    def save_components(self, writer: StreamWriter) -> None:
        """Write a section for each component."""
        for name, component in self._components.items():
            stream = StateWriter()
            component.save_state(stream)
            state = bytes(stream)
            if len(state) > MAX_COMPONENT:
                raise ValueError(f"{name!r} has {len(state)} bytes of state, too many")
            writer.section(name, component.state_version, len(state), [state])

    def known_sections(self) -> dict[str, Known]:
        """The sections that a stream of this machine can have."""
        known = {
            name: Known(part.state_version, MAX_COMPONENT)
            for name, part in self._components.items()
        }
        known |= {name: _known_ram(len(ram)) for name, ram in self.ram_views().items()}
        known[LINEAGE] = known_lineage()
        return known

    def prepare(self, source: Source) -> Callable[[], None]:
        """Read and check the whole stream, and change nothing; returns how to put it in force.

        ``source`` must stay until then: RAM of more than 256 MiB is read from it once more, and so
        is RAM inside the stream. Raises ImageError for a stream that is damaged or of another
        machine, UnsupportedError for one with parts that this machine does not have, or newer than
        it knows them.
        """
        known, views = self.known_sections(), self.ram_views()
        reader = StreamReader(source, known)
        for name in known:
            if name not in reader.sections and name != LINEAGE:
                raise ImageError(f"The VM state has no section {name!r}", field=name)
        placed: dict[str, Placed] = {}
        checked: dict[str, memoryview] = {}
        for name, ram in views.items():
            if reader.sections[name].version >= PLACED_VERSION:
                placed[name] = read_placed(reader, name, len(ram))
                contents = check_placed(placed[name], name, source)
                if len(ram) + sum(map(len, checked.values())) <= WINDOW:
                    checked[name] = contents
            else:
                check_ram(reader, name, ram)
        adopt = []
        for name, component in self._components.items():
            version = reader.sections[name].version
            stream = StateReader(reader.read(name), name=name, version=version)
            adopt.append(component.load_state(stream))
            stream.end()

        def load() -> None:
            for name, ram in views.items():
                if name in checked:
                    ram[:] = checked[name]
                elif name in placed:
                    load_placed(placed[name], source, ram)
                else:
                    load_ram(reader, name, ram)
            for function in adopt:
                function()

        return load

    def load(self, source: Source) -> None:
        """Become what was saved: all of it, or (with the errors of :meth:`prepare`) nothing."""
        self.prepare(source)()


def _known_ram(size: int) -> Known:
    return Known(PLACED_VERSION, max(packed_length(size), payload_length(size)))
