"""Golden cases against the library: the numbers that original code produced, recomputed with llavakit's parts.

This module knows the layout of a case on disk, finds the adapter that a system offers for the case's component, runs
it and compares. It knows no component: what to compute from a case's config and inputs is the adapter's business.

A case is a folder with `case.json` (system, component, config, tolerance), inputs in `inputs.json` and
`inputs.safetensors`, weights under their original names in `weights.safetensors`, and the expected results in
`outputs.json` and `outputs.safetensors`; each file is optional.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llavakit.errors import UserError
from llavakit.registry import nearest
from llavakit.system import get_system, systems

Tolerance = tuple[float, float]  # atol, rtol

_SHIPPED = Path(__file__).parents[3] / "tests" / "golden"  # exists in a source checkout only


class Declined(Exception):
    """Raised by an adapter whose component llavakit deliberately does not reproduce.

    Args:
        reason: Why, in words a user can judge (an incidental script, a bug that no checkpoint depends on).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def declined(reason: str) -> Adapter:
    """An adapter that declines its component."""

    def decline(case: Case) -> Result:
        raise Declined(reason)

    return decline


@dataclass
class Result:
    """What an adapter computed.

    Attributes:
        json: The structure that must equal `outputs.json`.
        tensors: The tensors that must equal those of `outputs.safetensors`, by name. Names that the case does not
            have are not compared.
        mask: Tensor name -> bool tensor (broadcast to the output's shape), True where values are meaningful; use it
            for padding positions only.
        ignored: Output that is informational and therefore not computed -> reason. Keys are tensor names, or dotted
            paths into the JSON (`example.hf_difference`); `*` matches anything.
        tolerances: (atol, rtol) of single outputs, keyed like `ignored`, where the case's notes give them their own.
    """

    json: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Mapping[str, Tensor] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Result:
        """A `Result` as it is; of a plain mapping the tensors as `tensors` and the rest as `json`."""
        if isinstance(value, Result):
            return value
        if not isinstance(value, Mapping):
            return cls(json=value)
        tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        rest = {name: item for name, item in value.items() if name not in tensors}
        return cls(json=rest or None, tensors=tensors)


@dataclass
class Case:
    """One golden case on disk.

    Attributes:
        path: Folder of the case.
        system, component: Slug of the system, and which of its parts the case is about.
        config: The component's configuration; adapters compute from it and never from the folder's name.
        meta: The whole of `case.json`.
        atol, rtol: A float passes if |value - expected| <= atol + rtol * |expected|.
        roots: Further folders where siblings may lie.
    """

    path: Path
    system: str
    component: str
    config: dict[str, Any]
    meta: dict[str, Any]
    atol: float
    rtol: float
    roots: tuple[Path, ...] = ()

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
                config=meta.get("config") or {},
                meta=meta,
                atol=float(tolerance.get("atol", 0.0)),
                rtol=float(tolerance.get("rtol", 0.0)),
                roots=tuple(roots),
            )
        except KeyError as error:
            raise UserError(f"{file}: field {error} is missing") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a case description: {error}") from error

    def json(self, name: str = "inputs") -> Any:
        """The content of `NAME.json`.

        Raises:
            UserError: If the case has no such file.
        """
        file = self.path / f"{name}.json"
        if not file.is_file():
            raise UserError(f"{self.path}: there is no {name}.json")
        return json.loads(file.read_text(encoding="utf-8"))

    def tensors(self, name: str = "inputs") -> dict[str, Tensor]:
        """The tensors of `NAME.safetensors` with their stored types; empty if there is no such file."""
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}

    def weights(self) -> dict[str, Tensor]:
        """The original code's weights by their original names."""
        return self.tensors("weights")

    def sibling(self, name: str) -> Path:
        """A file or folder beside this case, for instance `tokenizer-sp/tokenizer_legacy.json`.

        Cases may be handed over without their neighbours, so the other folders of this run and the golden figures of
        a source checkout are searched too.

        Raises:
            UserError: If there is none.
        """
        beside = [self.path.parent, *self.roots, *(root / self.system for root in self.roots), _SHIPPED / self.system]
        for folder in beside:
            if (folder / name).exists():
                return folder / name
        raise UserError(f"{self.path}: needs {name} beside it, which is in none of {', '.join(map(str, beside))}")

    @functools.cached_property
    def expected_json(self) -> Any:
        """The content of `outputs.json`, None if there is none."""
        return self.json("outputs") if (self.path / "outputs.json").is_file() else None

    @functools.cached_property
    def expected_tensors(self) -> dict[str, Tensor]:
        """The tensors of `outputs.safetensors`."""
        return self.tensors("outputs")


Adapter = Callable[[Case], Any]


@dataclass
class Report:
    """The outcome of one case.

    Attributes:
        status: "passed", "failed" or "declined".
        max_abs_error: Largest |value - expected| over all floats that were compared; None if there were none.
        reason: What differs, why it is declined, or which outputs were not compared and why.
        traceback: Where an adapter failed, for its author.
    """

    path: str
    system: str
    component: str
    status: str
    max_abs_error: float | None = None
    reason: str = ""
    traceback: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields of the machine-readable form."""
        error = self.max_abs_error
        return {
            "path": self.path,
            "system": self.system,
            "component": self.component,
            "status": self.status,
            "max_abs_error": error if error is None or math.isfinite(error) else None,
            "reason": self.reason,
        }


def summary(reports: Iterable[Report]) -> dict[str, Any]:
    """Counts and cases as one JSON-able object."""
    reports = list(reports)
    counts = {status: sum(r.status == status for r in reports) for status in ("passed", "failed", "declined")}
    return counts | {"cases": [report.to_dict() for report in reports]}


# Comparison


class Comparison:
    """Collects differences between what an adapter computed and what is expected.

    Args:
        atol, rtol: Tolerance of the case.
        result: The adapter's result, for its masks, ignored outputs and single tolerances.
    """

    def __init__(self, atol: float, rtol: float, result: Result) -> None:
        self.atol, self.rtol, self.result = atol, rtol, result
        self.differences: list[str] = []
        self.skipped: dict[str, str] = {}
        self.compared = 0
        self.max_abs_error: float | None = None

    def _skips(self, name: str) -> bool:
        for pattern, reason in self.result.ignored.items():
            if fnmatchcase(name, pattern):
                self.skipped[name] = reason
                return True
        return False

    def _tolerance(self, name: str) -> Tolerance:
        for pattern, tolerance in self.result.tolerances.items():
            if fnmatchcase(name, pattern):
                return tolerance
        return self.atol, self.rtol

    def _saw(self, error: float) -> None:
        if math.isnan(error):
            error = math.inf
        self.max_abs_error = max(error, self.max_abs_error or 0.0)

    def tensor(self, name: str, expected: Tensor) -> None:
        """Compare the output tensor `name`; integers may differ by atol, never by rtol."""
        if self._skips(name):
            return
        self.compared += 1
        value = self.result.tensors.get(name)
        if value is None:
            self.differences.append(f"output {name} is missing")
            return
        value = torch.as_tensor(value).detach().cpu()
        if value.shape != expected.shape:
            self.differences.append(f"{name}: shape {list(value.shape)}, expected {list(expected.shape)}")
            return
        atol, rtol = self._tolerance(name)
        exact = not (expected.is_floating_point() or expected.is_complex())
        # Integers are subtracted as integers: float64 does not hold every int64.
        wide = torch.int64 if exact and not value.is_floating_point() else torch.float64
        value, wanted = value.to(wide), expected.to(wide)
        error = (value - wanted).abs().double()
        if not exact:
            same = (value == wanted) | (value.isnan() & wanted.isnan())  # infinities and NaN on both sides
            error = error.masked_fill(same, 0.0)
        if name in self.result.mask:
            meaningful = torch.as_tensor(self.result.mask[name]).cpu().bool()
            error = error.masked_fill(~meaningful.expand_as(error), 0.0)
        if error.numel() == 0:
            return
        self._saw(float(error.max()) if not error.isnan().any() else math.inf)
        allowed = torch.full_like(error, atol) if exact else atol + rtol * wanted.abs().nan_to_num(nan=0.0, posinf=0.0)
        beyond = ~(error <= allowed)
        if beyond.any():
            worst = int(error.nan_to_num(nan=math.inf).masked_fill(~beyond, -1.0).argmax())
            place = [int(index) for index in np.unravel_index(worst, tuple(error.shape))]
            self.differences.append(
                f"{name}{place}: {value.flatten()[worst].item():.6g}, expected {wanted.flatten()[worst].item():.6g}"
                f" ({int(beyond.sum())} of {beyond.numel()} values differ)"
            )

    def structure(self, value: Any, expected: Any, path: str = "") -> None:
        """Compare JSON recursively; floats within tolerance, all else exactly.

        Keys of the outermost object that the case does not have are not compared.
        """
        if path and self._skips(path):
            return
        label = path or "outputs.json"
        if isinstance(expected, dict) and isinstance(value, dict):
            for key, item in expected.items():
                inner = f"{path}.{key}" if path else key
                if key in value:
                    self.structure(value[key], item, inner)
                elif not self._skips(inner):
                    self.differences.append(f"output {inner} is missing")
            surplus = [key for key in value if key not in expected] if path else []
            if surplus:
                self.differences.append(f"{label}: unexpected {', '.join(map(repr, surplus))}")
            return
        self.compared += 1
        if isinstance(expected, list) and isinstance(value, list):
            for index, (ours, theirs) in enumerate(zip(value, expected, strict=False)):
                self.structure(ours, theirs, f"{path}.{index}" if path else str(index))
            if len(value) != len(expected):
                self.differences.append(f"{label}: {len(value)} items, expected {len(expected)}")
        elif _is_number(value) and _is_number(expected):
            self._number(label, path, value, expected)
        elif type(value) is not type(expected) or value != expected:
            self.differences.append(f"{label}: {_short(value)}, expected {_short(expected)}")

    def _number(self, label: str, path: str, value: float, expected: float) -> None:
        same = value == expected or (math.isnan(value) and math.isnan(expected))
        error = 0.0 if same else abs(value - expected)
        if isinstance(expected, float):
            self._saw(error)
        atol, rtol = self._tolerance(path)
        allowed = atol + rtol * abs(expected) if isinstance(expected, float) and math.isfinite(expected) else 0.0
        if not error <= allowed:
            self.differences.append(f"{label}: {value!r}, expected {expected!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: lists for tuples and arrays, string keys, Python numbers."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else json.dumps(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return str(value) if isinstance(value, (str, Path)) else value


def compare(case: Case, result: Result) -> Comparison:
    """All differences between `result` and the case's expected outputs."""
    comparison = Comparison(case.atol, case.rtol, result)
    if case.expected_json is None and not case.expected_tensors:
        comparison.differences.append("the case has neither outputs.json nor outputs.safetensors")
    for name, expected in case.expected_tensors.items():
        comparison.tensor(name, expected)
    if case.expected_json is not None and not comparison._skips("outputs.json"):
        if result.json is None and isinstance(case.expected_json, dict):
            comparison.structure({}, case.expected_json)
        else:
            comparison.structure(plain(result.json), case.expected_json)
    if not comparison.compared and not comparison.differences:
        comparison.differences.append("every output is ignored, so nothing was compared; decline the component instead")
    return comparison


# Running


def find_cases(paths: Iterable[Path]) -> list[Path]:
    """Every folder with a `case.json` under `paths`, each once, in order of name.

    Raises:
        UserError: If a path does not exist or holds no case.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such folder; give a golden case or a folder of golden cases")
        files = [path] if path.name == "case.json" else sorted(path.rglob("case.json"))
        if not files:
            raise UserError(f"{path}: no golden case in it (a case is a folder with case.json)")
        for file in files:
            found.setdefault(file.parent.resolve(), file.parent)
    return list(found.values())


def find_adapter(case: Case) -> Adapter:
    """The system's adapter for the case's component.

    Raises:
        UserError: If the system is unknown, has no parity, or has no adapter for the component.
    """
    if case.system not in systems():
        raise UserError(f"unknown system {case.system!r}{nearest(case.system, list(systems()))}")
    adapters = get_system(case.system).load("parity")
    if case.component not in adapters:
        hint = nearest(case.component, list(adapters))
        raise UserError(f"system {case.system} has no adapter for component {case.component!r}{hint}")
    return adapters[case.component]


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """One thread, float32, fixed seeds; standard output kept clean for the report."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def run_case(path: Path, roots: Sequence[Path] = (), adapter: Adapter | None = None) -> Report:
    """Run one case; whatever goes wrong inside becomes a failed report.

    Args:
        path: Folder of the case.
        roots: Further folders where the case's siblings may lie.
        adapter: Used instead of the one that the case's system offers.
    """
    report = Report(str(path), "", "", "failed")
    try:
        case = Case.read(path, roots)
        report.system, report.component = case.system, case.component
        chosen = adapter or find_adapter(case)
        with _repeatable():
            result = Result.of(chosen(case))
            comparison = compare(case, result)
    except Declined as error:
        report.status, report.reason = "declined", error.reason
    except UserError as error:
        report.reason = str(error)
    except (Exception, SystemExit) as error:
        report.reason = f"{type(error).__name__}: {error}".splitlines()[0]
        report.traceback = tracebacks.format_exc()
    else:
        report.max_abs_error = comparison.max_abs_error
        if comparison.differences:
            more = len(comparison.differences) - 1
            report.reason = comparison.differences[0] + (f" (and {more} more)" if more else "")
        else:
            report.status = "passed"
            report.reason = "; ".join(f"{name} not compared: {reason}" for name, reason in comparison.skipped.items())
    return report


def run_parity(paths: Iterable[str | os.PathLike[str]], only: str | None = None) -> Iterator[Report]:
    """Run all cases under `paths`, one after another.

    Args:
        paths: Cases, or folders of cases.
        only: Slug of the system whose cases are run; None for all.

    Raises:
        UserError: Before the first case, if a path holds none, or none is left by `only`.
    """
    roots = [Path(path) for path in paths]
    cases = find_cases(roots)
    if only is not None:
        cases = [path for path in cases if _system_of(path) == only]
        if not cases:
            raise UserError(f"no case of system {only!r} in {', '.join(map(str, roots))}")
    return (run_case(path, roots) for path in cases)


def _system_of(path: Path) -> str | None:
    try:
        return Case.read(path).system
    except UserError:
        return None
