"""Where everything is: the addresses and interrupt numbers of QEMU's ``virt`` machine."""

from __future__ import annotations

FINISHER_BASE, FINISHER_SIZE = 0x0010_0000, 0x1000
CLINT_BASE, CLINT_SIZE = 0x0200_0000, 0x1_0000
PLIC_BASE, PLIC_SIZE, PLIC_SOURCES = 0x0C00_0000, 0x60_0000, 95
UART_BASE, UART_SIZE, UART_IRQ = 0x1000_0000, 0x1000, 10
VIRTIO_BASE, VIRTIO_SIZE, VIRTIO_SLOTS, VIRTIO_FIRST_IRQ = 0x1000_1000, 0x1000, 8, 1
RAM_BASE = 0x8000_0000
KERNEL_OFFSET = 0x20_0000
"""Where a kernel goes in memory if firmware is below it."""
