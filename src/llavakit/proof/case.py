"""A golden case as an adapter sees it: configuration, inputs, weights, and what outputs are wanted; never their values.

A case is a folder with `case.json` (system, component, config, tolerance), inputs in `inputs.json` and
`inputs.safetensors`, weights under their original names in `weights.safetensors`, and the expected results in
`outputs.json` and `outputs.safetensors`; each file is optional.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from llavakit.errors import UserError

_SHIPPED = Path(__file__).parents[3] / "tests" / "golden"  # exists in a source checkout only


class Tracked(dict):
    """A mapping that remembers which of its keys were read.

    An adapter must read every key of a case's configuration and inputs; what is left unread fails the case, because
    an adapter that overlooks an option proves nothing about it. `items`, `values` and `**` read every key, but not
    those of mappings inside.
    """

    def __init__(self, items: Mapping[str, Any] | Sequence[tuple[str, Any]] = (), where: str = "") -> None:
        super().__init__()
        self.where = where
        self.read: set[str] = set()
        for key, value in dict(items).items():
            super().__setitem__(key, tracked(value, f"{where}.{key}" if where else key))

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:  # overridden so that `dict(x)` and `**x` call `__getitem__`
        return super().__iter__()

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __or__(self, other: Any) -> dict[str, Any]:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> dict[str, Any]:
        return dict(other) | self.copy()

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    def unread(self) -> list[str]:
        """Dotted names of the keys that were not read, also those of nested mappings."""
        names = []
        for key, value in super().items():
            if key not in self.read:
                names.append(f"{self.where}.{key}" if self.where else key)
            else:
                names += unread(value)
        return names


def tracked(value: Any, where: str = "") -> Any:
    """`value` with every mapping in it replaced by a `Tracked` one."""
    if isinstance(value, Mapping):
        return Tracked(value, where)
    if isinstance(value, list):
        return [tracked(item, f"{where}.{index}") for index, item in enumerate(value)]
    return value


def unread(value: Any) -> list[str]:
    """Dotted names of all keys inside `value` that were not read."""
    if isinstance(value, Tracked):
        return value.unread()
    if isinstance(value, list):
        return [name for item in value for name in unread(item)]
    return []


def take(value: Any) -> Any:
    """`value` as plain mappings and lists, all of it read: for a part of the product that refuses unknown keys itself.

    The tracked original counts as read too.
    """
    if isinstance(value, Mapping):
        return {key: take(item) for key, item in value.items()}
    return [take(item) for item in value] if isinstance(value, list) else value


class TensorSpec(NamedTuple):
    """What is known of a wanted tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Wanted:
    """Names and shapes of the expected outputs, without their values.

    Attributes:
        tensors: Shape and type by tensor name.
        json: The structure of `outputs.json`: its keys and the lengths of its lists, with None for every value, except
            for values at the adapter's `echoes`. Empty if there is no such file.
    """

    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    json: Any = field(default_factory=dict)


def outline(value: Any, echoes: Sequence[str] = (), path: str = "") -> Any:
    """The keys and list lengths of a JSON value; None for every value whose dotted path matches none of `echoes`."""
    if path and matches(path, echoes):
        return value
    inner = f"{path}." if path else ""
    if isinstance(value, dict):
        return {key: outline(item, echoes, f"{inner}{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [outline(item, echoes, f"{inner}{index}") for index, item in enumerate(value)]
    return None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of several shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass
class Case:
    """One golden case, without its expected values.

    Attributes:
        path: Folder of the case.
        system, component: Slug of the system, and which of its parts the case is about.
        config: The component's configuration (tracked); adapters compute from it and never from the folder's name.
        source: Which original code made the numbers: repository, commit, path, symbol.
        atol, rtol: A float passes if |value - expected| <= atol + rtol * |expected|.
        roots: Further folders where siblings may lie.
        wanted: Names and shapes of the outputs.
    """

    path: Path
    system: str
    component: str
    config: Any
    source: dict[str, Any]
    atol: float
    rtol: float
    roots: tuple[Path, ...] = ()
    wanted: Wanted = field(default_factory=Wanted)

    def __post_init__(self) -> None:
        self._informational: list[str] = []

    @classmethod
    def read(cls, path: Path, roots: Sequence[Path] = ()) -> Case:
        """The case in the folder `path`.

        Raises:
            UserError: If `case.json` is not JSON or lacks a field.
        """
        file = path / "case.json"
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            tolerance = meta.get("tolerance", {})
            return cls(
                path=path,
                system=meta["system"],
                component=meta["component"],
                config=tracked(meta.get("config") or {}, "config"),
                source=meta.get("source") or {},
                atol=float(tolerance.get("atol", 0.0)),
                rtol=float(tolerance.get("rtol", 0.0)),
                roots=tuple(roots),
            )
        except KeyError as error:
            raise UserError(f"{file}: field {error} is missing") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a case description: {error}") from error

    @functools.cached_property
    def inputs(self) -> Any:
        """The content of `inputs.json`, tracked.

        Raises:
            UserError: If the case has no such file.
        """
        file = self.path / "inputs.json"
        if not file.is_file():
            raise UserError(f"{self.path}: there is no inputs.json")
        return tracked(json.loads(file.read_text(encoding="utf-8")), "inputs")

    @functools.cached_property
    def tensors(self) -> Tracked:
        """The tensors of `inputs.safetensors` with their stored types (tracked); empty if there is no such file."""
        file = self.path / "inputs.safetensors"
        return Tracked(load_file(file) if file.is_file() else {}, "inputs")

    def weights(self) -> dict[str, Tensor]:
        """The original code's weights by their original names; empty if there are none."""
        file = self.path / "weights.safetensors"
        return load_file(file) if file.is_file() else {}

    def sibling(self, *names: str) -> Path:
        """A file or folder of this case or of a case beside it, for instance `tokenizer-sp/tokenizer_legacy.json`.

        Cases may be handed over without their neighbours, so the other folders of this run and the golden figures of
        a source checkout are searched too.

        Args:
            names: What it may be called; the first that exists anywhere is taken.

        Raises:
            UserError: If there is none, or if it holds expected outputs.
        """
        beside = [self.path.parent, *self.roots, *(root / self.system for root in self.roots), _SHIPPED / self.system]
        for name in names:
            if Path(name).name.startswith("outputs."):
                raise UserError(f"{self.path}: {name}: expected outputs are not for adapters")
            for folder in (self.path, *beside):
                if (folder / name).exists():
                    return folder / name
        wanted = " or ".join(names)
        raise UserError(f"{self.path}: needs {wanted} beside it, which is in none of {', '.join(map(str, beside))}")

    def informational(self, *names: str) -> None:
        """Declare keys that say something to a reader and nothing to the computation.

        Args:
            names: Shell patterns over dotted names such as `config.published` or `inputs.*.note`.
        """
        self._informational += names

    def overlooked(self) -> list[str]:
        """Keys of the configuration and the inputs that were neither read nor declared informational."""
        names = unread(self.config)
        if "inputs" in self.__dict__:
            names += unread(self.inputs)
        elif (self.path / "inputs.json").is_file():
            names.append("inputs.json")
        if "tensors" in self.__dict__:
            names += self.tensors.unread()
        elif (self.path / "inputs.safetensors").is_file():
            names.append("inputs.safetensors")
        return [name for name in names if not matches(name, self._informational)]
