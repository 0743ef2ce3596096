"""What a message has to be, whatever the state ("Front-end message types"): one table.

How long its payload is, how many file descriptors come with it, which protocol feature it belongs
to, whether it has a reply of its own. A message that is not here is refused.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from . import layout as vu
from .layout import ProtocolFeature, Request

__all__ = ["PROTOCOL_FEATURES", "RULES", "Rule"]

_F = ProtocolFeature
PROTOCOL_FEATURES = sum(
    1 << bit
    for bit in (
        _F.MQ,
        _F.LOG_SHMFD,
        _F.REPLY_ACK,
        _F.BACKEND_REQ,
        _F.CONFIG,
        _F.INFLIGHT_SHMFD,
        _F.RESET_DEVICE,
        _F.INBAND_NOTIFICATIONS,
        _F.CONFIGURE_MEM_SLOTS,
        _F.STATUS,
        _F.DEVICE_STATE,
    )
)
"""What is offered. Not: what is for other devices, post-copy migration, Xen, IOTLB messages."""


class Rule(NamedTuple):
    """What holds of a message in any state."""

    payload: Struct | None
    """What it has to be as long as; None: the handler looks itself."""
    fds: tuple[int, int] = (0, 0)
    """Fewest and most."""
    needs: ProtocolFeature | None = None
    answers: bool = False
    """It has a reply of its own, for which an acknowledgement would be taken."""


RULES: dict[int, Rule] = {
    Request.GET_FEATURES: Rule(Struct(""), answers=True),
    Request.SET_FEATURES: Rule(vu.U64),
    Request.SET_OWNER: Rule(Struct("")),
    Request.RESET_OWNER: Rule(Struct("")),
    Request.SET_MEM_TABLE: Rule(None, (0, vu.TABLE_REGIONS)),
    Request.SET_LOG_BASE: Rule(vu.LOG, (1, 1), _F.LOG_SHMFD),
    Request.SET_LOG_FD: Rule(None, (1, 1)),
    Request.SET_VRING_NUM: Rule(vu.VRING_STATE),
    Request.SET_VRING_ADDR: Rule(vu.VRING_ADDR),
    Request.SET_VRING_BASE: Rule(vu.VRING_STATE),
    Request.GET_VRING_BASE: Rule(vu.VRING_STATE, answers=True),
    Request.SET_VRING_KICK: Rule(vu.U64, (0, 1)),
    Request.SET_VRING_CALL: Rule(vu.U64, (0, 1)),
    Request.SET_VRING_ERR: Rule(vu.U64, (0, 1)),
    Request.GET_PROTOCOL_FEATURES: Rule(Struct(""), answers=True),
    Request.SET_PROTOCOL_FEATURES: Rule(vu.U64),
    Request.GET_QUEUE_NUM: Rule(Struct(""), needs=_F.MQ, answers=True),
    Request.SET_VRING_ENABLE: Rule(vu.VRING_STATE),
    Request.SET_BACKEND_REQ_FD: Rule(None, (1, 1), _F.BACKEND_REQ),
    Request.GET_CONFIG: Rule(None, needs=_F.CONFIG, answers=True),
    Request.SET_CONFIG: Rule(None, needs=_F.CONFIG),
    Request.GET_INFLIGHT_FD: Rule(None, needs=_F.INFLIGHT_SHMFD, answers=True),
    Request.SET_INFLIGHT_FD: Rule(None, (1, 1), _F.INFLIGHT_SHMFD),
    Request.RESET_DEVICE: Rule(Struct(""), needs=_F.RESET_DEVICE),
    Request.VRING_KICK: Rule(vu.VRING_STATE, needs=_F.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Rule(Struct(""), needs=_F.CONFIGURE_MEM_SLOTS, answers=True),
    Request.ADD_MEM_REG: Rule(vu.SINGLE_REGION, (1, 1), _F.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Rule(vu.SINGLE_REGION, (0, 1), _F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(vu.U64, needs=_F.STATUS),
    Request.GET_STATUS: Rule(Struct(""), needs=_F.STATUS, answers=True),
    Request.SET_DEVICE_STATE_FD: Rule(vu.STATE_TRANSFER, (1, 1), _F.DEVICE_STATE, answers=True),
    Request.CHECK_DEVICE_STATE: Rule(Struct(""), needs=_F.DEVICE_STATE, answers=True),
}
