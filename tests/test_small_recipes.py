"""The published recipe of a system, made small, trains on the phantom world through all its stages and then answers."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from tiny_recipes import STEPS, WORLD_OF, WORLDS, small_recipe, small_world

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.errors import UserError
from llavakit.evaluation.run import evaluate
from llavakit.system import get_system, systems
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for name in WORLDS:
        small_world(folder, name)
    return folder


SYSTEMS = [
    ("llava-1.5", "image"),
    ("llava-onevision", "video"),
    ("llava-next-interleave", "video"),
    ("llava-uhd", "image"),
    ("inf-llava", "image"),
    ("hyper-llava", "image"),
    ("mg-llava", "image"),
    ("llava-mini", "video"),
    ("llava-rad", "image"),
    ("llava-med", "image"),
    ("kg-llava", "image"),
    ("dynamic-llava", "image"),
    ("medm-vl", "volume"),
    ("surgical-llava", "video"),
    ("llava-critic", "image"),
    ("video-llava", "video"),
    ("reflectiva", "image"),
    ("llava-o1", "image"),
    ("llava-plus", "image"),
    ("med42-v2", None),
    ("report-error-checking", "image"),
]


@pytest.mark.parametrize(("slug", "item"), SYSTEMS)
def test_trains_through_all_stages_and_answers(worlds, tmp_path, slug, item):
    folder = worlds / WORLD_OF.get(slug, "pictures")
    raw = small_recipe(slug, folder)
    if slug == "llava-uhd":  # its separators are ids of Llama's tokenizer
        with pytest.raises(UserError, match="token id 29892 is outside the vocabulary of 1300"):
            build_meta(parse_recipe(small_recipe(slug, folder, separators=False)))
    result = train(parse_recipe(raw | {"output": str(tmp_path / "run")}), console=Console(quiet=True))
    assert [stage.name for stage in result.stages] == [stage["name"] for stage in raw["stages"]]
    assert all(len(stage.metrics["log"]) == 2 for stage in result.stages)
    records = json.loads((folder / "train.json").read_text())
    file = next((str(folder / record[item]) for record in records if isinstance(record.get(item), str)), None)
    media = {} if item is None else {item: file}
    chat = llavakit.load(result.final)
    question = [
        *({"type": kind, kind: path} for kind, path in media.items()),
        {"type": "text", "text": "What is there?"},
    ]
    reply = chat.chat([{"role": "user", "content": question}], max_new_tokens=2)
    record = {"question_id": 1, "text": "What is there?", "answer": reply, **media}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record))
    files = tmp_path / "questions.jsonl", tmp_path / "predictions.jsonl"
    found = evaluate(chat, "exact_match", *files, max_new_tokens=2, console=Console(quiet=True))
    assert found["metrics"]["accuracy"] == 100.0


def test_robust_clip_s_encoder_trains_and_takes_its_place_in_another_system(worlds, tmp_path):
    folder, quiet = worlds / "pictures", Console(quiet=True)
    alone = {key: value for key, value in STEPS.items() if key != "max_length"} | {"warmup": 1, "save_steps": None}
    fare = scale(load_recipe(get_system("robust-clip").recipe), patch_size=4, image_size=16, stages=alone).model_dump()
    records = json.loads((folder / "captions.json").read_text())
    (folder / "seen.jsonl").write_text("".join(json.dumps({"image": one["image"]}) + "\n" for one in records))
    fare["data"] = [{"path": str(folder / "seen.jsonl"), "images": str(folder)}]
    encoder = train(parse_recipe(fare | {"output": str(tmp_path / "fare")}), console=quiet)
    assert all(entry["loss_adversarial"] > 0 for entry in encoder.stages[0].metrics["log"])
    whole = small_recipe("llava-1.5", folder) | {"output": str(tmp_path / "llava")}
    model = train(parse_recipe(whole | {"stages": whole["stages"][1:]}), console=quiet).final
    convert(model, tmp_path / "robust", to="llavakit", vision_tower=encoder.final, exchange_vision_tower=True)
    parts = [{"type": "image", "image": str(folder / records[0]["image"])}, {"type": "text", "text": "What is there?"}]
    asked = [{"role": "user", "content": parts}]
    answers = [llavakit.load(place).chat(asked, max_new_tokens=2) for place in (model, tmp_path / "robust")]
    assert all(isinstance(answer, str) for answer in answers)


def test_every_recipe_is_tested_small():
    listed = {slug for slug, _ in SYSTEMS} | {"robust-clip"}  # an encoder alone
    assert {slug for slug, system in systems().items() if system.recipe is not None} == listed
