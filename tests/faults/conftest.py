"""The fixture `faults` and the table at the end; see harness.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Counts, Faults

HERE = Path(__file__).parent
TABLE: dict[str, Counts] = {}


@pytest.fixture
def faults() -> Faults:
    """See harness.py."""
    return Faults(TABLE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """After the test's own assertions: whether an attempt failed."""
    result = yield
    found = getattr(item, "funcargs", {}).get("faults")
    if isinstance(found, Faults):
        found.check()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the marker `faults`."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("faults")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of the session."""
    if not TABLE:
        return
    rows = [("kind of input", "tried", "accepted", "one-line errors", "tracebacks", "CPU s")]
    total = Counts()
    for kind, counts in sorted(TABLE.items()):
        rows.append(_row(kind, counts))
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
    rows.append(_row("all", total))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    terminalreporter.section("malformed inputs; tracebacks must be 0")
    for row in rows:
        name, *numbers = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        terminalreporter.line("  ".join((row[0].ljust(len(name)), *numbers)))


def _row(kind: str, counts: Counts) -> tuple[str, ...]:
    numbers = (counts.tried, counts.accepted, counts.refused, counts.tracebacks)
    return (kind, *map(str, numbers), f"{counts.seconds:.1f}")
