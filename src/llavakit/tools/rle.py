"""Masks as run lengths, in COCO's compressed form: `{"size": [height, width], "counts": TEXT}`, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llavakit.errors import UserError, quoted

_MOST_PIXELS = 2**28


def encode_mask(mask: Any) -> dict[str, Any]:
    """A mask [height, width] as `{"size", "counts"}`; whatever is not zero counts as inside.

    Raises:
        UserError: If it is no matrix.
    """
    array = np.asarray(mask)
    if array.ndim != 2:
        raise UserError(f"mask: must be a matrix [height, width], not of shape {list(array.shape)}")
    flat = (array != 0).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False)) if flat.size else np.zeros(0, int)
    runs = np.diff([0, *edges.tolist(), flat.size]).tolist()
    return {"size": [int(array.shape[0]), int(array.shape[1])], "counts": _to_text(runs)}


def decode_mask(value: Any, where: str = "mask") -> np.ndarray:
    """The mask bool [height, width] of `{"size", "counts"}`; counts are text, bytes, or a list of run lengths.

    Raises:
        UserError: If it is something else, or the runs cover more than the mask. What they leave is outside.
    """
    size = value.get("size") if isinstance(value, Mapping) else None
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(n) is int and n >= 0 for n in size):
        raise UserError(f"{where}: must be {{'size': [height, width], 'counts': ...}}, not {quoted(value)}")
    height, width = size
    if height * width > _MOST_PIXELS:
        raise UserError(f"{where}: {height} x {width} is larger than a mask may be")
    counts = value.get("counts")
    if isinstance(counts, (bytes, bytearray)):
        counts = counts.decode("ascii", "replace")
    runs = _from_text(counts, where) if isinstance(counts, str) else counts
    if not isinstance(runs, Sequence) or not all(type(run) is int and run >= 0 for run in runs):
        raise UserError(f"{where}.counts: must be COCO's compressed text or a list of run lengths")
    if sum(runs) > height * width:
        raise UserError(f"{where}.counts: the runs cover {sum(runs)} pixels, the mask has {height * width}")
    runs = [*runs, *([0] if len(runs) % 2 else []), height * width - sum(runs)]
    inside = np.arange(len(runs)) % 2 == 1
    inside[-1] = False
    return np.repeat(inside, np.asarray(runs, np.int64)).reshape((height, width), order="F")


def _to_text(runs: Sequence[int]) -> str:
    """COCO's text: differences to the run before the last, in base 32 with a continuation bit, from letter 48 on."""
    text = []
    for place, run in enumerate(runs):
        left = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            digit, left = left & 0x1F, left >> 5
            more = left != (-1 if digit & 0x10 else 0)
            text.append(chr((digit | 0x20 if more else digit) + 48))
    return "".join(text)


def _from_text(text: str, where: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            raise UserError(f"{where}.counts: {quoted(letter)} is not part of COCO's compressed form")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise UserError(f"{where}.counts: ends inside a number")
    return runs
