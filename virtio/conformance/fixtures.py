"""The fixtures of the suite; registered with pytest when there is a device to be tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .. import layout as at
from .bench import Bench
from .device import CannotMakeError, find_maker, make
from .plugin import RULES, Rules

__all__ = ["bench", "make_bench", "maker", "packed", "rule", "split"]


@pytest.fixture(scope="session")
def maker(request: pytest.FixtureRequest) -> Any:
    """The function that makes devices."""
    return find_maker(request.config.getoption("--device"))


@pytest.fixture
def make_bench(maker: Any) -> Iterator[Callable[..., Bench]]:
    """``make_bench(**wishes)``: a bench with a device of its own, or the test is skipped."""
    with ExitStack() as stack:

        def build(**wishes: Any) -> Bench:
            try:
                device = make(maker, wishes)
            except CannotMakeError as error:
                pytest.skip(str(error))
            stack.callback(device.close)
            return Bench(device)

        yield build


@pytest.fixture
def split(make_bench: Any) -> Any:
    """A bench whose drivers use split queues."""
    return make_bench()


@pytest.fixture
def packed(make_bench: Any) -> Any:
    """A bench whose drivers use packed queues."""
    found = make_bench()
    found.need_modern()
    found.need(at.VIRTIO_F_RING_PACKED, "packed queues")
    found.packed = True
    return found


@pytest.fixture(params=["split", "packed"])
def bench(request: pytest.FixtureRequest) -> Any:
    """A bench for tests that are about any queue: each is done with both kinds."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def rule(request: pytest.FixtureRequest) -> Rules:
    """See :class:`Rules`."""
    rules = Rules()
    request.node.stash[RULES] = rules
    return rules
