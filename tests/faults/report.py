"""`python -m tests.faults.report`: run every fault case, print the table, write `docs/reliability.md`."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import AREAS, Case

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
MARKER = "<!-- everything below is written by `python -m tests.faults.report`: do not edit -->"


class Collector:
    """A pytest plugin that keeps what became of every case."""

    def __init__(self) -> None:
        self.results: dict[Case, str] = {}
        self.without_case: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.without_case = [item.nodeid for item in items if not hasattr(item.function, "fault_case")]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        if (found := getattr(item.function, "fault_case", None)) and (report.when == "call" or not report.passed):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            key = Case(found.area, found.fault.format(**parameters), found.promise)
            result = {"passed": "holds", "skipped": "not run"}.get(report.outcome, "**broken**")
            self.results[key] = result if self.results.get(key, "holds") == "holds" else self.results[key]
        return report


def table(results: dict[Case, str]) -> str:
    """Markdown, one section an area."""
    holding = sum(result == "holds" for result in results.values())
    lines = [f"{len(results)} cases, {holding} hold ({datetime.date.today().isoformat()}).", ""]
    for area in AREAS:
        rows = sorted((case.fault, case.promise, result) for case, result in results.items() if case.area == area)
        if rows:
            lines += [f"## {area.capitalize()}: {len(rows)}", "", "| fault | promise | result |", "| --- | --- | --- |"]
            lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def main() -> int:
    """Returns pytest's exit status."""
    collector = Collector()
    status = pytest.main([str(ROOT / "tests" / "faults"), "-q", *sys.argv[1:]], plugins=[collector])
    text = table(collector.results)
    head = DOCUMENT.read_text(encoding="utf-8").partition(MARKER)[0] if DOCUMENT.exists() else "# Reliability\n\n"
    DOCUMENT.write_text(f"{head.rstrip()}\n\n{MARKER}\n\n{text.rstrip()}\n", encoding="utf-8")
    print(text)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
