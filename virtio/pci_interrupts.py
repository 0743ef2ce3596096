"""How a virtio PCI function interrupts: ISR status and INTx, or MSI-X (§4.1.4.5, §4.1.5).

Queues and configuration changes are mapped to MSI-X vectors here; without MSI-X both raise the one
interrupt line, and the ISR status says which it was.
"""

from __future__ import annotations

from collections.abc import Callable

from ..backend.state import StateReader, StateWriter
from . import pci_layout as at
from .line import InterruptLine
from .msix import MsixTable

__all__ = ["PciInterrupts"]


class PciInterrupts:
    """ISR status, interrupt line and vectors of one function; any thread may raise."""

    def __init__(
        self,
        num_queues: int,
        vectors: int,
        intx: Callable[[bool], object] | None,
        msi: Callable[[int, int], object] | None,
    ) -> None:
        self.msix = None if msi is None or not vectors else MsixTable(vectors, msi)
        self.msix_enabled = False
        self.line = InterruptLine(intx)
        """INTA#. Its causes are the ISR status."""
        self.config_vector = at.NO_VECTOR
        self.queue_vectors = [at.NO_VECTOR] * num_queues

    @property
    def intx_status(self) -> bool:
        """The Interrupt Status bit of the PCI status register (PCI-74)."""
        return self.line.causes != 0 and not self.msix_enabled

    def choose(self, *, msix: bool, intx_disabled: bool) -> None:
        """What the capability and the command register say."""
        self.msix_enabled = msix
        self.line.masked = msix or intx_disabled
        self.line.update()

    def reset(self) -> None:
        """The device was reset: nothing is mapped (PCI-114), nothing is to be told any more."""
        if self.msix is not None:
            for vector in {self.config_vector, *self.queue_vectors} - {at.NO_VECTOR}:
                self.msix.forget(vector)
        self.config_vector = at.NO_VECTOR
        self.queue_vectors = [at.NO_VECTOR] * len(self.queue_vectors)
        self.line.remove(-1)

    def map(self, vector: int) -> int:
        """What a vector register holds after this was written to it (PCI-111 to PCI-116)."""
        known = 0 if self.msix is None else self.msix.vectors
        return vector if vector < known else at.NO_VECTOR

    def queue_interrupt(self, index: int) -> None:
        """Queue ``index`` has used buffers that the driver wants to hear of."""
        self.note(index)
        self.deliver()

    def note(self, index: int | None) -> None:
        """There is something to be told of a queue, or (None) the configuration."""
        msix = self.msix if self.msix_enabled else None
        vector = self.config_vector if index is None else self.queue_vectors[index]
        if index is None:
            self.line.note(at.ISR_CONFIG)  # with MSI-X, too (PCI-72)
        elif msix is None:
            self.line.note(at.ISR_QUEUE)  # PCI-73
        if msix is not None and vector != at.NO_VECTOR:  # PCI-129, PCI-130
            msix.note(vector)

    def deliver(self) -> None:
        """Tell what was noted."""
        if self.msix is not None and self.msix_enabled:
            self.msix.send()
        else:
            self.line.update()

    def read_isr(self) -> int:
        """The driver reads the ISR status, which resets it (PCI-75)."""
        return self.line.remove(-1)

    def save(self, stream: StateWriter) -> None:
        """Write all of it but what the configuration space says."""
        stream.u8(self.line.causes)
        stream.u16(self.config_vector)
        for vector in self.queue_vectors:
            stream.u16(vector)
        stream.flag(self.msix is not None)
        if self.msix is not None:
            self.msix.save(stream)

    def load(self, stream: StateReader) -> Callable[[], None]:
        """Read it again; returns how to put it in force, without the line."""
        isr, config_vector = stream.u8(), stream.u16()
        queue_vectors = [stream.u16() for _ in self.queue_vectors]
        if stream.flag() != (self.msix is not None):
            raise stream.malformed("is of a function with MSI-X, or without")
        if any(self.map(each) != each for each in (config_vector, *queue_vectors)):
            raise stream.malformed("maps an event to an MSI-X vector that is none")
        adopt_msix = None if self.msix is None else self.msix.load(stream)

        def adopt() -> None:
            self.line.causes = isr & (at.ISR_QUEUE | at.ISR_CONFIG)
            self.config_vector, self.queue_vectors = config_vector, queue_vectors
            if adopt_msix is not None:
                adopt_msix()

        return adopt
