"""Metrics of running text and of agreement, against the packages that define them."""

import json
import sys
import warnings
from pathlib import Path

import pytest

from llavakit.errors import UserError
from llavakit.evaluation.metrics.agreement import correlations, pairwise_accuracy
from llavakit.evaluation.score import score
from llavakit.registry import TEXT_METRICS

FIGURES = json.loads((Path(__file__).parent / "golden" / "pycocoevalcap.json").read_text())
CORPORA = FIGURES["corpora"]
TEXTS = (["a small effusion", "no effusion"], [["a small right effusion"], ["there is no effusion", "no effusion"]])


def metric(name, candidates, references):
    return TEXT_METRICS.get(name)(candidates, references)


@pytest.mark.parametrize("corpus", CORPORA, ids=range(len(CORPORA)))
def test_coco_definitions_equal_the_package(corpus):
    texts = corpus["candidates"], corpus["references"]
    for order in range(1, 5):
        found = metric(f"coco_bleu_{order}", *texts)
        assert [found.value, *found.each] == pytest.approx(
            [corpus["coco_bleu"][order - 1], *corpus["coco_bleu_each"][order - 1]], abs=1e-9
        )
    for name in ("coco_rouge_l", "coco_cider"):
        found = metric(name, *texts)
        assert [found.value, *found.each] == pytest.approx([corpus[name], *corpus[f"{name}_each"]], abs=1e-9)


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("smoothed", [False, True])
def test_sentence_bleu_equals_nltk(order, smoothed):
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = nltk.SmoothingFunction().method1 if smoothed else None
    for corpus in CORPORA:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NLTK warns of texts without a common word
            wanted = [
                nltk.sentence_bleu([text.split() for text in texts], candidate.split(), (1 / order,) * order, smoothing)
                for candidate, texts in zip(corpus["candidates"], corpus["references"], strict=True)
            ]
        name = f"nltk_bleu_{order}{'_smoothed' if smoothed else ''}"
        assert metric(name, corpus["candidates"], corpus["references"]).each == pytest.approx(wanted, abs=1e-9)


def test_packages_are_used_as_papers_use_them():
    assert metric("google_rouge_l", *TEXTS).each == pytest.approx([6 / 7, 1.0])  # the best of several references
    assert metric("google_rouge_2", *TEXTS).each == pytest.approx([0.4, 1.0])
    same = metric("sacrebleu_4", ["the cat sat on the mat today"] * 2, [["the cat sat on the mat today"]] * 2)
    assert same.value == pytest.approx(1.0)
    # References are given per text: the package's own way round would score the first text only.
    assert metric("sacrebleu_1", ["a b c d", "x"], [["a b c d"], ["y"]]).value < 0.9


def test_word_overlap_of_medical_answers():
    assert metric("medical_recall", ["The left lung, left."], [["left lung base"]]).value == pytest.approx(3 / 4)
    assert metric("medical_precision", ["left lung left"], [["left lung base"]]).value == 1.0
    assert metric("medical_f1", ["", "two"], [["x"], ["2", "nothing"]]).each == [0.0, 1.0]


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_every_metric_takes_empty_texts_and_is_best_for_equal_ones(name):
    texts = ["a red dog sits on the mat", "two small cats run to the left side"]
    perfect = metric(name, texts, [[text] for text in texts])
    assert perfect.value == pytest.approx(10.0 if name == "coco_cider" else 1.0)
    assert metric(name, ["", ""], [[text] for text in texts]).value == pytest.approx(0.0, abs=1e-6)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_overlap_scores_by_named_metrics(tmp_path):
    gold = write(
        tmp_path / "gold.jsonl",
        [
            {"question_id": 1, "text": "Describe.", "answer": "a small right effusion", "type": "report"},
            {"question_id": 2, "text": "Say.", "answers": ["there is no effusion", "no effusion"], "type": "caption"},
        ],
    )
    predictions = write(
        tmp_path / "p.jsonl",
        [{"question_id": 1, "text": "a small effusion"}, {"question_id": 2, "text": "No effusion"}],
    )
    found = score("text_overlap", predictions, gold, metrics="google_rouge_l, coco_bleu_1")["metrics"]
    assert found["google_rouge_l"] == pytest.approx(100 * (6 / 7 + 1) / 2)
    assert found["by_type"]["caption"] == {
        "google_rouge_l": pytest.approx(100),
        "coco_bleu_1": pytest.approx(50, abs=1e-6),  # the toolkit does not lower-case
    }
    lower = score("text_overlap", predictions, gold, metrics=["coco_bleu_1"], process="plain")["metrics"]
    assert lower["by_type"]["caption"]["coco_bleu_1"] == pytest.approx(100, abs=1e-6)
    assert set(score("text_overlap", predictions, gold)["metrics"]) == {
        *("coco_bleu_1", "coco_bleu_4", "coco_rouge_l", "coco_cider", "count", "by_type"),
    }
    with pytest.raises(UserError, match="unknown text metric 'rouge_l'"):
        score("text_overlap", predictions, gold, metrics="rouge_l")
    with pytest.raises(UserError, match="each once"):
        score("text_overlap", predictions, gold, metrics="coco_cider,coco_cider")


def test_agreement_of_a_judge_with_people(tmp_path):
    human, judge = [1, 2, 2, 4], [1.5, 1.0, 3.0, 5.0]
    found = correlations(judge, human)
    assert found["pearson"] == pytest.approx(5.875 / (4.75 * 9.6875) ** 0.5)
    assert found["spearman"] == pytest.approx(0.6325, abs=1e-4)
    assert found["kendall"] == pytest.approx(0.5477, abs=1e-4)
    assert pairwise_accuracy(judge, human) == 4 / 5
    assert correlations([1, 1], [1, 2]) == {"pearson": None, "spearman": None, "kendall": None}
    gold = write(tmp_path / "g.jsonl", [{"question_id": n, "score": s, "group": n // 2} for n, s in enumerate(human)])
    scored = write(tmp_path / "p.jsonl", [{"question_id": n, "text": f"{s} points"} for n, s in enumerate(judge)])
    metrics = score("agreement", scored, gold)["metrics"]
    assert metrics["pairwise_accuracy"] == 50.0  # within groups: one of the two ordered pairs
    assert metrics["kendall"] == pytest.approx(0.5477, abs=1e-4)
    broken = write(tmp_path / "b.jsonl", [{"question_id": n, "text": "good"} for n in range(4)])
    with pytest.raises(UserError, match=r"b.jsonl:1: text: must begin with a number"):
        score("agreement", broken, gold)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"this needs sacrebleu: pip install 'llavakit\[eval\]'"):
        metric("sacrebleu_4", *TEXTS)
