"""Statistics of miniatures: intervals are right, and the verdict follows from them."""

import io
import json
import math

import pytest

from llavakit.miniature import Arm, Comparison, Verdict, interval, run_seeds, t_quantile


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


def test_seeds_run_in_order_and_report_progress():
    lines = []
    measured = run_seeds(lambda seed: {"a": seed, "b": 2 * seed}, [3, 1], lines.append)
    assert measured.values == {"a": [3.0, 1.0], "b": [6.0, 2.0]}
    assert measured.arm("a", "idea") == Arm("idea", (3.0, 1.0))
    assert lines == ["seed 3 (1 of 2): a 3, b 6", "seed 1 (2 of 2): a 1, b 2"]
    with pytest.raises(ValueError, match="seed 1 measured"):
        run_seeds(lambda seed: {str(seed): 0.0}, [0, 1])
    with pytest.raises(ValueError, match="one value per seed"):
        comparison((0.1,), (0.1, 0.2))
