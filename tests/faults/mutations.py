"""Malformed inputs from a seed: bytes of a file with some damage, JSON values with something odd in them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

LONE_SURROGATE = "\ud83d"


def nested(depth: int, inner: Any = 1) -> Any:
    """Lists in lists, `depth` deep."""
    for _ in range(depth):
        inner = [inner]
    return inner


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "\n", "0", "true", "null", LONE_SURROGATE, "é" * 7, "x" * 5000, "../..", "/", "a:b", "#", "{}"),
    *([], [[]], [None], ["a", 1], {}, {"a": {}}, {"": None}, {"type": []}, [{}], nested(60)),
)
"""Values that a field is rarely meant to have."""


def scramble(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file with one to three kinds of damage: cut, flipped, overwritten, inserted, doubled, zeroed."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        length = len(out)
        if not length:
            return bytes(out)
        place = rng.randrange(length)
        # headers decide most, so half of the damage is done near the beginning
        place = rng.randrange(min(length, 256)) if rng.random() < 0.5 else place
        span = rng.choice((1, 1, 2, 4, 16, 64))
        match rng.randrange(7):
            case 0:
                del out[place:]
            case 1:
                out[place] ^= 1 << rng.randrange(8)
            case 2:
                out[place : place + span] = rng.randbytes(span)
            case 3:
                out[place:place] = rng.randbytes(span)
            case 4:
                out[place:place] = out[place : place + 16 * span]
            case 5:
                out[place : place + span] = bytes(rng.choice((b"\0", b"\xff"))) * span
            case 6:
                del out[place : place + span]
    return bytes(out)


def twist(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one to three entries are odd, gone, doubled or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holders = list(_places(value))
        if not holders:
            return rng.choice(ODD)
        holder, key = rng.choice(holders)
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(ODD))
            case 3:
                del holder[key]
            case 4:
                holder[key] = [holder[key], holder[key]] if rng.random() < 0.5 else {"value": holder[key]}
            case 5 if isinstance(holder, dict):
                holder[rng.choice(("x", "type", "", str(key) + "s"))] = copy.deepcopy(rng.choice(ODD))
            case 5:
                holder.insert(key, copy.deepcopy(rng.choice(ODD)))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a nested value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def json_text(value: Any) -> str:
    """JSON that says exactly what the value holds, lone surrogates and NaN too."""
    return json.dumps(value, ensure_ascii=True)


def scrambled_json(value: Any, rng: random.Random) -> bytes:
    """A JSON text that is odd in structure, in its bytes, or in both."""
    text = json_text(twist(value, rng) if rng.random() < 0.7 else value).encode()
    return scramble(text, rng) if rng.random() < 0.4 else text
