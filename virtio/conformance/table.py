"""Several runs side by side, as a Markdown page: ``table NAME=MATRIX.json … --title TEXT``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .report import RESULTS
from .requirements import UNTESTABLE, load_requirements

__all__ = ["page"]

_MARKS = {"pass": "yes", "fail": "**no**", "not testable": "", "not reached": ""}


def page(title: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """The page for runs by name, each the ``requirements`` of its JSON."""
    results = {name: {row["id"]: row for row in rows} for name, rows in runs.items()}
    lines = [f"# {title}", "", "| | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for result in RESULTS:
        cells = []
        for rows in results.values():
            count = Counter(
                row["level"].startswith("MUST") for row in rows.values() if row["result"] == result
            )
            cells.append(f"{count[True]} + {count[False]}")
        lines.append(f"| {result} | " + " | ".join(cells) + " |")
    lines += ["", "MUST and MUST NOT + SHOULD and SHOULD NOT. An empty cell: not reached there."]
    group = ""
    for ident, rule in load_requirements().items():
        if rule.group != group:
            group = rule.group
            lines += ["", f"## {group}", "", "| Rule | Level | | " + " | ".join(runs) + " |"]
            lines.append("|---" * (len(runs) + 3) + "|")
        if ident in UNTESTABLE:
            cells = [f"not testable: {UNTESTABLE[ident]}"] + [""] * (len(runs) - 1)
        else:
            cells = [_MARKS[rows[ident]["result"]] for rows in results.values()]
        text = rule.text.replace("|", "\\|")
        lines.append(f"| {ident} | {rule.level} | {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=MATRIX.json")
    parser.add_argument("--title", default="Conformance")
    arguments = parser.parse_args()
    runs = {}
    for each in arguments.runs:
        name, _, path = each.partition("=")
        runs[name] = json.loads(Path(path).read_text(encoding="utf-8"))["requirements"]
    print(page(arguments.title, runs), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
