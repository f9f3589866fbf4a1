"""User entries broken on purpose: at least one golden case of every system must fail then.

What a system's golden components are called decides which entries its cases can reach (`REACHES`). Where no component
reaches an entry, the system's small recipe, which goes from records through training and chat to a score, must fail
instead.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from llavakit.checkpoints import opening
from llavakit.evaluation import score as scoring
from llavakit.generation.engine import Engine
from llavakit.model.processing import LlavakitProcessor
from llavakit.proof.golden import Case, Report, run_case
from llavakit.registry import resolve
from llavakit.system import get_system, systems
from llavakit.training.dataset import PreparedSamples, StageCollator

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
MESSAGE = "broken on purpose"
FALLBACK = "test_small_recipes.py::test_trains_through_all_stages_and_answers"

TEXT = "label|prompt|conversation|template|preprocess|dialog"
MODEL = "end_to_end|e2e|train_step|(?<!retrieve_)inference|generation|expert_model|attack_loss"
# Entry -> words in the names of the components that reach it.
REACHES = {
    "encode": rf"{TEXT}|pixel_values|{MODEL}",
    "samples": rf"label|dataset|sampler|{MODEL}",
    "collator": rf"training_data|collator|{MODEL}",
    "read_config": rf"{MODEL}|prefix_mapper|tiny_model",
    "build": rf"{MODEL}",
    "engine": rf"{MODEL}",
    "score": r"metric|accuracy|pope|iou|scores|benchmark",
}


class Broken(RuntimeError):
    """What a broken entry raises."""


def raises(*args: Any, **kwargs: Any) -> Any:
    raise Broken(MESSAGE)


def _raises_anywhere(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken on purpose")  # runs with the globals of the function whose code it replaces


def layouts_of(system: str) -> list[type]:
    """Classes of the checkpoint layouts on a system's card that read a configuration."""
    found = [resolve(target) for target in get_system(system).parts.get("layouts", {}).values()]
    return [layout for layout in found if hasattr(layout, "read_config")]


@contextmanager
def broken(entry: str, system: str) -> Iterator[None]:
    """Everything that enters there raises. Functions that others import by name get other code."""
    methods = {
        "encode": [(LlavakitProcessor, "encode")],
        "samples": [(PreparedSamples, "__init__")],  # `Samples` of conversations and those of other objectives
        "collator": [(StageCollator, "__call__")],
        "read_config": [(layout, "read_config") for layout in layouts_of(system)],
        "engine": [(Engine, "__init__")],
    }
    functions = {"build": opening.build, "score": scoring.score}
    with ExitStack() as stack:
        if entry in functions:
            function = functions[entry]
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = _raises_anywhere.__code__
        for cls, name in methods.get(entry, ()):
            stack.enter_context(patch.object(cls, name, raises))
        yield


def proved_systems() -> list[str]:
    """Systems with golden cases in the repository and adapters."""
    cards = systems()
    return [path.name for path in sorted(GOLDEN.iterdir()) if path.name in cards and cards[path.name].parity]


def cases_of(system: str) -> list[Path]:
    """Folders of a system's golden cases for which it has adapters."""
    adapters = get_system(system).load("parity")
    folders = sorted(file.parent for file in (GOLDEN / system).glob("*/case.json"))
    return [folder for folder in folders if Case.read(folder).component in adapters]


def bites(system: str) -> Iterator[tuple[str, bool, str]]:
    """Name, verdict and remark of every broken entry."""
    components = {folder: Case.read(folder).component for folder in cases_of(system)}
    for entry, words in REACHES.items():
        if entry == "read_config" and not layouts_of(system):
            continue  # its files are read by another system's layout
        reaching = [folder for folder, name in components.items() if re.search(words, name)]
        if not reaching and get_system(system).recipe is None:
            continue  # it trains nothing and brings no model
        if not reaching:
            holds, remark = fallback_fails(entry, system)
            yield f"broken {entry} (no golden component reaches it; small recipe)", holds, remark
            continue
        for folder in [*reaching, *(folder for folder in components if folder not in reaching)]:
            with broken(entry, system):
                report = run_case(folder)
            if bitten(report):
                break
        names = ", ".join(folder.name for folder in reaching)
        yield f"broken {entry}", bitten(report), f"no case fails, not even those that should reach it: {names}"


def bitten(report: Report) -> bool:
    """Whether a case failed because of the broken entry, and not because it cannot run at all."""
    return report.status == "failed" and MESSAGE in report.reason + report.traceback


class _Outcome:
    """What pytest reports of the tests that it ran."""

    def __init__(self) -> None:
        self.ran, self.bitten = 0, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.ran += 1
            self.bitten += report.failed and MESSAGE in str(report.longrepr)


def fallback_fails(entry: str, system: str) -> tuple[bool, str]:
    """Whether the test of the system's small recipe fails because of the broken entry."""
    outcome = _Outcome()
    arguments = ["-q", "-p", "no:cacheprovider", "-k", f"answers and {system}", str(TESTS / FALLBACK)]
    with broken(entry, system), contextlib.redirect_stdout(io.StringIO()):
        pytest.main(arguments, plugins=[outcome])
    return outcome.bitten > 0, f"{FALLBACK}: {outcome.ran} tests ran, {outcome.bitten} failed of it"
