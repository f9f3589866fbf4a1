"""Paths of data files, which may ask for a part of the file: `data.json#500`, `data.json#random:10%`."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PART = re.compile(r"#(all|(?:(?:first|end|random):)?[\d.]+%?)$")


def split_part(path: str | Path) -> tuple[str, str]:
    """A path without the part of the file that it asks for, and that part as a sampling strategy ("" for none).

    A `#` that no part follows belongs to the name, and so does every `#` of a path that exists.
    """
    name = str(path)
    found = None if os.path.lexists(name) else _PART.search(name)
    if found is None:
        return name, ""
    part = found[1]
    return name[: found.start()], part if ":" in part or part == "all" else f"first:{part}"
