"""`llavakit show`: what is shown of a sample is what the model gets, for every system."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from tiny_recipes import MARKS, REFLECTIVE
from tiny_server import small_chat
from tiny_staged import in_stages

from llavakit.checkpoints.convert import save
from llavakit.cli import app as cli
from llavakit.errors import UserError
from llavakit.inspection.model import look_with
from llavakit.inspection.sample import SEPARATOR, SPECIAL, VISUAL, read_sample
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.splice.scatter import IGNORE
from llavakit.system import get_system, systems
from llavakit.training.objectives.base import objective_of
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.scaling import scale

OF_VIDEOS = ("surgical-llava",)
OF_VOLUMES = ("medm-vl",)
WITHOUT_TOKENS = {"robust-clip": "trains an encoder alone", "llava-interactive": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "scene"
    write_world("scene", folder, n=12, seed=0, size=32, videos=True)
    tiny_tokenizer(json.loads((folder / "texts.json").read_text()), specials=(*MARKS, *REFLECTIVE)).save_pretrained(
        folder / "tokenizer"
    )
    write_world("thorax", folder / "thorax", n=2, seed=0, size=32, volumes=True)
    return folder


def small_recipe(slug: str, world: Path, folder: Path) -> Path:
    """The system's recipe with tiny parts, as a file."""
    raw = scale(load_recipe(get_system(slug).recipe), vocab=1300, patch_size=4, image_size=16).model_dump(mode="json")
    raw["parts"]["tokenizer"] = str(world / "tokenizer")
    sections = [raw["parts"]["media"] or {}, *(stage["media"] or {} for stage in raw["stages"])]
    for media in sections:  # ids of other tokenizers
        for route in media.values():
            arrange = route.get("arrange", {})
            arrange |= {key: [7] for key in ("before", "after") if key in arrange}
            arrange |= {"column_separator": 5, "row_separator": 6} if slug == "llava-uhd" else {}
    raw["output"] = str(folder / "run")
    path = folder / f"{slug}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def record_for(slug: str, world: Path, folder: Path) -> str:
    if slug == "llava-o1":
        return f"{world / in_stages(world)}:1"
    if slug == "med42-v2":
        turns = [{"from": "human", "value": "What is there?"}, {"from": "gpt", "value": "A disc."}]
        (folder / "text.json").write_text(json.dumps([{"conversations": turns}]))
        return str(folder / "text.json")
    if slug in OF_VOLUMES:
        records = json.loads((world / "thorax" / "train.json").read_text())
        return f"{world / 'thorax' / 'train.json'}:{1 + next(n for n, r in enumerate(records) if 'volume' in r)}"
    kind = "video" if slug in OF_VIDEOS else "image"
    records = json.loads((world / "train.json").read_text())
    return f"{world / 'train.json'}:{1 + next(n for n, r in enumerate(records) if isinstance(r.get(kind), str))}"


def supervised_stage(path: Path) -> str:
    """The last stage that learns conversations; preferences are pairs of them."""
    stages = load_recipe(path).stages
    return next(stage.name for stage in reversed(stages) if stage.objective.type != "dpo")


@pytest.mark.parametrize("slug", [slug for slug in systems() if slug not in WITHOUT_TOKENS])
def test_a_record_of_each_system_is_shown_as_it_is_trained_in_under_two_seconds(slug, world, tmp_path):
    card = get_system(slug)
    path = small_recipe(slug, world, tmp_path) if card.recipe else small_recipe("llava-1.5", world, tmp_path)
    sample, stage = record_for(slug, world, tmp_path), supervised_stage(path)
    begin = time.process_time()
    seen = look_with(sample, str(path), stage=stage)
    assert time.process_time() - begin < 2
    assert seen.training
    assert seen.learned
    assert (
        sum(item.visual for item in seen.media)
        == seen.count(VISUAL)
        == (0 if slug == "med42-v2" else seen.count(VISUAL))
    )
    assert sum(item.separators for item in seen.media) == seen.count(SEPARATOR)
    assert bool(seen.media) == (slug != "med42-v2")
    assert len(seen.pictures) == sum(len(item.views) for item in seen.media)
    recipe = load_recipe(path)
    number = [one.name for one in recipe.stages].index(stage)
    objective = objective_of(recipe.stages[number])
    objective.bind(*objective.describe(recipe))
    encoded = objective.conversations.encode(read_sample(sample))
    assert [token.id for token in seen.tokens] == list(map(int, encoded["input_ids"]))
    assert [token.learned for token in seen.tokens] == [int(label) != IGNORE for label in encoded["labels"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    chat = small_chat()
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(chat.model.state_dict(), chat.model.config, chat.processor, folder)
    return folder


def test_in_the_terminal_as_json_and_as_a_page(model, world, tmp_path, capsys):
    records = json.loads((world / "train.json").read_text())
    number = 1 + next(n for n, record in enumerate(records) if isinstance(record.get("image"), str))
    sample = f"{world / 'train.json'}:{number}"
    answer = records[number - 1]["conversations"][1]["value"]
    assert cli.run(["show", sample, str(model)]) == 0
    shown = capsys.readouterr().out
    assert "visual tokens of image 1]" in shown
    assert answer in shown.replace("⟦", "").replace("⟧", "")
    assert cli.run(["show", sample, str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    learned = "".join(token["text"] for token in facts["tokens"] if token["learned"])
    assert answer in learned
    assert facts["positions"]["learned"] == sum(token["learned"] for token in facts["tokens"])
    assert cli.run(["show", sample, str(model), "--tokens"]) == 0
    assert f"{facts['positions']['visual']} of media item 1" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert cli.run(["show", sample, str(model), "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(facts["media"][0]["views"])
    assert 'class="learned"' in text
    assert "http" not in text.replace("http-equiv", "")


def test_a_question_and_a_picture_are_shown_as_prompts(model, world, capsys):
    sample = str(world / "heldout_questions.jsonl")
    assert not look_with(sample, str(model)).training
    picture = next((world / "images").glob("*.png"))
    seen = look_with(str(picture), str(model), prompt="How many?")
    assert [item.name for item in seen.media] == [picture.name]
    assert "How many?" in "".join(token.text for token in seen.tokens)
    assert not seen.learned
    assert any(token.kind == SPECIAL for token in seen.tokens)
    assert any("</s>" in stop for stop in seen.stops)


def test_mistakes_are_one_line(model, world, tmp_path):
    records, recipe = str(world / "train.json"), str(small_recipe("llava-1.5", world, tmp_path))
    encoder = {"name": "fare", "train": ["all"], "learning_rate": 1e-5, "objective": "fare"}
    raw = yaml.safe_load(Path(recipe).read_text()) | {"stages": [encoder]}
    parse_recipe(raw)
    (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(raw))
    for arguments, options, said in (
        ((f"{records}:99999", str(model)), {}, "there is no record in this line"),
        (("none.png", str(model)), {}, "no such file; name a media file"),
        ((records, str(model)), {"prompt": "x"}, "belongs to a media file"),
        ((records, recipe), {"stage": "tun"}, "has no such stage"),
        ((records, str(model)), {"stage": "tune"}, "belongs to a recipe"),
        ((records, str(tmp_path / "encoder.yaml")), {}, WITHOUT_TOKENS["robust-clip"]),
        ((str(next((world / "videos").iterdir())), str(model)), {}, "takes no video"),
    ):
        with pytest.raises(UserError, match=said):
            look_with(*arguments, **options)
