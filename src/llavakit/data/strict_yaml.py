"""YAML from files and command lines: one reader for recipes, lists of data and assignments.

PyYAML raises exceptions of several classes for what it does not accept (`ValueError` for the 31st of February,
`RecursionError` for deep nesting), and builds values that repeat one small list a million times (aliases of
aliases). Here all of it is a `YamlError` of one line.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from llavakit.data.strict_json import MAX_DEPTH
from llavakit.errors import UserError

MAX_VALUES = 1_000_000  # values of a document, every use of an alias counted


class YamlError(UserError):
    """Text that is not YAML; the message says what is wrong, and the caller adds where.

    Attributes:
        line: Line of the problem, counted from 1, if it is known.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(f"not valid YAML ({problem})")
        self.line = line


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for number, key in enumerate(own) if key in own[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text because it has no dot; everybody who writes a recipe means a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; `1e-3` is a number.

    Raises:
        YamlError: In one line, without the name of the file.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise YamlError(problem, mark.line + 1 if mark is not None else None) from None
    except RecursionError:
        raise YamlError(f"nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # dates, numbers, keys
        raise YamlError(" ".join(str(error).split())) from None
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MAX_DEPTH:
            raise YamlError(f"nested too deeply; at most {MAX_DEPTH} levels are read")
        if count > MAX_VALUES:
            raise YamlError(f"holds more than {MAX_VALUES} values")
        level = [
            item
            for holder in level
            if isinstance(holder, (dict, list))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
