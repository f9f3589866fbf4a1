"""The contrastive objective: both sides train, the encoder is used elsewhere, and its space retrieves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, CLIPVisionModel

from llavakit.data.preparation import prepare
from llavakit.errors import CheckpointError, RecordError, UserError
from llavakit.evaluation.score import score
from llavakit.training.build import build_model
from llavakit.training.recipe import parse_recipe
from llavakit.training.run import TrainResult, train
from llavakit.training.trainer import StageTrainer
from llavakit.vision.pairs import Pair, contrastive_loss, text_ids

TEXT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}
OBJECTIVE = {"type": "contrastive", "text_config": TEXT, "width": 16, "pool": "mean"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_training.write_world(tmp_path_factory.mktemp("contrastive"))
    records = json.loads((folder / "records.json").read_text())
    (folder / "pairs.json").write_text(json.dumps([record for record in records if "image" in record]))
    return folder


def run(
    world: Path, out: Path, objective: dict[str, Any] | None = None, file: str = "pairs.json", **stage: Any
) -> TrainResult:
    raw = tiny_training.recipe(world, output=str(out))
    parts = {"vision_config": raw["parts"]["vision_config"], "media": raw["parts"]["media"]}
    base = {"name": "pairs", "train": ["all"], "batch_size": 8, "max_steps": 6, "log_steps": 1, "learning_rate": 3e-3}
    base |= {"save_steps": 2, "objective": {"tokenizer": str(world / "tokenizer")} | OBJECTIVE | (objective or {})}
    data = [{"path": str(world / file), "images": str(world / "images")}]
    recipe = {"output": str(out), "parts": parts, "data": data, "stages": [base | stage]}
    return train(parse_recipe(recipe), console=Console(quiet=True))


def curve(result: TrainResult, key: str = "loss") -> list[float]:
    return [entry[key] for entry in result.stages[0].metrics["log"]]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("trained"), max_steps=60)


def test_the_loss_is_clips_and_identical_texts_share_their_target():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(4, 3, generator=generator) for _ in range(2))
    scale = torch.tensor(0.7)
    scores = (
        torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T * scale.exp()
    )
    own = torch.arange(4)
    wanted = (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, scale).mean(), wanted)
    torch.testing.assert_close(contrastive_loss(7 * images, texts / 3, scale).mean(), wanted)
    texts[1] = texts[0]
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    swapped = contrastive_loss(images[[1, 0, 2, 3]], texts, scale, same)
    torch.testing.assert_close(swapped.sum(), contrastive_loss(images, texts, scale, same).sum())
    huge = contrastive_loss(images, texts, torch.tensor(99.0))
    torch.testing.assert_close(huge, contrastive_loss(images, texts, torch.tensor(100.0).log()))


def test_both_sides_train_and_go_on_after_a_kill(world, tmp_path, monkeypatch):
    whole = run(world, tmp_path / "whole")
    inner = StageTrainer.training_step

    def stop(self, *args):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return inner(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut")
    monkeypatch.undo()
    rest = run(world, tmp_path / "cut")
    assert curve(rest) == curve(whole)
    for file in ("model.safetensors", "text/model.safetensors", "joint.safetensors"):
        first, second = (load_file(result.final / file) for result in (whole, rest))
        assert all(torch.equal(first[name], second[name]) for name in first), file


def test_pictures_find_their_texts(trained):
    assert curve(trained, "nearest")[-1] > 0.9
    assert curve(trained)[-1] < 0.5 * curve(trained)[0]


def test_the_encoder_is_what_transformers_and_recipes_read(world, trained):
    pair = Pair.load(trained.final)
    state = pair.vision_tower.state_dict()
    read = CLIPVisionModel.from_pretrained(trained.final).state_dict()
    assert set(read) == set(state)
    assert all(torch.equal(read[name], state[name]) for name in read)
    raw = tiny_training.recipe(world)
    raw["parts"]["init"] = {"vision_tower": str(trained.final)}
    model, _ = build_model(parse_recipe(raw))
    weight = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(
        model.model.vision_tower.state_dict()[weight], load_file(trained.final / "model.safetensors")[weight]
    )


def test_retrieval_by_the_command(world, trained, tmp_path):
    """Records of one colour have one text, so the nearest may be another's: compare per colour."""
    records = json.loads((world / "pairs.json").read_text())
    seen, chosen = set(), []
    for record in records:
        colour = record["conversations"][1]["value"]
        if colour not in seen:
            seen.add(colour)
            chosen.append(record)
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    options = {"encoder": str(trained.final), "images": str(world / "images"), "batch_size": 3}
    counts = prepare("pair_features", tmp_path / "chosen.json", tmp_path / "f.safetensors", **options)
    assert (counts["records"], counts["written"]) == (len(chosen), len(chosen))
    lines = [{"id": n, "text": record["conversations"][1]["value"]} for n, record in enumerate(chosen)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = "image_to_text_R@1,text_to_image_R@1"
    found = score("report", *[tmp_path / "r.jsonl"] * 2, features=tmp_path / "f.safetensors", metrics=names)
    assert [row["value"] for row in found["metrics"]["scores"].values()] == [100, 100]
    (tmp_path / "broken.json").write_text(json.dumps([chosen[0], {"image": chosen[0]["image"]}]))
    with pytest.raises(RecordError, match=r"broken.json:2: text: is missing"):
        prepare("pair_features", tmp_path / "broken.json", tmp_path / "g.safetensors", **options)
    assert not (tmp_path / "g.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"holds no joint.safetensors"):
        prepare("pair_features", tmp_path / "chosen.json", tmp_path / "g", **options | {"encoder": str(world)})


def test_padding_changes_no_text(world, trained):
    from transformers import AutoTokenizer

    pair, tokenizer = Pair.load(trained.final).eval(), AutoTokenizer.from_pretrained(trained.final / "text")
    with torch.no_grad():
        both = pair.embed_texts(*text_ids(["red", "the square is blue here"], tokenizer, 32))
        alone = pair.embed_texts(*text_ids(["red"], tokenizer, 32))
    torch.testing.assert_close(both[:1], alone, atol=1e-6, rtol=1e-5)
    assert text_ids(["", "red green blue"], tokenizer, 2)[0].shape == (2, 2)


def test_a_published_text_side_is_loaded(world, tmp_path):
    torch.manual_seed(0)
    published = BertModel(BertConfig(**{key: value for key, value in TEXT.items() if key != "model_type"}))
    published.save_pretrained(tmp_path / "bert")
    options = {"text": str(tmp_path / "bert"), "text_config": None, "pool": "first"}
    result = run(world, tmp_path / "out", options, max_steps=1, learning_rate=0)
    pair = Pair.load(result.final)
    assert pair.config.pool == "first"
    state = published.state_dict()
    found = pair.text_tower.state_dict()
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(found[name], state[name])


@pytest.mark.parametrize(
    ("objective", "stage", "message"),
    [
        ({}, {"batch_size": 1}, "batch_size: a pair is told from the others"),
        ({"text_config": None}, {}, "give either text"),
        ({"text_config": TEXT | {"vocab_size": 8}}, {}, "the text side's vocabulary 8"),
        ({"text_config": TEXT | {"hiden_size": 8}}, {}, "text_config.hiden_size: unknown key"),
        ({"tokenizer": "gone/gone/gone"}, {}, "gone/gone/gone"),
        ({"pool": "last"}, {}, "pool"),
    ],
)
def test_what_does_not_fit_is_one_line(world, tmp_path, objective, stage, message):
    with pytest.raises(UserError, match=message) as caught:
        run(world, tmp_path, objective, **stage)
    assert "\n" not in str(caught.value)


def test_records_need_a_text(world, tmp_path):
    (world / "bare.json").write_text(json.dumps([{"image": "0.png"}] * 4))
    with pytest.raises(RecordError, match="text: is missing"):
        run(world, tmp_path, file="bare.json")


def test_the_recipe_of_llava_rads_encoder_trains_made_small(world, tmp_path):
    from llavakit.system import get_system
    from llavakit.training.recipe import load_recipe

    raw = load_recipe(get_system("llava-rad").recipe.with_name("encoder.yaml")).model_dump()
    published = raw["stages"][0]["objective"]
    assert (published["type"], published["width"], published["length"]) == ("contrastive", 512, 256)
    raw["parts"]["vision_config"] |= {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    raw["parts"]["vision_config"] |= {"image_size": 24, "patch_size": 8}
    raw["parts"]["media"]["image"]["views"]["size"] = 24
    raw["stages"][0] |= {"batch_size": 4, "max_steps": 2, "bf16": False, "dtype": "float32", "workers": 0}
    raw["stages"][0]["objective"] |= {"text": None, "text_config": TEXT, "tokenizer": str(world / "tokenizer")}
    raw["data"] = [{"name": "pairs", "path": str(world / "pairs.json"), "images": str(world / "images")}]
    result = train(parse_recipe(raw | {"output": str(tmp_path)}), console=Console(quiet=True))
    assert Pair.load(result.final).vision_tower.config.model_type == "dinov2"
