"""Errors as one line each, that cross processes; registries that find what a card registers."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llavakit
from llavakit import system
from llavakit.errors import ECHO, LONGEST_MESSAGE, RecordError, UserError
from llavakit.registry import Registry, nearest


def exceptions() -> Iterator[type[BaseException]]:
    """Every exception class that the package defines, found in its source so that only their modules are imported."""
    root = Path(llavakit.__file__).parent
    bases: dict[tuple[str, str], set[str]] = {}
    for path in root.rglob("*.py"):
        module = ".".join(("llavakit", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[module, node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    known = {name for name, value in vars(builtins).items() if inspect.isclass(value) and issubclass(value, Exception)}
    while new := {name for (_, name), own in bases.items() if own & known} - known:
        known |= new
    for (module, name), own in bases.items():
        if own & known:
            cls = getattr(importlib.import_module(module), name)
            assert issubclass(cls, Exception)
            yield cls


def test_every_exception_class_crosses_processes() -> None:
    found = list(exceptions())
    assert {"RecordError", "WriteError", "FieldError", "WorkerError"} <= {cls.__name__ for cls in found}
    for cls in found:
        own = "__init__" in {name for base in cls.__mro__ if base.__module__ != "builtins" for name in vars(base)}
        parameters = inspect.signature(cls).parameters.values() if own else []
        needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
        error = cls(*(7 if "int" in str(parameter.annotation) else "text" for parameter in needed))
        other = pickle.loads(pickle.dumps(error))
        assert type(other) is cls
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_an_error_keeps_its_fields_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(RecordError("data.json", 3, "image", "there is no file 'a.png'")))
    assert (error.file, error.line, error.field) == ("data.json", 3, "image")
    assert str(error) == "data.json:3: image: there is no file 'a.png'"


@pytest.mark.parametrize(
    "value",
    [
        repr("x" * 5000),
        repr("two words " * 500),
        str({"a": ["b", 1.5]} | {str(n): n for n in range(900)}),
        str(list(range(3000))),
        "/very/long" * 600,
    ],
)
def test_echoed_values_are_cut(value: str) -> None:
    line = str(UserError(f"data.json:1: field: must be a number, not {value}; write 5 instead"))
    assert line.startswith("data.json:1: field: must be a number, not ")
    assert line.endswith("; write 5 instead")
    assert len(line) <= ECHO + 70
    assert "…" in line


def test_messages_without_long_values_stay_as_they_are() -> None:
    wordy = "the file's third field doesn't say what kind of media it holds, " * 4
    listed = "shape [1, 2, 3], the configuration calls for [4, 5], " * 2
    for line in (f"{wordy}'image' would be right", listed, "a\nb", "täst 你好", ""):
        assert str(UserError(line)) == line
    assert len(str(UserError("a word and " * 500))) == LONGEST_MESSAGE


def test_nothing_in_a_message_commands_a_terminal_or_cannot_be_printed() -> None:
    line = str(UserError("a.json: \x1b[31mred\x07 \ud83d \x9b1m"))
    assert line == "a.json: \\x1b[31mred\\x07 \\xd83d \\x9b1m"
    line.encode()


def test_a_missing_name_loads_the_cards_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    parts = Registry("part")

    def systems() -> dict:
        calls.append(1)
        assert "of_nobody" not in parts  # a card that asks while it is loaded gets an answer, no recursion
        parts.add("of_a_card", 7)
        return {}

    monkeypatch.setattr(system, "systems", systems)
    parts.add("own", 1)
    assert parts.get("own") == 1
    assert not calls
    assert parts.get("of_a_card") == 7
    assert len(calls) == 1
    with pytest.raises(UserError, match="unknown part 'of_card'; did you mean 'of_a_card'"):
        parts.get("of_card")
    for odd in (None, ["own"], {}, 3):
        with pytest.raises(UserError, match="unknown part"):
            parts.get(odd)
        assert odd not in parts
    with pytest.raises(UserError, match="part: must be a mapping with a type, not 'own'"):
        parts.build("own")


_FRESH = """
import sys
from llavakit import registry
from llavakit.registry import ADAPTERS, ARRANGEMENTS, BENCHMARKS, CONNECTORS, ENCODERS, LAYOUTS, TEMPLATES, WORLDS

assert not {"torch", "transformers", "llavakit.system"} & set(sys.modules)
assert "dynamic_sparsification" in ADAPTERS and "m3d_clip_vision" in ENCODERS
assert "pope" in BENCHMARKS and "scene" in WORLDS and "flat" in ARRANGEMENTS
assert TEMPLATES.get("v1").name == "vicuna_v1"
assert "mlp" in set(CONNECTORS) and "dynamic-llava-classic" in list(LAYOUTS)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_registries_need_nobody_to_load_the_cards_and_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def test_long_lists_of_known_names_are_cut() -> None:
    assert nearest("zzz", [f"name_{n}" for n in range(500)]).endswith(" and others")
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("nam", ["name"]) == "; did you mean 'name'?"
