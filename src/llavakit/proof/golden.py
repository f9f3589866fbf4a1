"""Golden cases against the library: the numbers that original code produced, recomputed with llavakit's parts.

This module finds the adapter that a system offers for a case's component, runs it and compares. It knows no component:
how a case's config and inputs reach the product is the adapter's business, and an adapter holds nothing but that
translation. It enters where users enter (`processor.encode`, `Samples` with the stage's collator, a layout's
`read_config` with `build`, `Chat` and `Engine`, a benchmark's `score`), and it never sees an expected value.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llavakit.errors import UserError
from llavakit.proof.case import Case, TensorSpec, Tracked, Wanted, matches, outline, take
from llavakit.proof.comparison import Comparison, Result, Tolerance, plain
from llavakit.registry import nearest
from llavakit.system import get_system, systems

__all__ = [
    "Adapter",
    "Case",
    "Comparison",
    "Declined",
    "Example",
    "Report",
    "Result",
    "TensorSpec",
    "Tolerance",
    "Tracked",
    "Wanted",
    "component",
    "declined",
    "examples",
    "find_adapter",
    "find_cases",
    "plain",
    "results",
    "run_case",
    "run_parity",
    "summary",
    "take",
]

Adapter = Callable[[Case], Any]


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


def component(*, echoes: Sequence[str] = (), ordered: bool = False) -> Callable[[Adapter], Adapter]:
    """Describe an adapter to the runner.

    Args:
        echoes: Dotted shell patterns into `outputs.json` (`runs.*.template`) of inputs that the original script wrote
            into its outputs and nowhere else. Their values are handed to the adapter in `case.wanted.json` and are
            not compared.
        ordered: Whether, by the component's definition, the place of a record among the others decides about it, so
            that records cannot be permuted.
    """

    def describe(adapter: Adapter) -> Adapter:
        adapter.echoes, adapter.ordered = tuple(echoes), ordered  # type: ignore[attr-defined]
        return adapter

    return describe


@dataclass
class Example:
    """One of several computations of a case. An exception in one of them leaves the others alone.

    Attributes:
        name: How it is reported.
        compute: Gives what `Result.of` takes. Its `json` is the value at `path`.
        path: Dotted path into `outputs.json` of what it computes; None for no JSON.
        tensors: Shell patterns of the names of the tensors that it computes.
    """

    name: str
    compute: Callable[[], Any]
    path: str | None = None
    tensors: tuple[str, ...] = ()


def examples(
    compute: Callable[[Any], Any], items: Iterable[Any] | Mapping[str, Any], path: str = "", tensors: bool = False
) -> list[Example]:
    """One example per item: of a list those at `path.0`, `path.1`, ..., of a mapping those at `path.KEY`.

    Args:
        compute: Called with the item.
        tensors: Whether an example also gives the tensors that are named `KEY` or `KEY/...`.
    """
    named = items.items() if isinstance(items, Mapping) else enumerate(items)
    prefix = f"{path}." if path else ""
    if not items and path:
        return [Example(path, lambda: {} if isinstance(items, Mapping) else [], path)]
    return [
        Example(
            name=f"{prefix}{key}",
            compute=lambda item=item: compute(item),
            path=f"{prefix}{key}",
            tensors=(escaped(key), f"{escaped(key)}/*") if tensors else (),
        )
        for key, item in named
    ]


def escaped(name: Any) -> str:
    """A name as a shell pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(name))


@dataclass
class Report:
    """The outcome of one case.

    Attributes:
        status: "passed", "failed" or "declined".
        max_abs_error: Largest |value - expected| over all floats that were compared; None if there were none.
        reason: What differs, why it is declined, or which outputs were not compared and why.
        traceback: Where an adapter failed, for its author.
        examples, passed_examples: How many computations the case has and how many of them are right.
    """

    path: str
    system: str
    component: str
    status: str
    max_abs_error: float | None = None
    reason: str = ""
    traceback: str = ""
    examples: int = 0
    passed_examples: int = 0

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
            "examples": self.examples,
            "passed_examples": self.passed_examples,
        }


def summary(reports: Iterable[Report]) -> dict[str, Any]:
    """Counts and cases as one JSON-able object."""
    reports = list(reports)
    counts = {status: sum(r.status == status for r in reports) for status in ("passed", "failed", "declined")}
    return counts | {"cases": [report.to_dict() for report in reports]}


# Expected outputs; they stay on this side


@dataclass
class _Expected:
    json: Any
    tensors: dict[str, Tensor]
    has_json: bool

    @classmethod
    def read(cls, path: Path) -> _Expected:
        file, tensors = path / "outputs.json", path / "outputs.safetensors"
        return cls(
            json=json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None,
            tensors=load_file(tensors) if tensors.is_file() else {},
            has_json=file.is_file(),
        )

    def wanted(self, echoes: Sequence[str]) -> Wanted:
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        return Wanted(specs, outline(self.json, echoes) if self.has_json else {})


_NOTHING = object()


def _at(value: Any, path: str) -> Any:
    """The value at a dotted path; keys may hold dots themselves."""
    if not path:
        return value
    if isinstance(value, dict):
        if path in value:
            return value[path]
        for key in value:
            if path.startswith(f"{key}."):
                found = _at(value[key], path[len(key) + 1 :])
                if found is not _NOTHING:
                    return found
    if isinstance(value, list):
        head, _, rest = path.partition(".")
        if head.isdigit() and int(head) < len(value):
            return _at(value[int(head)], rest)
    return _NOTHING


def _without(value: Any, paths: Sequence[str], path: str = "") -> Any:
    """`value` without the values at `paths`; `_NOTHING` if nothing is left."""
    if path and path in paths:
        return _NOTHING
    inner = f"{path}." if path else ""
    if not any(covered.startswith(inner) for covered in paths):
        return value
    if isinstance(value, dict) and value:
        left = {key: _without(item, paths, f"{inner}{key}") for key, item in value.items()}
        return {key: item for key, item in left.items() if item is not _NOTHING} or _NOTHING
    if isinstance(value, list) and value:
        left = {str(index): _without(item, paths, f"{inner}{index}") for index, item in enumerate(value)}
        return {key: item for key, item in left.items() if item is not _NOTHING} or _NOTHING
    return value


class _Run:
    """Computes and compares the examples of one case."""

    def __init__(self, case: Case, expected: _Expected, echoes: Sequence[str], report: Report) -> None:
        self.case, self.expected, self.report, self.echoes = case, expected, report, echoes
        self.differences: list[str] = []
        self.skipped: dict[str, str] = {}
        self.compared = 0

    def all(self, produced: Any) -> None:
        """Everything that an adapter gave."""
        if _is_plain(produced) or not isinstance(produced, (list, Iterator)):
            return self._remainder(Result.of(produced), [], set())
        rest: Result | None = None
        paths: list[str] = []
        tensors: set[str] = set()
        try:
            for item in produced:
                if isinstance(item, Example):
                    paths += [] if item.path is None else [item.path]
                    tensors.update(self._example(item))
                else:
                    rest = Result.of(item)
        except Declined:
            raise
        except (Exception, SystemExit) as error:
            self._failed("", error)
        self._remainder(rest, paths, tensors)
        return None

    def _failed(self, name: str, error: BaseException) -> None:
        first = str(error).strip().splitlines() or [""]
        text = first[0] if isinstance(error, UserError) else f"{type(error).__name__}: {first[0]}"
        self.differences.append(f"{name}: {text}" if name else text)
        if not isinstance(error, UserError):
            self.report.traceback += tracebacks.format_exc()

    def _example(self, example: Example) -> set[str]:
        """Compute and compare one example; the names of the tensors that it is responsible for."""
        tensors = {name: t for name, t in self.expected.tensors.items() if matches(name, example.tensors)}
        wanted = _NOTHING
        if example.path is not None and self.expected.has_json:
            wanted = _at(self.expected.json, example.path)
        before = len(self.differences)
        if wanted is _NOTHING and not tensors:
            return set()  # an input whose result the case does not hold
        self.report.examples += 1
        with _repeatable():
            try:
                result = Result.of(example.compute())
                self._compare(result, tensors, wanted, example.path or "")
            except Declined:
                raise
            except (Exception, SystemExit) as error:
                self._failed(example.name, error)
        self.report.passed_examples += len(self.differences) == before
        return set(tensors)

    def _remainder(self, rest: Result | None, paths: Sequence[str], tensors: set[str]) -> None:
        """Compare what no example covers with `rest`; what was not computed is missing."""
        left = {name: tensor for name, tensor in self.expected.tensors.items() if name not in tensors}
        json_left = _without(self.expected.json, paths) if self.expected.has_json else _NOTHING
        if rest is None and not left and json_left is _NOTHING:
            return
        before = len(self.differences)
        self.report.examples += 1
        self._compare(rest or Result(), left, json_left, "")
        self.report.passed_examples += len(self.differences) == before

    def _compare(self, result: Result, tensors: Mapping[str, Tensor], wanted: Any, path: str) -> None:
        echoed = dict.fromkeys(self.echoes, "an input that the outputs repeat")
        result.ignored = {**result.ignored, **echoed}
        comparison = Comparison(self.case.atol, self.case.rtol, result)
        for name, tensor in tensors.items():
            comparison.tensor(name, tensor)
        if wanted is not _NOTHING and not comparison.skips(path or "outputs.json"):
            value = {} if result.json is None and isinstance(wanted, dict) else plain(result.json)
            comparison.structure(value, wanted, path)
        self.differences += comparison.differences
        self.skipped |= {name: why for name, why in comparison.skipped.items() if not matches(name, self.echoes)}
        self.compared += comparison.compared
        if comparison.max_abs_error is not None:
            self.report.max_abs_error = max(comparison.max_abs_error, self.report.max_abs_error or 0.0)

    def conclude(self) -> None:
        """The verdict on the case."""
        if not self.expected.has_json and not self.expected.tensors:
            self.differences.append("the case has neither outputs.json nor outputs.safetensors")
        elif not self.compared and not self.differences:
            self.differences.append("every output is ignored, so nothing was compared; decline the component instead")
        overlooked = self.case.overlooked()
        if overlooked:
            more = f" and {len(overlooked) - 3} more" if len(overlooked) > 3 else ""
            self.differences.append(f"the adapter does not know {', '.join(overlooked[:3])}{more}")
        report = self.report
        if not self.differences:
            report.status = "passed"
            report.reason = self._left_out()
            return
        more = len(self.differences) - 1
        report.reason = self.differences[0] + (f" (and {more} more)" if more else "")
        if report.examples > 1:
            report.reason = f"{report.passed_examples} of {report.examples}; {report.reason}"

    def _left_out(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            by_reason.setdefault(why, []).append(name)
        return "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} not compared: {why}"
            for why, names in by_reason.items()
        )


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


def results(path: Path, roots: Sequence[Path] = ()) -> dict[str, Result]:
    """What the adapter of a case computes, by the names of its examples; "" is what belongs to none.

    Whatever goes wrong is raised: this is for comparing two runs with each other, not with expected numbers.
    """
    case = Case.read(path, roots)
    adapter = find_adapter(case)
    case.wanted = _Expected.read(path).wanted(getattr(adapter, "echoes", ()))
    found: dict[str, Result] = {}
    with _repeatable():
        produced = adapter(case)
        several = isinstance(produced, (list, Iterator))
        for item in produced if several and not _is_plain(produced) else [produced]:
            if isinstance(item, Example):
                with _repeatable():
                    found[item.name] = Result.of(item.compute())
            else:
                found[""] = Result.of(item)
    return found


def _is_plain(produced: Any) -> bool:
    """Whether a list is one JSON value, and not a list of examples and results."""
    return isinstance(produced, list) and not (
        bool(produced) and all(isinstance(item, (Example, Result)) for item in produced)
    )


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
        echoes = getattr(chosen, "echoes", ())
        expected = _Expected.read(path)
        case.wanted = expected.wanted(echoes)
        run = _Run(case, expected, echoes, report)
        with _repeatable():
            run.all(chosen(case))
        run.conclude()
    except Declined as error:
        report.status, report.reason = "declined", error.reason
    except UserError as error:
        report.reason = str(error)
    except (Exception, SystemExit) as error:
        report.reason = f"{type(error).__name__}: {error}".splitlines()[0]
        report.traceback = tracebacks.format_exc()
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
