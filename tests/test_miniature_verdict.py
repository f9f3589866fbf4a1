"""Statistics of miniatures: intervals are right, and the verdict follows from them."""

import io
import json
import math
import multiprocessing
import os

import pytest
import torch

from llavakit.errors import UserError
from llavakit.proof.miniature import Arm, Comparison, Verdict, interval, run_seeds, t_quantile
from llavakit.proof.parallel import WorkerError, run_each


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (200, 1.97190)]
)
def test_quantiles_of_t_match_the_published_table(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-5)


def test_interval_of_the_mean():
    low, high = interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert interval([1.0]) == (-math.inf, math.inf)


def comparison(idea, baseline, **options):
    return Comparison(metric="accuracy", idea=Arm("idea", idea), baseline=Arm("baseline", baseline), **options)


@pytest.mark.parametrize(
    ("idea", "baseline", "options", "outcome"),
    [
        ((0.90, 0.91, 0.92), (0.50, 0.52, 0.51), {}, "supported"),
        ((0.50, 0.52, 0.51), (0.90, 0.91, 0.92), {}, "not supported"),
        ((0.50, 0.52, 0.51), (0.90, 0.91, 0.92), {"higher_is_better": False}, "supported"),
        ((0.90, 0.40, 0.70), (0.60, 0.62, 0.61), {}, "inconclusive"),
        ((0.90,), (0.50,), {}, "inconclusive"),
        ((0.90, 0.90, 0.90), (0.91, 0.91, 0.91), {"threshold": -0.02}, "supported"),
        ((0.90, 0.90, 0.90), (0.91, 0.91, 0.91), {"threshold": 0.02}, "not supported"),
    ],
)
def test_outcome_follows_from_the_measured_interval(idea, baseline, options, outcome):
    assert comparison(idea, baseline, **options).outcome == outcome


def verdict(*comparisons):
    return Verdict(
        system="toy", claim="better", paper="+3 points", comparisons=comparisons, seeds=(0, 1, 2), seconds=1.0
    )


def test_a_verdict_needs_every_comparison():
    good = comparison((0.9, 0.91, 0.92), (0.5, 0.52, 0.51))
    bad = comparison((0.5, 0.52, 0.51), (0.9, 0.91, 0.92))
    open_ = comparison((0.9, 0.4, 0.7), (0.6, 0.62, 0.61))
    assert verdict(good, good).verdict == "supported"
    assert verdict(good, open_).verdict == "inconclusive"
    assert verdict(good, open_, bad).verdict == "not supported"


def test_a_verdict_is_json_and_a_table():
    from rich.console import Console

    single = Verdict(
        system="toy", claim="better", paper="+3", comparisons=(comparison((0.9,), (0.5,)),), seeds=(0,), seconds=1.0
    )
    shown = json.loads(json.dumps(single.to_dict(), allow_nan=False))
    assert shown["verdict"] == "inconclusive"
    assert shown["comparisons"][0]["gain"] == {"mean": pytest.approx(0.4), "interval": [None, None]}
    stream = io.StringIO()
    Console(width=120, file=stream).print(single.table())
    text = stream.getvalue()
    assert "inconclusive" in text
    assert "+3" in text


def twice(seed):
    return {"a": seed, "b": 2 * seed}


def broken(seed):
    if seed == 1:
        raise ZeroDivisionError("nothing to divide")
    return {"a": seed}


def killed(seed):
    os._exit(7)


@pytest.mark.parametrize("workers", [1, 2])
def test_seeds_keep_their_order_and_report_progress(workers):
    lines = []
    measured = run_seeds(twice, [3, 1], lines.append, workers=workers)
    assert measured.values == {"a": [3.0, 1.0], "b": [6.0, 2.0]}
    assert measured.arm("a", "idea") == Arm("idea", (3.0, 1.0))
    assert sorted(line[:6] for line in lines) == ["seed 1", "seed 3"]
    assert "(2 of 2)" in lines[1]


def a_part(seed, part):
    return {part: seed * len(part)}


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_of_a_seed_run_apart_and_are_put_together(workers):
    lines = []
    measured = run_seeds(a_part, [3, 1], lines.append, workers=workers, parts=("long", "of"))
    assert measured.values == {"long": [12.0, 4.0], "of": [6.0, 2.0]}
    assert sorted(line.split(": ")[1] for line in lines) == ["long 12, of 6", "long 4, of 2"]


def test_seeds_must_measure_the_same():
    with pytest.raises(ValueError, match="seed 1 measured"):
        run_seeds(lambda seed: {str(seed): 0.0}, [0, 1], workers=1)
    with pytest.raises(ValueError, match="one value per seed"):
        comparison((0.1,), (0.1, 0.2))


def test_a_failing_seed_is_named_and_ends_the_others():
    with pytest.raises(WorkerError, match="seed 1: ZeroDivisionError: nothing to divide") as caught:
        run_seeds(broken, [0, 1], workers=2)
    assert "in broken" in str(caught.value.__cause__)
    with pytest.raises(UserError, match="ended without an answer"):
        run_seeds(killed, [0, 1], workers=2)
    assert not multiprocessing.active_children()


def test_workers_compute_in_one_thread_and_give_it_back():
    before = torch.get_num_threads()
    assert [threads for _, threads in run_each(threads_of, [0, 1], workers=2)] == [1, 1]
    assert [threads for _, threads in run_each(threads_of, [0, 1], workers=1)] == [1, 1]
    assert torch.get_num_threads() == before


def threads_of(_):
    return torch.get_num_threads()


def test_quantiles_of_t_equal_scipys():
    stats = pytest.importorskip("scipy.stats")  # of the extra `eval`; miniatures run without it
    for freedom in (1, 2, 5, 30):
        for probability in (0.6, 0.95, 0.999):
            wanted = stats.t.ppf(probability, freedom)
            assert t_quantile(probability, freedom) == pytest.approx(wanted, rel=1e-7)
