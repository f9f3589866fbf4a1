"""Every score has n and an interval, which is as wide as it should be."""

import json

import numpy as np
import pytest
from scipy import stats

from llavakit.evaluation.cases import spread
from llavakit.evaluation.metrics.intervals import Measure, intervals, mcnemar, numbered, wilson
from llavakit.evaluation.score import metrics_of, print_result, score
from llavakit.registry import BENCHMARKS

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(tmp_path, pictures, each, right):
    """Gold and predictions of `each` questions about every picture; `right(picture, question)` says who is right."""
    gold, said = [], []
    for picture in range(pictures):
        for question in range(each):
            name = f"{picture}-{question}"
            row = {
                "question_id": name,
                "text": "?",
                "image": f"{picture}.png",
                "answer": "a",
                "type": f"t{question % 2}",
            }
            gold.append(row)
            said.append({"question_id": name, "text": "a" if right(picture, question) else "b"})
    return lines(tmp_path / "said.jsonl", said), lines(tmp_path / "gold.jsonl", gold)


def test_a_share_has_wilsons_interval(tmp_path):
    said, gold = asked(tmp_path, 50, 1, lambda picture, _: picture % 5 > 0)
    result = score("exact_match", said, gold)
    wanted = stats.binomtest(40, 50).proportion_ci(method="wilson")
    assert result["n"] == 50
    assert "pictures" not in result
    assert result["intervals"]["accuracy"] == pytest.approx([100 * wanted.low, 100 * wanted.high])
    assert set(result["intervals"]["by_type"]["t0"]) == {"accuracy"}


def test_wilson_and_mcnemar_are_scipys():
    for right, count in ((0, 5), (3, 7), (60, 60), (1, 1)):
        wanted = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    for one, two in ((0, 0), (3, 0), (7, 4), (20, 21)):
        found = mcnemar([True] * one + [False] * two, [False] * one + [True] * two)
        assert found["p"] == pytest.approx(stats.binomtest(one, one + two).pvalue if one + two else 1.0)


def test_questions_about_one_picture_are_no_independent_evidence(tmp_path):
    """Where all answers about a picture are alike, six questions each say no more than one each."""
    said, gold = asked(tmp_path, 40, 6, lambda picture, _: picture % 4 > 0)
    result = score("exact_match", said, gold)
    alone = 100 * np.array(wilson(30, 40))
    assert (result["n"], result["pictures"]) == (240, 40)
    assert result["intervals"]["accuracy"] == pytest.approx(alone, abs=0.6)
    rng = np.random.default_rng(0)
    coins = rng.random((40, 6)) < 0.75
    free = score("exact_match", *asked(tmp_path, 40, 6, lambda picture, question: coins[picture, question]))
    low, high = free["intervals"]["accuracy"]
    assert high - low < 0.55 * (alone[1] - alone[0])


def test_all_right_is_not_certain(tmp_path):
    said, gold = asked(tmp_path, 10, 3, lambda *_: True)
    low, high = score("exact_match", said, gold)["intervals"]["accuracy"]
    assert low == pytest.approx(100 * wilson(10, 10)[0])  # ten pictures are all that is known
    assert high == pytest.approx(100)


@pytest.mark.parametrize("spread_of_pictures", [0.0, 1.0])
def test_95_of_100_intervals_hold_the_truth(spread_of_pictures):
    """Of shares and of means, with and without pictures that differ."""
    rng, held = np.random.default_rng(1), {"share": 0, "mean": 0}
    trials, groups = 400, np.repeat(np.arange(40), 4)
    for _ in range(trials):
        skill = 1 / (1 + np.exp(-(0.8 + 2.0 * spread_of_pictures * rng.standard_normal(40))))
        right = rng.random((40, 4)) < skill[:, None]
        value = np.clip(0.5 + 0.1 * rng.standard_normal((40, 4)) + 0.1 * (right - 0.5), 0, 1)
        measures = {"share": Measure.mean(right.ravel()), "mean": Measure.mean(value.ravel())}
        found = intervals(measures, groups, resamples=300)
        expected = {"share": _expected(spread_of_pictures), "mean": 0.5 + 0.1 * (_expected(spread_of_pictures) - 0.5)}
        for name, (low, high) in found.items():
            held[name] += low <= 100 * expected[name] <= high
    assert 0.92 <= held["share"] / trials <= 0.985
    assert 0.90 <= held["mean"] / trials <= 0.985


def _expected(spread_of_pictures):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float((weights / (1 + np.exp(-(0.8 + 2.0 * spread_of_pictures * nodes)))).sum() / weights.sum())


def test_what_is_no_share_is_resampled_by_picture(tmp_path):
    said, gold = asked(tmp_path, 30, 3, lambda picture, question: (picture + question) % 3 > 0)
    rows = [json.loads(line) for line in gold.read_text().splitlines()]
    lines(gold, [row | {"label": "yes" if n % 2 else "no", "category": f"c{n % 2}"} for n, row in enumerate(rows)])
    said = lines(
        said, [{"question_id": row["question_id"], "text": "yes" if n % 3 else "no"} for n, row in enumerate(rows)]
    )
    first, second = score("pope", said, gold), score("pope", said, gold)
    assert first == second  # seeded
    low, high = first["intervals"]["f1"]
    assert low < first["metrics"]["f1"] < high
    assert {"accuracy", "precision", "recall", "f1", "yes_ratio", "mean_f1", "by_category"} == set(first["intervals"])


def test_nothing_is_said_where_nothing_is_known():
    one = np.zeros(1, int)
    assert intervals({"mean": Measure.mean([0.4])}, one) == {"mean": None}
    assert intervals({"mean": Measure.mean([None, None])}, numbered("ab")) == {"mean": None}
    assert intervals({"mean": Measure.mean([0.4, 0.4])}, numbered("ab")) == {"mean": None}
    assert intervals({"share": Measure.mean([True])}, one)["share"] == pytest.approx((100 * wilson(1, 1)[0], 100))


def test_the_stored_digest_tells_pictures_apart_where_the_gold_file_does_not(tmp_path):
    gold = lines(tmp_path / "g.jsonl", [{"question_id": n, "answer": "a"} for n in range(4)])
    said = [{"question_id": n, "text": "a", "media": f"picture {n // 2}"} for n in range(4)]
    assert spread(metrics_of("exact_match", lines(tmp_path / "p.jsonl", said), gold))["pictures"] == 2


def test_intervals_are_printed(tmp_path, capsys):
    said, gold = asked(tmp_path, 20, 2, lambda picture, question: (picture + question) % 3 > 0)
    print_result(score("exact_match", said, gold))
    shown = capsys.readouterr().out
    assert "95 % interval" in shown
    assert "n = 40, about 20 pictures" in shown
    assert shown.count(" to ") == 3  # accuracy, and that of two types


def test_a_benchmark_of_a_third_party_needs_no_measures(monkeypatch):
    class Own:
        title = "Own"

        def score(self, predictions, gold):
            return {"accuracy": 50.0, "count": 2}

    monkeypatch.setattr(BENCHMARKS, "_entries", {**BENCHMARKS._entries, "own_benchmark": Own})
    assert score("own_benchmark", "p", "g") == {
        "task": "own_benchmark",
        "metrics": {"accuracy": 50.0, "count": 2},
        "n": 2,
        "intervals": {},
    }
