"""From the outcomes of tests to the matrix of requirements: text, JSON, HTML."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .plugin import RULES, Rules
from .requirements import UNTESTABLE, Requirement, load_requirements

__all__ = ["RESULTS", "Matrix", "Recorder", "Row"]

RESULTS = ("pass", "fail", "not testable", "not reached")


@dataclass(slots=True)
class Row:
    """One requirement and what came of it."""

    requirement: Requirement
    passed: list[str] = field(default_factory=list)
    """The tests that have shown it."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """The tests that have shown the contrary, with what they say."""
    missed: list[str] = field(default_factory=list)
    """Why tests could not be done."""

    @property
    def result(self) -> str:
        """One of :data:`RESULTS`."""
        if self.failed:
            return "fail"
        if self.passed:
            return "pass"
        return "not testable" if self.requirement.ident in UNTESTABLE else "not reached"

    @property
    def reason(self) -> str:
        """Why, if it is not passed."""
        if self.failed:
            return "; ".join(f"{test}: {text}" for test, text in self.failed)
        if self.passed:
            return ""
        ident = self.requirement.ident
        if ident in UNTESTABLE:
            return UNTESTABLE[ident]
        return "; ".join(dict.fromkeys(self.missed)) or "no test of this run shows it"


class Matrix:
    """All requirements of a run on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows = {ident: Row(each) for ident, each in load_requirements().items()}

    def counts(self) -> Iterator[tuple[str, bool, Counter[str]]]:
        """(chapter, whether binding, how many of each result)."""
        for group in dict.fromkeys(row.requirement.group for row in self.rows.values()):
            for binding in (True, False):
                yield (
                    group,
                    binding,
                    Counter(
                        row.result
                        for row in self.rows.values()
                        if (row.requirement.group, row.requirement.binding) == (group, binding)
                    ),
                )

    def summary(self) -> Iterator[str]:
        """A line for each chapter, MUSTs and SHOULDs apart."""
        yield f"{'':28}" + "".join(f"{name:>14}" for name in RESULTS)
        for group, binding, count in self.counts():
            name = f"{group}, {'MUST' if binding else 'SHOULD'}"
            yield f"{name:28}" + "".join(f"{count[result] or '-':>14}" for result in RESULTS)

    def text(self) -> str:
        """The whole matrix."""
        lines = [f"virtio conformance of {self.device}", "", *self.summary(), ""]
        for row in self.rows.values():
            rule = row.requirement
            lines.append(f"{rule.ident:9} {rule.level:11} {row.result:13} {rule.text}")
            if row.reason:
                lines.append(f"{'':35}{row.reason}")
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """The same for programs."""
        rows = [
            {
                "id": row.requirement.ident,
                "level": row.requirement.level,
                "section": row.requirement.section,
                "text": row.requirement.text,
                "result": row.result,
                "reason": row.reason,
                "tests": row.passed + [test for test, _ in row.failed],
            }
            for row in self.rows.values()
        ]
        return json.dumps({"device": self.device, "requirements": rows}, indent=1) + "\n"

    def html(self) -> str:
        """The same as a page of its own."""
        return _PAGE.format(
            device=html.escape(self.device),
            summary=html.escape("\n".join(self.summary())),
            rows="\n".join(_html_row(row) for row in self.rows.values()),
        )

    def write(self, prefix: str) -> None:
        """All three forms."""
        for suffix, text in (("txt", self.text()), ("json", self.json()), ("html", self.html())):
            Path(f"{prefix}.{suffix}").write_text(text, encoding="utf-8")


class Recorder:
    """Notes the outcome of every test of the suite for the requirements that it shows."""

    def __init__(self, device: str, config: pytest.Config) -> None:
        self.matrix = Matrix(device)
        self._prefix: str | None = config.getoption("--matrix")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        marker = item.get_closest_marker("shows")
        if marker is not None and report.when != "teardown":
            self._note(item, set(marker.args), report)
        return report

    def _note(self, item: pytest.Item, idents: set[str], report: pytest.TestReport) -> None:
        rules = item.stash.get(RULES, Rules())
        reason = ""
        failed: set[str] = set()
        shown = rules.shown & idents
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
            reason = reason.removeprefix("Skipped: ")
        elif report.when == "setup":
            if report.passed:
                return
            reason = f"{item.name} could not begin: {_last_line(report)}"
        elif report.failed:
            failed = rules.broken or idents - shown
            reason = f"{item.name} has failed before"
        else:
            shown = idents
        for ident in idents:
            row = self.matrix.rows[ident]
            if ident in failed:
                row.failed.append((item.name, _last_line(report)))
            elif ident in shown:
                row.passed.append(item.name)
            else:
                row.missed.append(reason)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The matrix, what is passed only in numbers."""
        matrix = self.matrix
        terminalreporter.section(f"virtio conformance of {matrix.device}")
        for line in matrix.summary():
            terminalreporter.line(line)
        for row in matrix.rows.values():
            rule = row.requirement
            if row.result == "fail" or terminalreporter.verbosity > 0:
                terminalreporter.line(f"{rule.ident:9} {rule.level:11} {row.result}: {rule.text}")
                if row.reason:
                    terminalreporter.line(f"{'':10}{row.reason}")
        if self._prefix is not None:
            matrix.write(self._prefix)
            terminalreporter.line(f"written to {self._prefix}.txt, .json and .html")


def _last_line(report: pytest.TestReport) -> str:
    """What a failure says, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else str(crash.message)
    return " ".join(text.split())[:300]


def _html_row(row: Row) -> str:
    rule = row.requirement
    cells = (rule.ident, rule.level, row.result, rule.section, rule.text, row.reason)
    kind = row.result.replace(" ", "-") + ("" if rule.binding else " should")
    return f'<tr class="{kind}">' + "".join(f"<td>{html.escape(each)}</td>" for each in cells)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>virtio conformance of {device}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-top: 1px solid #8884; padding: .3em .6em }}
td, th {{ text-align: left; vertical-align: top }}
td:nth-child(-n+3) {{ white-space: nowrap }}
.pass td:nth-child(3) {{ color: #17803d }}
.fail td:nth-child(3) {{ color: #c01c28; font-weight: 700 }}
.not-reached td, .not-testable td {{ opacity: .65 }}
</style>
<h1>virtio conformance of {device}</h1>
<pre>{summary}</pre>
<table><tr><th>Id<th>Level<th>Result<th>Section<th>Rule<th>Why
{rows}
</table></html>
"""
