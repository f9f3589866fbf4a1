"""Overrides: `dotted.key=value` from a command line, applied to a recipe before it is validated."""

from __future__ import annotations

from typing import Any

from llavakit.data.strict_yaml import YamlError, parse_yaml
from llavakit.errors import RecipeError
from llavakit.registry import nearest


def override(raw: dict[str, Any], assignment: str) -> None:
    """Apply one `dotted.key=value` to a recipe's dict form.

    Raises:
        RecipeError: If the path leads nowhere.
    """
    dotted, equals, text = assignment.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"{assignment}: not an assignment; write dotted.key=value")
    if dotted == "data.on_bad_record":  # reads well on the command line; the key is a sibling of `data`
        dotted = "on_bad_record"
    keys = dotted.split(".")
    node: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        here = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            key = _index(node, key, here)
        elif not isinstance(node, dict):
            raise RecipeError(f"{here}: {'.'.join(keys[:depth])} is a value, it has no keys")
        if last:
            node[key] = _value(text, assignment)
        elif isinstance(node, list):
            if not isinstance(node[key], (dict, list)):
                node[key] = {"path": node[key]} if keys[0] == "data" else node[key]
            node = node[key]
        else:
            if key == "train" and isinstance(node.get(key), (str, list)):
                named = [node[key]] if isinstance(node[key], str) else node[key]
                if not all(isinstance(part, str) for part in named):
                    raise RecipeError(f"{here}: its list should hold names of parts")
                node[key] = dict.fromkeys(named, True)
            if not isinstance(node.get(key), (dict, list)):
                node[key] = {}
            node = node[key]


def _value(text: str, assignment: str) -> Any:
    try:
        return parse_yaml(text) if text.strip() else None
    except YamlError as error:
        raise RecipeError(f"{assignment}: {error}") from None


def _index(items: list[Any], key: str, here: str) -> int:
    names = [str(item.get("name") or "") for item in items if isinstance(item, dict)]
    if key.isascii() and key.removeprefix("-").isdigit() and len(key) < 10:
        if not -len(items) <= int(key) < len(items):
            raise RecipeError(f"{here}: there are {len(items)}, numbered from 0")
        return int(key)
    if key in names:
        return next(n for n, item in enumerate(items) if isinstance(item, dict) and item.get("name") == key)
    raise RecipeError(f"{here}: no item is called {key!r}{nearest(key, [name for name in names if name])}")
