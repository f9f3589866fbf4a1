"""The published systems for people: what each is, and which of its parts are really there.

Works on system cards alone; nothing that a card names is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.system import System

if TYPE_CHECKING:
    from rich.table import Table

OFFERS = ("parity", "cost", "miniature", "recipe", "checkpoint")


def offers(system: System) -> dict[str, bool]:
    """For each of `OFFERS`, whether the file or module that the card names exists."""

    def there(target: str | Path | None) -> bool:
        if isinstance(target, Path):
            return target.exists()
        return target is not None and find_spec(target.partition(":")[0]) is not None

    return {name: there(getattr(system, name)) for name in OFFERS}


def facts(system: System) -> dict[str, Any]:
    """Everything on a card, JSON-able."""
    return {
        "slug": system.slug,
        "title": system.title,
        "paper": system.paper,
        "summary": system.summary,
        "claims": [f"{claim.text} ({claim.source})" for claim in system.claims],
        "checkpoints": list(system.checkpoints),
        "parts": [f"{kind}: {', '.join(sorted(names))}" for kind, names in system.parts.items()],
        "recipe": str(system.recipe) if system.recipe else None,
        "readme": str(system.readme) if system.readme else None,
        "works": offers(system),
    }


def table(systems: Sequence[System]) -> Table:
    """One row per system."""
    from rich.table import Table

    out = Table("system", "title", "paper", *OFFERS)
    for system in systems:
        works = ("yes" if there else "-" for there in offers(system).values())
        out.add_row(system.slug, system.title, f"arXiv:{system.paper}" if system.paper else "-", *works)
    return out


def page(system: System) -> str:
    """All about one system as lines of text."""
    shown = facts(system)
    shown["works"] = ", ".join(name for name, there in shown["works"].items() if there)
    return "\n".join(
        f"{name:12}{line}"
        for name, value in shown.items()
        for line in (value if isinstance(value, list) else [value or "-"])
    )
