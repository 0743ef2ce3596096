"""Rules for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.peers import PEERS_REQUIRED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[object]:
    """Where the peers are required, a skipped test is a failed one."""
    report = yield
    if PEERS_REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"PYVIRTIO_REQUIRE_PEERS is set, and this was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[object]:
    """The same for a module that skips itself whole."""
    report = yield
    if PEERS_REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"PYVIRTIO_REQUIRE_PEERS is set, and this was skipped: {report.longrepr}"
    return report
