"""Paths of data files, which may ask for a part of the file (`data.json#500`) or name many (`{000..123}.tar`)."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PART = re.compile(r"#(all|(?:(?:first|end|random):)?[\d.]+%?)$")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_STREAMED = (".tar", ".tar.gz", ".tgz", ".parquet")
HUB = "hf://"
MOST_SHARDS = 1_000_000


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


def is_stream(path: object) -> bool:
    """Whether a path names shards that are read from front to back: tar or Parquet files, or `hf://NAME`."""
    return isinstance(path, (str, Path)) and (
        str(path).startswith(HUB) or split_part(path)[0].lower().endswith(_STREAMED)
    )


def expand(path: str) -> list[str]:
    """The files that a path with `{000..123}`, `{a,b}`, `*`, `?` or `[...]` names, in order; a file is itself.

    Raises:
        ValueError: If a range runs backwards or names too many files.
    """
    if os.path.lexists(path):
        return [path]
    names = list(_expand_braces(path))
    return [file for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def _expand_braces(path: str) -> Iterator[str]:
    braces = _BRACES.search(path)
    if braces is None:
        yield path
        return
    numbers = _RANGE.fullmatch(braces[1])
    if numbers is None:
        choices = [choice.strip() for choice in braces[1].split(",")]
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise ValueError(f"{braces[0]}: must run from a number to a larger one, over at most {MOST_SHARDS} files")
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    for choice in choices:
        yield from _expand_braces(path[: braces.start()] + choice + path[braces.end() :])
