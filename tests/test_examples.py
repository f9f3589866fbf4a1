"""The scripts under `examples/` run as they are shown, and stay short."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image
from test_retrieval import clip_folder
from tiny_server import small_chat
from tiny_training import recipe, write_world

from llavakit.checkpoints.convert import save
from llavakit.phantom.write import write_world as write_phantom

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
FRAME = {"type": "squash", "size": tiny.SIZE}
MEDIA = {
    "image": {"views": FRAME, "arrange": {"type": "flat"}},
    "video": {"views": {"type": "frames", "frame": FRAME}, "arrange": {"type": "flat"}},
    "volume": {"views": {"type": "volume_slices", "size": tiny.SIZE, "slices": 2, "window": [-1000, 1000]}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A tiny model for pictures, videos and volumes, and what the scripts are given."""
    folder = tmp_path_factory.mktemp("examples")
    chat = small_chat(media=MEDIA)
    save(chat.model.state_dict(), chat.model.config, chat.processor, folder / "model")
    write_phantom("scene", folder / "scene", n=3, seed=0, size=24, videos=True, progress=False)
    np.save(folder / "ct.npy", np.random.default_rng(0).integers(-1000, 1000, (6, 20, 20)).astype(np.int16))
    clip_folder(folder / "clip")
    pages = [{"id": str(n), "title": word, "text": f"the square is {word}"} for n, word in enumerate(("red", "blue"))]
    write(folder / "pages.jsonl", pages)
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    question = {"question_id": "1", "image": "red.png", "text": "Which colour?", "answer": "red"}
    write(folder / "questions.jsonl", [question, question | {"question_id": "2"}])
    write(folder / "answers.jsonl", [{"question_id": n, "text": "It is red."} for n in ("1", "2")])
    pair = {"prompt": "Which colour?", "chosen": "red", "rejected": "blue", "image": "red.png"}
    write(folder / "pairs.jsonl", [pair] * 4)
    write_world(folder / "squares")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder / "squares")))
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(name: str, files: Path, out: Path) -> list[str]:
    model, picture = str(files / "model"), str(files / "red.png")
    video = str(next((files / "scene" / "videos").iterdir()))
    short = ["stages.align.max_steps=1", "stages.tune.max_steps=1", f"output={out / 'run'}"]
    return {
        "chat": [model, picture, "What is it?", "And what else?"],
        "batch": [model, str(files / "scene" / "images"), "What is it?", str(out / "out.jsonl")],
        "video": [model, video, "What moves?", "0", "0.5"],
        "ct": [model, str(files / "ct.npy"), "Is there an effusion?"],
        "own_encoder": [str(files / "recipe.yaml"), *short],
        "own_connector": [str(files / "recipe.yaml"), *short],
        "own_benchmark": [model, str(files / "questions.jsonl"), str(out / "answers.jsonl")],
        "judge": [model, str(files / "answers.jsonl"), str(files / "questions.jsonl")],
        "retrieval": [str(files / "clip"), str(files / "pages.jsonl"), str(out / "store"), "red"],
        "tools": [model, picture, "How bright is it?"],
        "dpo": [model, str(files / "pairs.jsonl"), str(out / "run"), "stages.prefer.max_steps=1"],
    }[name]


EXPECTED = {
    "chat": "> And what else?",
    "batch": "answers in ",
    "ct": "6 x 20 x 20 voxels from ",
    "own_encoder": "/run/final",
    "own_connector": "/run/final",
    "own_benchmark": "mentioned",
    "judge": "right, ",
    "retrieval": "2 passages of 2 pages",
    "dpo": "% of the pairs are told apart",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_shown(name, files, tmp_path, monkeypatch, capsys):
    if name == "retrieval":
        pytest.importorskip("lancedb")
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *arguments(name, files, tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert EXPECTED.get(name, "\n") in capsys.readouterr().out
    if name == "batch":
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert len(rows) == len(list((files / "scene" / "images").iterdir()))
        assert all("answer" in row for row in rows)


def test_scripts_are_short_and_say_how_they_are_called():
    assert len(SCRIPTS) == 11
    for name in SCRIPTS:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 40
        assert f"python examples/{name}.py " in text.partition('"""')[2].partition('"""')[0]
        assert f"]({name}.py)" in (EXAMPLES / "README.md").read_text()
