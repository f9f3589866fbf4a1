"""Results of attacks for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(result: Mapping[str, Any]) -> Table:
    """Clean and attacked scores side by side, with their 95 % intervals."""
    from rich.table import Table

    title = f"{result['task']}, {result['pictures']} pictures, eps {result['eps']} ({result['norm']})"
    found = Table("", title=title, caption=f"{result['unit']}; pages in {result['folder']}")
    for name in ("clean", "attacked"):
        found.add_column(name, justify="right")
    rows = {result["task"]: result, "not refused": result.get("not_refused")}
    for name, row in rows.items():
        if row is not None:
            found.add_row(name, _cell(row["clean"]), _cell(row["attacked"]))
    return found


def _cell(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{value['mean']:.1f} ({low:.1f} to {high:.1f})"
