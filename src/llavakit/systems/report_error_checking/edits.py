"""Edits with provenance: applied to a report and taken back, byte for byte; choices that depend on the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from llavakit.errors import FieldError, UserError, quoted


def pick(seed: int | str, report_id: str, op: str, tag: int | str, count: int) -> int:
    """A number below `count` that follows from the other arguments: no state, the same on every machine.

    The first eight bytes, big endian, of SHA-256 of `seed|report_id|op|tag`, modulo `count`.

    Raises:
        UserError: If there is nothing to choose from.
    """
    if count < 1:
        raise UserError(f"{op}: there is nothing to choose from (count {count})")
    return rank(seed, report_id, op, tag) % count


def rank(*parts: int | str) -> int:
    """A 64-bit number that follows from the parts."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def apply(text: str, edits: Iterable[Mapping[str, Any]]) -> str:
    """The text with every edit made.

    Args:
        text: What the spans of the edits refer to.
        edits: `start`, `end`, `original` and `replacement`, in any order; insertions at one place are made in the
            order in which they are given.

    Raises:
        FieldError: If spans overlap or do not hold the text that an edit says.
    """
    pieces, position = [], 0
    for edit in _in_order(text, edits):
        pieces += [text[position : edit["start"]], edit["replacement"]]
        position = edit["end"]
    return "".join(pieces) + text[position:]


def revert(text: str, edits: Iterable[Mapping[str, Any]]) -> str:
    """The text before the edits were made.

    Args:
        text: What `apply` gave.
        edits: The same edits, with spans in the text before.

    Raises:
        FieldError: If the text is not what the edits made.
    """
    pieces, position, shift = [], 0, 0
    for number, edit in enumerate(sorted(edits, key=_place)):
        begin = edit["start"] + shift
        end = begin + len(edit["replacement"])
        if begin < position or text[begin:end] != edit["replacement"]:
            raise FieldError(f"edits.{number}.replacement", f"{quoted(edit['replacement'])} is not in the text there")
        pieces += [text[position:begin], edit["original"]]
        position = end
        shift += len(edit["replacement"]) - len(edit["original"])
    return "".join(pieces) + text[position:]


def _place(edit: Mapping[str, Any]) -> tuple[int, int]:
    return edit["start"], edit["end"]


def _in_order(text: str, edits: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The edits from left to right, checked."""
    found = list(edits)
    position = 0
    for number, edit in sorted(enumerate(found), key=lambda one: _place(one[1])):
        start, end = _place(edit)
        if not 0 <= start <= end <= len(text):
            raise FieldError(f"edits.{number}", f"its span {start} to {end} is outside the text of {len(text)}")
        if start < position:
            raise FieldError(f"edits.{number}", "its span overlaps that of another edit")
        if text[start:end] != edit["original"]:
            said = f"the text there is {quoted(text[start:end])}, not {quoted(edit['original'])}"
            raise FieldError(f"edits.{number}.original", said)
        position = end
    return sorted(found, key=_place)
