"""The events of a session and what each of them may say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llavakit.errors import UserError, quoted
from llavakit.tools.skill import BOX, POINT
from llavakit.tools.toolbox import mismatch

MOST_BOXES = 30  # as many as the published generator takes
FAR = 100_000  # pixels; a longer drag is a mistake
_TEXT = {"type": "string", "maxLength": 4000}
_SEED = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31 - 1}
_DILATION = {"type": ["integer", "null"], "maximum": 1000}
_OBJECT = {"type": "integer"}
_DRAG = {"type": "integer", "minimum": -FAR, "maximum": FAR}
_BOXES = {
    "type": "array",
    "maxItems": MOST_BOXES,
    "items": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
}
_PHRASES = {"type": "array", "items": _TEXT, "maxItems": MOST_BOXES}
_DRAWN = {"prompt": _TEXT, "boxes": _BOXES, "phrases": _PHRASES, "seed": _SEED}


def _or_none(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


EVENTS: dict[str, dict[str, Any]] = {
    "upload": {"image": {}},
    "segment": {
        "stroke": _or_none({"type": "array", "items": POINT, "minItems": 1, "maxItems": 2000}),
        "box": _or_none(BOX),
        "points": _or_none({"type": "array", "items": POINT, "minItems": 1, "maxItems": 200}),
        "point_labels": _or_none({"type": "array", "items": {"enum": [0, 1]}}),
        "mask": {},
        "text": _or_none(_TEXT),
        "pick": {"type": "integer"},
        "dilation": _DILATION,
    },
    "move": {"object": _OBJECT, "dx": _DRAG, "dy": _DRAG},
    "dilate": {"dilation": _DILATION},
    "generate": {"text": _TEXT, "seed": _SEED},
    "remove": {"object": _OBJECT},
    "insert": _DRAWN,
    "create": _DRAWN,
    "chat": {"text": _TEXT},
    "undo": {},
    "redo": {},
    "show": {"version": {"type": "integer"}},
}
_OPAQUE = ("image", "mask")  # pictures and masks, which those who read them check


def checked(event: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What an event is, and what it says, as plain JSON but for pictures and masks.

    Raises:
        UserError: If it is unknown, or says something else than it may.
    """
    op = event.get("op")
    if not isinstance(op, str) or op not in EVENTS:
        raise UserError(f"op: must be one of {', '.join(EVENTS)}, not {quoted(op)}")
    given = {name: value for name, value in event.items() if name not in ("op", "t")}
    for name in given:
        if name not in EVENTS[op]:
            raise UserError(f"{op}: has no {quoted(name)}; it takes {', '.join(sorted(EVENTS[op])) or 'nothing'}")
    said = {name: value for name, value in given.items() if name not in _OPAQUE}
    try:
        said = json.loads(json.dumps(said, default=_plain, allow_nan=False))
    except (TypeError, ValueError):
        raise UserError(f"{op}: may say only texts, finite numbers and lists of them") from None
    problem = mismatch(said, {"type": "object", "properties": EVENTS[op]})
    if problem is not None:
        raise UserError(f"{op}: {problem}")
    return op, said | {name: given[name] for name in _OPAQUE if name in given}


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError
