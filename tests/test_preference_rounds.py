"""`llavakit prefer`: answers, verdicts in both orders, pairs with provenance, training; what a kill leaves is used."""

from __future__ import annotations

import json
import re

import pytest
import tiny_training
from fake_api import Failure, FakeAPI
from rich.console import Console
from typer.testing import CliRunner

from llavakit.cli.app import app
from llavakit.data.preference import read_preference
from llavakit.data.records import Record
from llavakit.errors import UserError
from llavakit.registry import COMPARISONS
from llavakit.training.preference_rounds import (
    Question,
    RoundsRecipe,
    _written,
    calls_of,
    read_questions,
    run_rounds,
)
from llavakit.training.recipe import parse_recipe
from llavakit.training.run import train

QUIET = Console(quiet=True)
STAGE = {"train": ["multi_modal_projector", "language_model", "lm_head"], "learning_rate": 1e-3, "max_steps": 2}
STAGE |= {"batch_size": 2, "log_steps": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Squares, and a policy that has seen a few of them."""
    folder = tiny_training.write_world(tmp_path_factory.mktemp("rounds"))
    records = json.loads((folder / "records.json").read_text())[:4]
    for record in records[:2]:  # a question needs no answer
        record["conversations"] = record["conversations"][:1]
    (folder / "asked.json").write_text(json.dumps(records))
    train(parse_recipe(tiny_training.recipe(folder, output=str(folder / "policy"))), console=QUIET)
    return folder


def answers_in(body):
    text = body["messages"][0]["content"]
    text = text if isinstance(text, str) else "".join(part.get("text", "") for part in text)
    found = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nGive your reasons", text, re.S)
    return found[1], found[2]


def likes_length(body):
    """Prefers the longer answer; favours the first of equally long ones, which both orders must cancel."""
    first, second = answers_in(body)
    return "Because. [[B]]" if len(second) > len(first) else "Because. [[A]]"


def recipe(world, out, judge, **changes) -> RoundsRecipe:
    raw = {
        "policy": str(world / "policy" / "final"),
        "judge": {"model": f"{judge}#m", "retries": 0, "price_in": 1.0, "price_out": 2.0},
        "prompts": [{"path": str(world / "asked.json"), "images": str(world / "images")}],
        "answers": 3,
        "sampling": {"temperature": 1.5, "max_new_tokens": 6},
        "stage": STAGE,
        "output": str(out),
    }
    return RoundsRecipe.model_validate(raw | changes)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]


def test_two_rounds(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    prompts = [{"path": "asked.json", "images": "images"}]
    with FakeAPI(likes_length) as api:
        wanted = recipe(world, tmp_path / "out", api.url, rounds=2, prompts=prompts)
        first, second = run_rounds(wanted, QUIET)
    asked = [body for path, _, body in api.bodies if path.endswith("completions")]
    assert first.questions == second.questions == 4
    assert first.judge_calls["asked"] + second.judge_calls["asked"] == len(asked)
    assert first.judge_calls["cost"] > 0
    pictured = [body for body in asked if isinstance(body["messages"][0]["content"], list)]
    assert any(part["type"] == "image_url" for body in pictured for part in body["messages"][0]["content"])
    rows = rows_of(tmp_path / "out" / "round-1")
    assert len(rows) == first.pairs > 0
    for row in rows:
        record = read_preference(row, media_root=None)
        assert len(record.chosen) > len(record.rejected)
        given = row["provenance"]
        assert given["round"] == 1
        assert sum(given["rewards"]) == 0
        assert {row["chosen"], row["rejected"]} <= set(given["answers"])
        lengths = [len(text) for text in given["answers"]]
        assert row["chosen"] == given["answers"][lengths.index(max(lengths))]
    assert rows_of(tmp_path / "out" / "round-2")[0]["provenance"]["policy"] == first.final != second.final
    assert (tmp_path / "out" / "final" / "config.json").is_file()


def test_questions_about_boxes_are_written_with_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    boxes = {"type": "boxes", "boxes": [[0.0, 0.0, 1.0, 1.0]], "labels": ["kite"]}
    asked = {"role": "user", "content": [{"type": "image", "image": "a.png"}, boxes, {"type": "text", "text": "q"}]}
    question = Question(Record([asked], "prompts.jsonl", 1, {}), [asked])
    image, *rest = _written(asked, question)["content"]
    assert image == {"type": "image", "image": str(tmp_path / "a.png")}
    assert rest == asked["content"][1:]
    inline = {"role": "user", "content": [{"type": "image", "image": b"png"}]}
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: its image is no file"):
        _written(inline, question)


def test_what_was_asked_is_not_asked_again(world, tmp_path):
    left = 5

    def stops(body):
        nonlocal left
        left -= 1
        return likes_length(body) if left >= 0 else Failure(401)

    folder = tmp_path / "out" / "round-1"
    with FakeAPI(stops) as api:
        wanted = recipe(world, tmp_path / "out", api.url)
        with pytest.raises(UserError, match="401"):
            run_rounds(wanted, QUIET)
        assert not (folder / "round.json").exists()
        policy = (folder / "policy.jsonl").read_bytes()
        kept = (folder / "judge.jsonl").read_text().count("\n")
        left = 10_000
        (result,) = run_rounds(wanted, QUIET)
        assert result.judge_calls["kept"] == kept > 0
        assert (folder / "policy.jsonl").read_bytes() == policy
        asked = len(api.bodies)
        assert run_rounds(wanted, QUIET) == [result]
        assert len(api.bodies) == asked
        with pytest.raises(UserError, match="was begun with another answers"):
            run_rounds(wanted.model_copy(update={"answers": 4}), QUIET)


def test_a_judge_that_answers_nonsense_or_fails(world, tmp_path):
    with (
        FakeAPI(lambda body: "I cannot say.") as api,
        pytest.raises(UserError, match=r"holds no preference \(.*no answer is preferred"),
    ):
        run_rounds(recipe(world, tmp_path / "a", api.url), QUIET)
    calls = 0

    def sometimes(body):
        nonlocal calls
        calls += 1
        return Failure(400) if calls == 3 else likes_length(body)

    with FakeAPI(sometimes) as api:
        (result,) = run_rounds(recipe(world, tmp_path / "b", api.url), QUIET)
    assert result.verdicts["failed"] == 1
    assert result.judge_calls["failed_calls"] == 1
    assert result.pairs


def test_a_local_judge_and_the_critics_prompt(world, tmp_path):
    import llavakit

    judge = llavakit.load(world / "policy" / "final")
    wanted = recipe(world, tmp_path / "out", "http://h/v1", comparison="critic")
    with pytest.raises(UserError, match="holds no preference"):  # a policy is no critic
        run_rounds(wanted, QUIET, judge=judge)
    critic = COMPARISONS.build({"type": "critic"})
    assert critic.verdict("Better Response: [second]") == "second"
    asked = critic.messages([{"type": "image", "image": "a.png"}], "What?", "one", "two")
    assert [part["type"] for part in asked[0]["content"]] == ["image", "text"]


def test_plans_and_mistakes(world, tmp_path):
    wanted = recipe(world, tmp_path / "out", "http://h/v1", rounds=3)
    assert calls_of(wanted, 4) == {"answers": 36, "comparisons": 72}
    assert next(read_questions(wanted)).text.startswith("what colour is the square ?")
    file = tmp_path / "rounds.yaml"
    file.write_text(json.dumps(wanted.model_dump(mode="json")))
    runner = CliRunner()
    result = runner.invoke(app, ["prefer", str(file), "--plan", "--json"])
    assert json.loads(result.stdout) == {"answers": 36, "comparisons": 72}
    for override, said in (
        ("answers=1", "answers"),
        ("comparison=x", "unknown comparison of answers 'x'"),
        ("stage.learning_rat=1", "learning_rat: unknown key"),
        ("sampling.temperature=0", "temperature"),
        ("prompts.0.path=none.json", "none.json"),
    ):
        result = runner.invoke(app, ["prefer", str(file), override])
        assert said in str(result.exception)
    assert not (tmp_path / "out").exists()
