"""`llavakit doctor --blind`: a model that sees is told from one that does not, and from questions that cannot tell."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import llavakit
from llavakit.cli.app import run
from llavakit.conversation.turns import TextDelta
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.blind import CANNOT_TELL, DOES_NOT, USES, check_blind
from llavakit.evaluation.controls import blanked, spread_over, swapped
from llavakit.generation.responder import Responder
from llavakit.media.image import load_image
from llavakit.media.video import load_video
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.training.recipe import Recipe
from llavakit.training.run import train

spec = importlib.util.spec_from_file_location(
    "does_it_see", Path(__file__).parents[1] / "benchmarks" / "does_it_see.py"
)
does_it_see = importlib.util.module_from_spec(spec)
spec.loader.exec_module(does_it_see)

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
TEXT = "What colour is it?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of 48 pictures of one of four colours each, with questions and training records."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    rows, records = [], []
    for number in range(48):
        name, colour = list(COLOURS.items())[number % 4]
        values = np.array(colour) + rng.normal(0, 12, (tiny.SIZE, tiny.SIZE, 3))
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"question_id": number, "image": f"{number}.png", "text": TEXT, "answer": name})
        turns = [{"from": "human", "value": f"<image>\n{TEXT}"}, {"from": "gpt", "value": name}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def trained(pictures):
    """A model of 30,000 parameters that has learnt the four colours."""
    tokenizer = tiny_tokenizer([TEXT, *COLOURS], vocab_size=700)
    tokenizer.save_pretrained(pictures / "tokenizer")
    config = tiny.config(media={"image": {"views": {"type": "squash", "size": tiny.SIZE}, "arrange": {"type": "flat"}}})
    text = config.text_config.to_dict() | {"vocab_size": len(tokenizer) + 1, "initializer_range": 0.15}
    rates = dict.fromkeys(("vision_tower", "multi_modal_projector", "language_model"), 3e-3)
    stage = {"name": "all", "train": rates, "learning_rate": 3e-3, "epochs": 16, "batch_size": 16, "clip": 1.0}
    recipe = {
        "system": "llava-1.5",
        "parts": {
            "text_config": text,
            "vision_config": dict(tiny.ENCODERS["clip"]),
            "connector": {"type": "mlp", "depth": 2},
            "media": config.media,
            "image_token_id": len(tokenizer),
            "template": "v1",
            "tokenizer": str(pictures / "tokenizer"),
        },
        "data": [{"path": str(pictures / "train.json"), "name": "colours"}],
        "stages": [stage],
        "output": str(pictures / "model"),
    }
    return train(Recipe.model_validate(recipe)).final


def checked(model, pictures, folder, **options):
    return check_blind(model, "exact_match", pictures / "questions.jsonl", folder, batch_size=16, **options)


def test_a_trained_model_uses_the_picture(trained, pictures, tmp_path):
    found = checked(llavakit.load(trained), pictures, tmp_path)
    assert found["verdict"] == USES, found
    assert found["scores"]["right"]["value"] > 90
    assert found["gains"]["other"]["low"] > 30
    assert found["gains"]["blank"]["low"] > 30
    assert found["n"] == found["pictures"] == 48


@pytest.mark.parametrize(
    "name",
    [
        "connector zeroed",
        "the picture is dropped from the prompt",
        "always the first picture (stale cache)",
        "encoder: patch embedding zero",
    ],
)
def test_a_model_cut_off_from_its_pictures_is_caught(trained, pictures, tmp_path, name):
    chat = llavakit.load(trained)
    does_it_see.BLINDED[name](chat)
    found = checked(chat, pictures, tmp_path)
    assert found["verdict"] == DOES_NOT, found


def test_damage_that_leaves_a_use_is_no_blindness(trained, pictures, tmp_path):
    chat = llavakit.load(trained)
    does_it_see.DAMAGED["half the resolution"](chat)
    assert checked(chat, pictures, tmp_path)["verdict"] == USES


class Painter(Responder):
    """Names the colour of the picture in a share of cases, otherwise one that the question's number decides."""

    def __init__(self, sees, knows=()):
        super().__init__(name="painter")
        self.sees, self.knows = sees, knows

    def run(self, call):
        image = next(part["image"] for part in call.messages[0]["content"] if part["type"] == "image")
        mean = np.asarray(load_image(image), float).mean((0, 1))
        seen = min(COLOURS, key=lambda name: abs(mean - COLOURS[name]).sum())
        place = int(mean.sum() * 1000)
        yield TextDelta(text=seen if place % 100 < self.sees else list(COLOURS)[place % 4])


class Sage(Responder):
    """Knows the answer from the question alone."""

    def run(self, call):
        yield TextDelta(text=call.messages[0]["content"][-1]["text"].split()[-1])


def test_too_few_questions_cannot_tell(pictures, tmp_path):
    assert checked(Painter(100), pictures, tmp_path / "all")["verdict"] == USES
    found = checked(Painter(20), pictures, tmp_path / "few", limit=5)
    assert found["verdict"] == CANNOT_TELL
    assert "--limit" in found["why"]
    assert found["n"] == 5


def test_questions_that_need_no_picture_accuse_nobody(pictures, tmp_path):
    rows = [json.loads(line) for line in (pictures / "questions.jsonl").read_text().splitlines()]
    file = pictures / "easy.jsonl"
    file.write_text("".join(json.dumps(row | {"text": f"Say {row['answer']}"}) + "\n" for row in rows))
    found = check_blind(Sage(name="sage"), "exact_match", file, tmp_path)
    assert found["verdict"] == CANNOT_TELL
    assert "answered without their pictures" in found["why"]


def test_answers_are_kept_and_not_asked_again(pictures, tmp_path):
    class Counting(Painter):
        asked = 0

        def run(self, call):
            Counting.asked += 1
            yield from super().run(call)

    first = checked(Counting(100), pictures, tmp_path, limit=20)
    assert Counting.asked == 60
    assert checked(Counting(100), pictures, tmp_path, limit=20) == first
    assert Counting.asked == 60


def test_controls_show_other_pictures(pictures, tmp_path):
    def about(number, name):
        return Question(number, TEXT, ({"type": "image", "image": str(pictures / name)},))

    questions = [about(number, f"{number % 8}.png") for number in range(16)]
    others = swapped(questions, questions)
    assert all(other.media[0]["image"] != own.media[0]["image"] for other, own in zip(others, questions, strict=True))
    assert [other.question_id for other in others] == list(range(16))
    assert others == swapped(questions[::-1], questions)[::-1]  # whatever else is asked
    assert others != swapped(questions, questions, seed=1)
    blank = load_image(blanked(questions)[0].media[0]["image"])
    assert (blank.size, blank.getextrema()) == ((tiny.SIZE, tiny.SIZE), ((0, 0),) * 3)
    video = Question(0, TEXT, ({"type": "video", "video": [Image.new("RGB", (6, 4), "red")] * 3},))
    frames = load_video(blanked([video])[0].media[0]["video"]).frames
    assert [(frame.size, frame.getextrema()) for frame in frames] == [((6, 4), ((0, 0),) * 3)] * 3
    with pytest.raises(UserError, match="question '0': there is no other picture"):
        swapped([about(0, "0.png")], [about(1, "0.png")])
    for address in ("data:image/png;base64,{}", "http://localhost/{}.png"):  # told apart although they are no files
        first, other = (Question(n, TEXT, ({"type": "image", "image": address.format(n)},)) for n in range(2))
        assert swapped([first], [first, other])[0].media == other.media
    assert spread_over(list(range(10)), 3) == [0, 3, 6]
    assert spread_over(list(range(3)), 10) == [0, 1, 2]


def test_questions_without_pictures_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 0, "text": "?", "answer": "a"}) + "\n")
    with pytest.raises(UserError, match="no question of it has a picture"):
        check_blind(Sage(name="sage"), "exact_match", tmp_path / "q.jsonl", tmp_path / "out")


def test_the_command(trained, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["--blind", "--task", "exact_match", "--questions", str(pictures / "questions.jsonl"), "--limit", "24"]
    assert run(["doctor", str(trained), *asked]) == 0
    assert "uses the picture" in capsys.readouterr().out
    assert run(["doctor", str(trained), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == USES
    assert run(["doctor", str(trained), "--blind"]) == 2
    assert run(["doctor", str(trained), "--task", "exact_match"]) == 2
    assert run(["doctor", str(trained), *asked, "--attack"]) == 2
    assert "one at a time" in capsys.readouterr().err
