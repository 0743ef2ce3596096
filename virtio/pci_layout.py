"""Constants of PCI (3.0; MSI-X: §6.8.2) and of virtio over PCI (virtio 1.4 §4.1); no logic."""

from __future__ import annotations

from struct import Struct
from typing import Final

__all__ = ["CAP", "CAP_CFG", "CAP_NOTIFY"]

# -- configuration space, header type 0 --------------------------------------------------------

CONFIG_SIZE: Final = 256

PCI_VENDOR_ID: Final = 0x00
PCI_DEVICE_ID: Final = 0x02
PCI_COMMAND: Final = 0x04
PCI_STATUS: Final = 0x06
PCI_REVISION_ID: Final = 0x08
PCI_CLASS_PROG: Final = 0x09
PCI_CACHE_LINE_SIZE: Final = 0x0C
PCI_LATENCY_TIMER: Final = 0x0D
PCI_HEADER_TYPE: Final = 0x0E
PCI_BAR_0: Final = 0x10
PCI_SUBSYSTEM_VENDOR_ID: Final = 0x2C
PCI_SUBSYSTEM_ID: Final = 0x2E
PCI_CAPABILITY_LIST: Final = 0x34
PCI_INTERRUPT_LINE: Final = 0x3C
PCI_INTERRUPT_PIN: Final = 0x3D
PCI_FIRST_CAPABILITY: Final = 0x40

PCI_COMMAND_IO: Final = 0x0001
PCI_COMMAND_MEMORY: Final = 0x0002
PCI_COMMAND_MASTER: Final = 0x0004
PCI_COMMAND_PARITY: Final = 0x0040
PCI_COMMAND_SERR: Final = 0x0100
PCI_COMMAND_INTX_DISABLE: Final = 0x0400

PCI_STATUS_INTERRUPT: Final = 0x0008
PCI_STATUS_CAP_LIST: Final = 0x0010

PCI_BAR_IO: Final = 0x1
PCI_BAR_64BIT: Final = 0x4
PCI_BAR_PREFETCH: Final = 0x8

PCI_CAP_ID_VENDOR: Final = 0x09
PCI_CAP_ID_MSIX: Final = 0x11
PCI_CAP_ID_AF: Final = 0x13
"""Advanced Features: function level reset for conventional PCI."""

AF_CAP_TP_FLR: Final = 0x03
AF_CONTROL_FLR: Final = 0x01

# -- MSI-X -------------------------------------------------------------------------------------

MSIX_ENTRY_SIZE: Final = 16
MSIX_ENTRY: Final = Struct("<QII")
"""Message address, message data, vector control."""
MSIX_VECTOR_CONTROL: Final = 12
MSIX_MASKED: Final = 1
MSIX_CONTROL_ENABLE: Final = 0x8000
MSIX_CONTROL_MASK_ALL: Final = 0x4000
MSIX_CONTROL_SIZE: Final = 0x07FF
MSIX_VECTORS_MAX: Final = 0x800
"""§4.1.5.1.2: and the table size field of MSI-X can say no more."""

# -- virtio over PCI ---------------------------------------------------------------------------

VIRTIO_PCI_VENDOR: Final = 0x1AF4
VIRTIO_PCI_DEVICE_BASE: Final = 0x1040
"""To which the virtio device id is added."""
VIRTIO_PCI_TRANSITIONAL_IDS: Final = {1: 0x1000, 2: 0x1001, 3: 0x1003, 4: 0x1005, 5: 0x1002}
"""§4.1.2.1: transitional PCI device ids by virtio device id: network, block, console, entropy,
balloon."""
VIRTIO_PCI_SUBSYSTEM: Final = 0x1100
"""As QEMU's; a modern device's has to be 0x40 at least (PCI-07)."""

VIRTIO_PCI_CAP_COMMON_CFG: Final = 1
VIRTIO_PCI_CAP_NOTIFY_CFG: Final = 2
VIRTIO_PCI_CAP_ISR_CFG: Final = 3
VIRTIO_PCI_CAP_DEVICE_CFG: Final = 4
VIRTIO_PCI_CAP_PCI_CFG: Final = 5
VIRTIO_PCI_CAP_SHARED_MEMORY_CFG: Final = 8
VIRTIO_PCI_CAP_VENDOR_CFG: Final = 9

CAP: Final = Struct("<BBBBBB2xII")
"""struct virtio_pci_cap: cap_vndr, cap_next, cap_len, cfg_type, bar, id, offset, length."""
CAP_NOTIFY: Final = Struct("<I")
"""What follows it in a notification capability: notify_off_multiplier."""
CAP_CFG: Final = Struct("<I")
"""And in the access capability: pci_cfg_data."""
CAP_VENDOR: Final = Struct("<BBBBH")
"""struct virtio_pci_vndr_data: cap_vndr, cap_next, cap_len, cfg_type, vendor_id; data follows."""
CAP_BAR: Final = 4
CAP_OFFSET: Final = 8
CAP_LENGTH: Final = 12
CAP_DATA: Final = 16

NO_VECTOR: Final = 0xFFFF

COMMON_DEVICE_FEATURE_SELECT: Final = 0
COMMON_DEVICE_FEATURE: Final = 4
COMMON_DRIVER_FEATURE_SELECT: Final = 8
COMMON_DRIVER_FEATURE: Final = 12
COMMON_CONFIG_MSIX_VECTOR: Final = 16
COMMON_NUM_QUEUES: Final = 18
COMMON_DEVICE_STATUS: Final = 20
COMMON_CONFIG_GENERATION: Final = 21
COMMON_QUEUE_SELECT: Final = 22
COMMON_QUEUE_SIZE: Final = 24
COMMON_QUEUE_MSIX_VECTOR: Final = 26
COMMON_QUEUE_ENABLE: Final = 28
COMMON_QUEUE_NOTIFY_OFF: Final = 30
COMMON_QUEUE_DESC: Final = 32
COMMON_QUEUE_DRIVER: Final = 40
COMMON_QUEUE_DEVICE: Final = 48
COMMON_QUEUE_NOTIF_CONFIG_DATA: Final = 56
COMMON_QUEUE_RESET: Final = 58
COMMON_SIZE: Final = 64

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

# -- the legacy interface, in I/O BAR 0 (§4.1.4.10) --------------------------------------------

LEGACY_DEVICE_FEATURES: Final = 0
LEGACY_DRIVER_FEATURES: Final = 4
LEGACY_QUEUE_ADDRESS: Final = 8
LEGACY_QUEUE_SIZE: Final = 12
LEGACY_QUEUE_SELECT: Final = 14
LEGACY_QUEUE_NOTIFY: Final = 16
LEGACY_STATUS: Final = 18
LEGACY_ISR: Final = 19
LEGACY_HEADER: Final = 20
LEGACY_CONFIG_VECTOR: Final = 20
LEGACY_QUEUE_VECTOR: Final = 22
LEGACY_HEADER_MSIX: Final = 24
LEGACY_PAGE: Final = 4096
"""Unit of the queue address, and the alignment of the used ring."""
