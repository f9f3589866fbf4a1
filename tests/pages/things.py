"""What the pages name and a reader has, each thing made small under the name in the page.

`thing` registers a maker under a path; `place` puts what a page names into a folder. What several pages name is made
once and copied.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from blocks import PAGES, ROOT

Maker = Callable[[Path], object]
THINGS: dict[str, Maker] = {}
"""Path as pages write it to what makes it; `PAGE#PATH` is for one page alone."""


def thing(*paths: str) -> Callable[[Maker], Maker]:
    """Register a maker; it gets the path that it shall make, whose parent is there."""

    def add(make: Maker) -> Maker:
        THINGS.update(dict.fromkeys(paths, make))
        return make

    return add


def needed(page: str) -> dict[str, Maker]:
    """Paths that a page names, with their makers; a maker for the page alone comes before one for all."""
    found: dict[str, Maker] = {}
    for name, make in sorted(THINGS.items(), key=lambda item: "#" in item[0]):
        where, _, path = name.rpartition("#")
        if where in ("", page) and re.search(rf"(?<![\w/.-]){re.escape(path)}(?![\w-])", PAGES[page]):
            found[path] = make
    return found


def place(page: str, folder: Path, made: Path) -> None:
    """Put what a page names into a folder; `made` keeps what was made for others."""
    for name in ("recipes", "examples", "scripts", "tests", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for path, make in sorted(needed(page).items()):
        copy, there = made / make.__name__ / path, folder / path
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            make(copy)
        there.parent.mkdir(parents=True, exist_ok=True)
        if copy.is_dir():
            shutil.copytree(copy, there, dirs_exist_ok=True)
        else:
            shutil.copy(copy, there)


def lines(path: Path, *rows: object) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
