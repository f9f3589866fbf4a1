"""The package under `examples/` is installed as a third party's, and used."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tiny_server import small_chat

from llavakit import system as cards
from llavakit.checkpoints.convert import save
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MediaSpec

EXAMPLE = Path(__file__).parents[1] / "examples" / "llava-zoom"
MEDIA = {"image": {"views": {"type": "overview_and_middle", "size": tiny.SIZE, "zoom": 2}}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package in a folder of its own on `sys.path`, installed by pip; the cards are read again."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(folder), str(EXAMPLE)], check=True)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    cards.systems.cache_clear()
    yield folder
    sys.path.remove(str(folder))
    cards.systems.cache_clear()


def test_the_card_completes_itself_from_the_folder(installed):
    card = cards.get_system("llava-zoom")
    assert card.recipe == installed / "llava_zoom" / "recipe.yaml"
    assert card.parts["connectors"]["gated_zoom"] == "llava_zoom.connector:GatedZoom"
    assert card.responder == "llava_zoom.responder:SecondLook"
    assert card.parity is None


def test_its_recipe_builds_and_its_parts_work_in_a_model(installed, tmp_path):
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    recipe = cards.get_system("llava-zoom").recipe
    vision = {"vision_config": "openai/clip-vit-large-patch14-336"}
    given = [f"parts.vision_config={vision['vision_config']}", "parts.text_config.model_type=llama", "parts.init={}"]
    small = build_meta(load_recipe(recipe, [*given, "parts.tokenizer=x", "parts.text_config.num_hidden_layers=2"]))
    assert type(small.model.multi_modal_projector).__name__ == "GatedZoom"

    chat = small_chat(media=MEDIA, system="llava-zoom")
    config = LlavakitConfig.from_dict(chat.config.to_dict() | {"connector": {"type": "gated_zoom"}})
    torch.manual_seed(0)
    net = LlavakitForConditionalGeneration(config)
    processor = LlavakitProcessor.from_config(config, chat.processor.tokenizer)
    save(net.state_dict(), config, processor, tmp_path / "model")
    import llavakit

    model = llavakit.load(tmp_path / "model")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    content = [{"type": "image", "image": str(tmp_path / "red.png")}, {"type": "text", "text": "What is this?"}]
    events = list(model.respond([{"role": "user", "content": content}], max_new_tokens=4))
    kinds = [type(event).__name__ for event in events]
    assert kinds[0] == "TraceEvent"
    assert kinds[-1] == "FinishEvent"
    assert "TextDelta" in kinds
    assert model.main.engine.prompts.encoded == 1  # the second look reads the picture's features again, not its pixels


def test_the_gate_opens_in_training(installed):
    config = tiny.config(media=MEDIA).to_dict() | {"connector": {"type": "gated_zoom"}}
    net = LlavakitForConditionalGeneration(LlavakitConfig.from_dict(config))
    plan = MediaSpec(net.config).plan("image", tiny.MediaSize(1, 40, 60))
    assert len(plan.views) == 2
    batch = {"pixel_values": torch.randn(2, 3, tiny.SIZE, tiny.SIZE), "visual_sizes": torch.tensor([[1, 40, 60]])}
    count = net.model.media.count("image", tiny.MediaSize(1, 40, 60))
    assert count == 16
    ids = torch.tensor([[1, *[tiny.TOKEN] * count, 5, 9]])
    net(input_ids=ids, labels=ids.masked_fill(ids == tiny.TOKEN, -100), **batch).loss.backward()
    assert net.model.multi_modal_projector.gate.grad.abs().sum() > 0


def test_the_command_line_lists_it(installed, capsys):
    from llavakit.cli import app

    assert app.run(["systems", "--json"]) == 0
    assert "llava-zoom" in {row["slug"] for row in json.loads(capsys.readouterr().out)}
