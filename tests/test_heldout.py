"""Held-out questions of a recipe: answered while it trains, scored beside the untrained and blind model at the end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_projects import COLOURS, picture
from tiny_server import small_chat
from tiny_training import recipe, write_world

from llavakit.checkpoints.convert import save
from llavakit.checkpoints.files import read_folder
from llavakit.errors import RecipeError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.generation.chat import Chat
from llavakit.generation.request import RequestFailed
from llavakit.projects.create import create
from llavakit.training.heldout import Questions, Samples, answer_now
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Forty squares in folders named by their colour, and a tiny model that is to learn them."""
    folder = tmp_path_factory.mktemp("project")
    for number in range(40):
        colour = list(COLOURS)[number % 4]
        picture(folder / "squares" / colour / f"{number}.png", number, colour)
    chat = small_chat()
    save(chat.model.state_dict(), chat.model.config, chat.processor, folder / "model")
    create(folder / "squares", folder / "p", model=str(folder / "model"))
    return folder / "p"


def run(project: Path, *overrides: str) -> tuple[Path, str]:
    console = Console(file=io.StringIO(), width=200)
    result = train(project / "recipe.yaml", overrides, console=console)
    return result.output, console.file.getvalue()


def test_training_answers_held_out_questions_and_ends_with_a_page(project, tmp_path, monkeypatch):
    steps = ("stages.tune.max_steps=6", "heldout.every=2")
    output, said = run(project, *steps, f"output={tmp_path / 'run'}")
    answered = [line for line in said.splitlines() if "held out: What does the picture show?" in line]
    assert [line.split(",")[0] for line in answered] == [f"tune: step {step}" for step in (2, 4, 6)]
    assert all("(truth: " in line for line in answered)
    assert said.count("held-out questions: ") == 3
    page = (output / "report.html").read_text()
    for part in ("before training", "trained, without pictures", "llavakit serve", "llavakit chat", "<svg"):
        assert part in page
    questions = (output / "heldout" / "questions.jsonl").read_text().splitlines()
    assert len(questions) == 8
    assert page.count("data:image/png;base64,") == 8
    assert "http" not in page.replace("http-equiv", "")
    blind = [json.loads(line) for line in (output / "heldout" / "blind.jsonl").read_text().splitlines()]
    assert {Path(row["image"]).name for row in blind} == {"8x8.png"}
    assert [row["answer"] for row in blind] == [json.loads(line)["answer"] for line in questions]
    stamp = (output / "report.html").stat().st_mtime_ns
    _, again = run(project, *steps, f"output={tmp_path / 'run'}")
    assert "asking" not in again
    assert (output / "report.html").stat().st_mtime_ns == stamp
    quiet, _ = run(project, "stages.tune.max_steps=6", "heldout=null", f"output={tmp_path / 'quiet'}")
    ours, theirs = read_folder(output / "final"), read_folder(quiet / "final")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interrupt_goes_on_where_it_was(project, tmp_path, monkeypatch):
    options = ("stages.tune.max_steps=6", "stages.tune.save_steps=2", "heldout.every=3")
    whole, _ = run(project, *options, f"output={tmp_path / 'whole'}")
    answers = Samples.on_step_end

    def stop(self, args, state, control, **kwargs):
        answers(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Samples, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        run(project, *options, f"output={tmp_path / 'cut'}")
    monkeypatch.setattr(Samples, "on_step_end", answers)
    cut, said = run(project, *options, f"output={tmp_path / 'cut'}")
    assert "goes on after step 2" in said
    assert (cut / "report.html").is_file()
    ours, theirs = read_folder(cut / "final"), read_folder(whole / "final")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_report_that_cannot_be_made_leaves_the_model(project, tmp_path, monkeypatch):
    from llavakit.errors import UserError
    from llavakit.training import outcome

    def fail(*args):
        raise UserError("no memory")

    monkeypatch.setattr(outcome, "_ask", fail)
    output, said = run(project, "stages.tune.max_steps=1", f"output={tmp_path / 'run'}")
    assert "the model is finished, but not its report: no memory" in said
    assert (output / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("heldout.questions=none.jsonl", r"heldout.questions: none.jsonl: cannot be read"),
        ("heldout.task=exact_mach", r"heldout.task: unknown benchmark 'exact_mach'; did you mean 'exact_match'"),
        ("heldout.task=vqav2", r"heldout.task: the questions of 'vqav2' come without answers"),
        ("heldout.images=elsewhere", r"heldout.images: there is no file"),
        ("heldout.evry=1", r"heldout.evry: unknown key"),
    ],
)
def test_wrong_questions_are_found_before_the_first_step(project, tmp_path, override, said):
    with pytest.raises(RecipeError, match=said):
        run(project, override, f"output={tmp_path / 'run'}")


def test_a_model_from_parts_has_none_before_it(project, tmp_path):
    folder = write_world(tmp_path)
    heldout = load_recipe(project / "recipe.yaml").heldout.model_dump() | {"limit": 2}
    console = Console(file=io.StringIO(), width=200)
    train(parse_recipe(recipe(folder, heldout=heldout)), console=console)
    said = console.file.getvalue()
    assert said.count("asking 2 held-out questions") == 2
    assert "it looks at the picture" in said
    assert "before training" not in said


def test_an_answer_that_fails_is_shown_as_such(monkeypatch):
    chat = small_chat()
    chat.model.train()
    monkeypatch.setattr(Chat, "answer_all", lambda *_, **__: (_ for _ in ()).throw(RequestFailed("out of memory")))
    assert answer_now(chat.model, chat.processor, Question("1", "What?", ())) == "(out of memory)"
    assert chat.model.training


def test_answers_of_lists_are_shown():
    assert Questions([{"answers": ["a", 1]}], [], Path()).truth(0) == "a / 1"
