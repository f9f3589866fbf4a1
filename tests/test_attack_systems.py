"""Attacks on systems that tile, slice, sample frames or read the prompt, through their own preprocessing."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny_recipes import small_recipe, small_world

from llavakit.conversation.template import template_for
from llavakit.data.collate import Collator
from llavakit.generation.chat import Chat
from llavakit.robustness.model_attack import TextLoss
from llavakit.robustness.questions import AttackSettings, ModelAttack, to_picture
from llavakit.robustness.run import attack_task
from llavakit.robustness.tasks import open_task
from llavakit.training.build import build_model
from llavakit.training.recipe import parse_recipe

CASES = [
    ("llava-onevision", "image"),  # tiles and the whole picture
    ("llava-onevision", "video"),
    ("llava-next-interleave", "image"),
    ("llava-uhd", "image"),  # slices of its own shapes
    ("inf-llava", "image"),  # two kinds of crops
    ("mg-llava", "image"),  # two encoders
    ("llava-mini", "image"),  # visual tokens are fused with the prompt's
    ("hyper-llava", "image"),  # weights made from the prompt
    ("dynamic-llava", "image"),  # tokens are dropped in the decoder
    ("video-llava", "video"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("attack"), "scenes")
    records = json.loads((folder / "train.json").read_text())
    for kind in ("image", "video"):
        files = [record[kind] for record in records if isinstance(record.get(kind), str)][:2]
        rows = [
            {"question_id": n, kind: file, "text": "What is there?", "answer": "a red square"}
            for n, file in enumerate(files)
        ]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny(slug, world):
    """A system's recipe made small, with random weights."""
    torch.manual_seed(0)
    model, processor = build_model(parse_recipe(small_recipe(slug, world)))
    return Chat(model.eval(), processor)


@pytest.mark.parametrize(("slug", "kind"), CASES, ids=[f"{slug}-{kind}" for slug, kind in CASES])
def test_a_whole_attack_goes_through_the_system_s_own_preprocessing(world, tmp_path, slug, kind):
    chat = tiny(slug, world)
    settings = AttackSettings(eps=16 / 255, steps=4, stages="single")
    task = open_task("exact_match", world / f"{kind}.jsonl")
    result = attack_task(chat, task, tmp_path, settings, max_new_tokens=2, console=Console(quiet=True))
    assert result["clean"]["mean"] == 0.0  # random weights
    assert (tmp_path / "report.html").is_file()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    attacked = [line for line in lines if line["stage"] == 1]
    assert all(line["loss"] > line["loss_start"] for line in attacked)
    assert all(0 < line["largest_change"] <= 16 for line in attacked)

    # what the model reads of the pictures as files has the loss that the attack computed
    attack = ModelAttack(chat, settings)
    row = attack.row(next(iter(task.questions.values())), "a red square")
    ((pixels, _),) = attack.attack([row], towards=False)
    loss = TextLoss(chat.model, [row.sample], lambda points, number: attack.views(row, points))
    with torch.no_grad():
        computed = loss(pixels[None])[0]
    pictures = [to_picture(frame) for frame in pixels]
    part = {"type": kind, kind: pictures if kind == "video" else pictures[0]}
    turns = [
        {"role": "user", "content": [part, {"type": "text", "text": "What is there?"}]},
        {"role": "assistant", "content": "a red square"},
    ]
    placement = template_for(chat.processor.template, chat.processor.tokenizer).placement
    batch = Collator(0)([chat.processor.encode(turns, placement=placement)])
    with torch.no_grad():
        read = chat.model(**batch, use_cache=False).loss
    assert computed == pytest.approx(float(read), abs=5e-3)
    moved = computed - loss(row.clean[None])[0]
    assert moved > 2 * abs(computed - read)
