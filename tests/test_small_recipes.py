"""The published recipe of a system, made small, trains on the phantom world through all its stages and then answers."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from tiny_staged import in_stages

import llavakit
from llavakit.data.preparation import prepare
from llavakit.errors import UserError
from llavakit.evaluation.run import evaluate
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.system import get_system
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale

MARKS = ("<image>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
REFLECTIVE = ("[No Retrieval]", "[Retrieval]", "[No Relevant]", "[Relevant]", "<paragraph>", "</paragraph>")
STEPS = {"max_steps": 2, "batch_size": 2, "workers": 0, "shard": False, "log_steps": 1, "max_length": 2048}
WORLDS = {
    "pictures": ("scene", {"size": 48}),
    "scenes": ("scene", {"size": 32, "pairs": True, "videos": True}),
    "thorax": ("thorax", {"size": 32, "volumes": True}),
    "operations": ("procedure", {"size": 24}),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for name, (world, options) in WORLDS.items():
        write_world(world, folder / name, n=12, seed=0, **options)
        texts = json.loads((folder / name / "texts.json").read_text())
        tiny_tokenizer(texts, specials=(*MARKS, *REFLECTIVE)).save_pretrained(folder / name / "tokenizer")
    return folder


def with_tools(folder):
    """Questions whose answers call the detector and go by what it finds."""
    prepare("llava_plus_scenes", folder, folder / "called.json", read=False)
    prepare("llava_plus", folder / "called.json", folder / "tools.json")
    return ["tools.json"] * 2


def text_alone(folder):
    """Questions without their pictures, and preferences for the right answer."""
    turns, pairs = [], []
    for line in (folder / "heldout_questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        asked = {"role": "user", "content": question["text"]}
        turns.append({"messages": [asked, {"role": "assistant", "content": question["answer"]}]})
        pairs.append({"prompt": [asked], "chosen": question["answer"], "rejected": "nothing"})
    for name, rows in (("text", turns), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("slug", "world", "item"),
    [
        ("llava-1.5", "pictures", "image"),
        ("llava-onevision", "scenes", "video"),
        ("llava-next-interleave", "scenes", "video"),
        ("llava-uhd", "pictures", "image"),
        ("inf-llava", "pictures", "image"),
        ("hyper-llava", "pictures", "image"),
        ("mg-llava", "pictures", "image"),
        ("llava-mini", "scenes", "video"),
        ("llava-rad", "pictures", "image"),
        ("llava-med", "pictures", "image"),
        ("kg-llava", "pictures", "image"),
        ("dynamic-llava", "pictures", "image"),
        ("medm-vl", "thorax", "volume"),
        ("surgical-llava", "operations", "video"),
        ("llava-critic", "scenes", "image"),
        ("video-llava", "scenes", "video"),
        ("reflectiva", "pictures", "image"),
        ("llava-o1", "pictures", "image"),
        ("llava-plus", "pictures", "image"),
        ("med42-v2", "pictures", None),
        ("report-error-checking", "pictures", "image"),
    ],
)
def test_trains_through_all_stages_and_answers(worlds, tmp_path, slug, world, item):
    folder = worlds / world
    recipe = scale(load_recipe(get_system(slug).recipe), vocab=1300, patch_size=4, image_size=16, stages=STEPS)
    raw = recipe.model_dump()
    names = ["captions.json"] + ["train.json"] * len(recipe.data)
    if slug == "llava-o1":
        names = [in_stages(folder)]
    if slug == "llava-plus":
        names = with_tools(folder)
    if slug == "med42-v2":
        names = ["text.jsonl" if "preference" not in source.name else "pairs.jsonl" for source in recipe.data]
        text_alone(folder)
        raw["stages"][0]["max_length"] = 64  # of a chunk
    raw["data"] = [
        {"name": source.name, "path": str(folder / name), "images": str(folder)}
        for source, name in zip(recipe.data, names, strict=False)
    ]
    raw["parts"]["tokenizer"] = str(folder / "tokenizer")
    if slug == "llava-uhd":  # its separators are ids of Llama's tokenizer
        with pytest.raises(UserError, match="token id 29892 is outside the vocabulary of 1300"):
            build_meta(parse_recipe(raw))
        for media in (raw["parts"]["media"], *(stage["media"] for stage in raw["stages"] if stage["media"])):
            media["image"]["arrange"] |= {"column_separator": 5, "row_separator": 6}
    if slug in ("surgical-llava", "llava-med"):  # the tokens around a media item have other ids here
        for media in raw["parts"]["media"].values():
            media["arrange"] |= {"before": [5], "after": [6]}
    result = train(parse_recipe(raw | {"output": str(tmp_path / "run")}), console=Console(quiet=True))
    assert [stage.name for stage in result.stages] == [stage.name for stage in recipe.stages]
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
