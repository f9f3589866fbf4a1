"""EleutherAI's lm-evaluation-harness on a model of llavakit: the same ranking as the benchmark `likelihood`."""

from __future__ import annotations

import json
import random

import pytest
from rich.console import Console
from tiny_server import small_chat

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from llavakit.errors import UserError  # noqa: E402
from llavakit.evaluation.harness import HarnessModel  # noqa: E402
from llavakit.evaluation.run import evaluate  # noqa: E402


@pytest.fixture
def questions(tmp_path):
    """Questions with options of several lengths, in which no letter is always right."""
    draws = random.Random(0)
    words = ["red", "blue", "green", "disc", "square", "picture", "what", "there", "is", "left", "right", "above"]
    rows = []
    for number in range(24):
        options = [f"{letter}. {' '.join(draws.choices(words, k=draws.randint(1, 5)))}" for letter in "ABCD"]
        text = " ".join(draws.choices(words, k=8)) + "?"
        rows.append({"question_id": number, "text": text, "options": options, "answer": draws.randrange(4)})
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(path, **more):
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    } | more


def run(model, own, **options):
    settings = {"bootstrap_iters": 0, "apply_chat_template": True, "log_samples": True}
    return lm_eval.simple_evaluate(HarnessModel(model), tasks=[own], **settings | options)


def test_the_harness_finds_the_accuracy_of_our_own_benchmark(questions, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    chat = small_chat()
    metrics = evaluate(chat, "likelihood", questions, tmp_path / "p.jsonl", console=Console(quiet=True))["metrics"]
    found = run(chat, task(questions))
    assert found["results"]["local"]["acc,none"] == pytest.approx(metrics["accuracy_sum"] / 100)
    assert found["results"]["local"]["acc_norm,none"] == pytest.approx(metrics["accuracy_per_character"] / 100)
    assert 0 < metrics["accuracy_sum"] < 100
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for sample, row in zip(found["samples"]["local"], rows, strict=True):
        ours = [own["sum"] for own in row["likelihoods"]]
        assert [float(own[0][0]) for own in sample["resps"]] == pytest.approx(ours, abs=1e-4)


def test_greedy_continuations_and_replies(questions, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    chat = small_chat()
    model = HarnessModel(chat)
    context = model.apply_chat_template([{"role": "user", "content": "what is there?"}])
    said = chat.chat([{"role": "user", "content": "what is there?"}], max_new_tokens=6)
    metrics = [{"metric": "exact_match"}]
    writes = {"output_type": "generate_until", "generation_kwargs": {"until": ["zzzz"], "max_gen_toks": 6}}
    found = run(chat, task(questions, **writes, doc_to_choice=None, metric_list=metrics, doc_to_target="x"))
    assert len(found["samples"]["local"]) == 24
    from lm_eval.api.instance import Instance

    (reply,) = model.generate_until(
        [Instance("generate_until", {}, (context, {"until": "zzzz", "max_gen_toks": 6}), 0)]
    )
    assert reply == said
    with pytest.raises(UserError, match="add --apply_chat_template"):
        model.generate_until([Instance("generate_until", {}, ("plain", {}), 0)])
    (plain, again) = model.loglikelihood([Instance("loglikelihood", {}, ("what is", " red"), 0)] * 2)
    assert plain == again
    assert plain[0] == pytest.approx(chat.score("what is", [" red"])[0].sum)
