"""Counts malformed inputs and prints the table of `make test-faults`.

A test takes the fixture `faults` and hands it one malformed input after another:

    def test_cut_pngs(faults, tmp_path):
        for number in range(200):
            path = tmp_path / "a.png"
            path.write_bytes(scramble(PNG, random.Random(number)))
            faults.attempt("PNG files", f"seed {number}", lambda: load_image(path))

An attempt may return (the input was good enough), raise a `UserError` (one line for the user), or fail the test:
any other exception, a line longer than `LONGEST_LINE` characters, or more than `seconds` of processor time. All
attempts of a test are made before it fails. Answers of a server are counted with `faults.response`. Inputs come from
fixed seeds only; `mutations.py` has generators for bytes and for JSON values.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import UserError

LONGEST_LINE = 1200
SHOWN = 5


@dataclass
class Counts:
    """What became of the inputs of one kind."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    seconds: float = 0.0


class Faults:
    """The attempts of one test.

    Args:
        table: Counts of the whole session by kind of input.
    """

    def __init__(self, table: dict[str, Counts]) -> None:
        self.table = table
        self.failures: list[str] = []

    def attempt(self, kind: str, label: str, call: Callable[[], Any], *, seconds: float = 10.0) -> Exception | None:
        """Give `call` its malformed input.

        Args:
            kind: Row of the table, such as "PNG files".
            label: What tells this input from the others (its seed), for the list of failures.
            call: Runs the code under test; what it returns does not matter.
            seconds: Most processor time that this input may take.

        Returns:
            What was raised, if anything.
        """
        counts = self._counts(kind)
        began = time.process_time()
        raised = None
        try:
            call()
            counts.accepted += 1
        except UserError as error:
            raised = error
            self._refused(counts, kind, label, " ".join(str(error).split()))
        except Exception as error:
            raised = error
            counts.tracebacks += 1
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error)[:200]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            self.failures.append(f"{kind}, {label}: {type(error).__name__} in {place}: {said}")
        taken = time.process_time() - began
        counts.seconds += taken
        if taken > seconds:
            self.failures.append(f"{kind}, {label}: took {taken:.1f} s of processor time, {seconds:g} s are allowed")
        return raised

    def response(self, kind: str, label: str, status: int, body: str = "") -> None:
        """Count an answer of a server: 2xx and 3xx accept, 4xx refuses, anything else is a traceback."""
        counts = self._counts(kind)
        if 200 <= status < 400:
            counts.accepted += 1
        elif 400 <= status < 500:
            self._refused(counts, kind, label, body)
        else:
            counts.tracebacks += 1
            self.failures.append(f"{kind}, {label}: status {status}: {body[:200]}")

    def _counts(self, kind: str) -> Counts:
        counts = self.table.setdefault(kind, Counts())
        counts.tried += 1
        return counts

    def _refused(self, counts: Counts, kind: str, label: str, line: str) -> None:
        counts.refused += 1
        if len(line) > LONGEST_LINE:
            self.failures.append(f"{kind}, {label}: a line of {len(line)} characters: {line[:200]}")

    def check(self) -> None:
        """Fail the test if an attempt did."""
        if self.failures:
            more = [f"and {len(self.failures) - SHOWN} more"] if len(self.failures) > SHOWN else []
            pytest.fail("\n".join([*self.failures[:SHOWN], *more]), pytrace=False)
