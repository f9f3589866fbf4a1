"""JSON from files, lines and requests: one reader for all of llavakit.

Python's `json` accepts what no writer means (a key twice, NaN, half a surrogate pair), and raises exceptions of many
classes for what it does not accept (`RecursionError` for deep nesting, `ValueError` for long integers). Here all of it
is a `JsonError` of one line.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llavakit.errors import UserError, quoted

MAX_DEPTH = 64  # levels of lists and objects; real files need about 10
MAX_BYTES = 1 << 28  # of a whole file that `read_json` takes


class JsonError(UserError):
    """Text that is not the JSON it should be; the message says what is wrong, and the caller adds where."""


def parse_json(text: str | bytes, *, unique: bool = True, finite: bool = True, max_depth: int = MAX_DEPTH) -> Any:
    """The value that a JSON text holds.

    Args:
        text: Text, or UTF-8 bytes with or without a byte order mark.
        unique: Refuse an object that has a key twice.
        finite: Refuse NaN, Infinity and numbers too large for a float.
        max_depth: Deepest nesting of lists and objects.

    Raises:
        JsonError: In one line, without the name of the file.
    """
    try:
        if isinstance(text, (bytes, bytearray, memoryview)):
            text = bytes(text).decode("utf-8-sig")
        else:
            text = text.removeprefix("\ufeff")
        value = json.loads(
            text,
            object_pairs_hook=_unique if unique else None,
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite if finite else None,
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})") from None
    except RecursionError:
        raise JsonError(f"nested too deeply; at most {max_depth} levels are read") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON ({error})") from None
    except JsonError:
        raise
    except ValueError:  # integers of more than 4,300 digits
        raise JsonError("holds an integer of thousands of digits") from None
    surrogates = "\\ud" in text or "\\uD" in text
    if surrogates or text.count("[") + text.count("{") > max_depth:
        _walk(value, max_depth, surrogates)
    return value


def read_json(
    path: str | Path,
    *,
    kind: type | None = None,
    error: type[UserError] = UserError,
    max_bytes: int = MAX_BYTES,
    **options: bool | int,
) -> Any:
    """The value of a JSON file.

    Args:
        path: The file.
        kind: Refuse values of another type (`dict`, `list`).
        error: Class of the exception.
        max_bytes: Refuse larger files before they are read.
        options: See `parse_json`.

    Raises:
        UserError: Of the class `error`, in one line that names the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise error(f"{path}: is not a file")
        if size > max_bytes:
            raise error(f"{path}: has {size} bytes, at most {max_bytes} are read")
        value = parse_json(path.read_bytes(), **options)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as refused:
        raise error(f"{path}: cannot be read ({refused.strerror or refused})") from None
    except JsonError as problem:
        raise error(f"{path}: {problem}") from None
    if kind is not None and not isinstance(value, kind):
        names = {dict: "one object", list: "a list"}
        raise error(f"{path}: holds {type_name(value)}, it should hold {names.get(kind, kind.__name__)}")
    return value


def type_name(value: Any) -> str:
    """JSON's word for the type of a value, with its article."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JsonError(f"has the key {quoted(twice)} twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise JsonError(f"holds {name}, which is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise JsonError(f"holds the number {digits[:40]}, which is too large")
    return number


def _walk(value: Any, max_depth: int, surrogates: bool) -> None:
    """Refuse deep nesting and, if asked, strings that no UTF-8 text can hold."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                if surrogates:
                    below.extend(item)
            elif isinstance(item, list):
                below.extend(item)
            elif surrogates and isinstance(item, str) and not _encodable(item):
                raise JsonError(f"holds half a surrogate pair in the string {ascii(item)[:200]}")
        depth += any(isinstance(item, (dict, list)) for item in below)
        if depth >= max_depth and any(isinstance(item, (dict, list)) for item in below):
            raise JsonError(f"nested too deeply; at most {max_depth} levels are read")
        level = below


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
