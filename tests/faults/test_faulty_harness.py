"""The counting itself: what fails a test and what does not."""

from __future__ import annotations

import json
import random

import pytest
from harness import LONGEST_LINE, Faults
from mutations import ODD, scramble, scrambled_json, twist

from llavakit.errors import UserError


class Uncut(UserError):
    """An error whose line is not cut, as that of every other `UserError` is."""

    def __str__(self) -> str:
        return "word " * LONGEST_LINE


def raising(error: Exception) -> None:
    raise error


def test_only_tracebacks_long_lines_and_slow_attempts_fail() -> None:
    faults = Faults({})
    assert faults.attempt("k", "fine", lambda: 1) is None
    faults.attempt("k", "one line", lambda: raising(UserError("file: field: say this instead")))
    faults.response("k", "gone", 404)
    faults.check()
    assert (faults.table["k"].tried, faults.table["k"].accepted, faults.table["k"].refused) == (3, 1, 2)
    faults.attempt("k", "traceback", lambda: raising(KeyError("x")))
    faults.attempt("k", "long", lambda: raising(Uncut()))
    faults.response("k", "long answer", 400, "word " * LONGEST_LINE)
    faults.attempt("k", "slow", lambda: sum(range(10**6)), seconds=0.0)
    faults.response("k", "failed", 500, "Internal Server Error")
    assert faults.table["k"].tracebacks == 2
    with pytest.raises(pytest.fail.Exception) as caught:
        faults.check()
    for said in (
        "traceback: KeyError",
        "long: a line of",
        "long answer: a line of",
        "slow: took",
        "failed: status 500",
    ):
        assert said in str(caught.value)


def test_mutations_depend_on_the_seed_alone() -> None:
    value = {"conversations": [{"from": "human", "value": "Q?"}], "image": "a.png"}
    for make in (scrambled_json, lambda v, rng: json.dumps(twist(v, rng)), lambda v, rng: scramble(b"x" * 999, rng)):
        first = [make(value, random.Random(seed)) for seed in range(40)]
        assert first == [make(value, random.Random(seed)) for seed in range(40)]
        assert len(set(first)) > 30
    assert json.loads(json.dumps(ODD[0])) is None
