"""Recipes, what trains, packed and cached training, LoRA, restarts after a kill, several processes."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_training
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerState

from llavakit.data.collate import Collator
from llavakit.errors import CheckpointError, RecipeError, UserError
from llavakit.language.packed import can_narrow, can_share, packed_attention, packed_row, switch_on
from llavakit.registry import OBJECTIVES
from llavakit.system import systems
from llavakit.training.build import build_meta, build_model, config_of, load_checkpoint, part_config
from llavakit.training.callbacks import Bar
from llavakit.training.check import check_names, check_parts
from llavakit.training.dataset import Samples, StageCollator, open_records, plan_batches
from llavakit.training.features import FeatureCache
from llavakit.training.lora import prepare
from llavakit.training.objectives.language import LanguageObjective
from llavakit.training.parameter_groups import Rates, freeze_all_but, optimizer_groups, public_name, trainable_by_part
from llavakit.training.recipe import PartTraining, load_recipe, parse_recipe
from llavakit.training.recompute import recompute
from llavakit.training.run import TrainResult, train
from llavakit.training.scaling import scale

QUIET = Console(quiet=True)
MINIMAL = {"model": "somewhere", "stages": [{"name": "a", "train": ["multi_modal_projector"], "learning_rate": 1e-3}]}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_world(tmp_path_factory.mktemp("squares"))


def run(world: Path, out: Path, *overrides: str, **changes: Any) -> TrainResult:
    raw = tiny_training.recipe(world, output=str(out), **changes)
    return train(parse_recipe(raw, overrides), console=QUIET)


@pytest.fixture(scope="session")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Both stages as they stand."""
    return run(world, tmp_path_factory.mktemp("plain"))


def losses(result: TrainResult, stage: int = 1) -> list[float]:
    return [entry["loss"] for entry in result.stages[stage].metrics["log"]]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.final / "model.safetensors")


# Recipes


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.0.learnin_rate=1", "stages.0.learnin_rate: unknown key; did you mean 'learning_rate'?"),
        ("stages.0.learning_rate=fast", "stages.0.learning_rate: should be a number, not 'fast'"),
        ("stages.a.batch_size=1.5", "stages.0.batch_size: should be a whole number, not 1.5"),
        ("stages.0.schedule=cosin", "stages.0.schedule: 'cosin' is not possible; did you mean 'cosine'?"),
        ("stages.0.epochs=-1", "stages.0.epochs: should be greater than 0, not -1"),
        ("stages.0.packing=true", "stages.0.packing: needs max_length, the number of tokens in a row"),
        ("stages.0.train.multi_modal_projector.learning_rat=1", "stages.0.train.multi_modal_projector.learning_rat"),
        ("stages.0.lora.rank=big", "stages.0.lora.rank: should be a whole number, not 'big'"),
        ("stages.0.data=[x]", "stages.0.data.0: no source is called 'x'"),
        ("stages.0.train={}", "stages.0.train: nothing trains"),
        ("stages.4.epochs=1", "stages.4: there are 1, numbered from 0"),
        ("stages.b.epochs=1", "stages.b: no item is called 'b'"),
        ("stags.0.epochs=1", "stags: unknown key; did you mean 'stages'?"),
        ("report_to=tensorbord", "report_to.0: 'tensorbord' is not possible; did you mean 'tensorboard'?"),
        ("parts={}", "model: give either `model` (a checkpoint) or `parts` (a new model)"),
        ("stages.0.name=final", "stages.0.name: 'final' is the folder of the finished model"),
        ("learning_rate", "learning_rate: not an assignment; write dotted.key=value"),
        ("seed=4294967296", "seed: should be less than 4294967296, not 4294967296"),
        ("seed=-1", "seed: should be greater than or equal to 0"),
        ("stages.0.seed=99999999999999999999999999", "stages.0.seed: should be less than 4294967296"),
        ("stages.0.batch_size=true", "stages.0.batch_size: should be a number, not true"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate: should be a finite number"),
        ("stages.0.learning_rate=1" + "0" * 400, "stages.0.learning_rate: "),
        ("stages.0.max_steps=1" + "0" * 5000, "not valid YAML"),
        ("stages.0.betas=[0.9, 2]", "stages.0.betas.1: should be less than 1, not 2"),
        ("stages.0.train=[[a]]", "stages.0.train: names of parts would be right in the list, not ['a']"),
        ("stages.0.train=[{a: b}]", "stages.0.train: names of parts would be right in the list"),
        ("stages.-2.epochs=1", "stages.-2: there are 1, numbered from 0"),
        ("stages.²" + ".epochs=1", "stages.²: no item is called '²'"),
        ("stages.0.data=" + "[" * 2000, "not valid YAML"),
        ("stages.0.data=" + "[" * 70 + "]" * 70, "nested too deeply; at most 64 levels are read"),
        ("data=[{path: a.json, subset: some}]", "data.0.subset: should be all, first:N, end:N or random:N, not 'some'"),
        ("data=[{path: a.json, weight: .inf}]", "data.0.weight: should be"),
        ("run_name={a: 1, a: 2}", "the key 'a' is there twice"),
        ("stages.0.optimizer=[" + "x, " * 900 + "]", "stages.0.optimizer: should be text, not ['x', "),
    ],
)
def test_a_wrong_recipe_gets_one_clear_line(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL, [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_overrides_reach_every_value() -> None:
    recipe = parse_recipe(
        MINIMAL,
        [
            "stages.a.learning_rate=1e-4",
            "stages.0.train.vision_tower=2e-6",
            "stages.0.train.language_model=false",
            "data=[first.json]",
            "data.0.images=pictures",
            "data.on_bad_record=skip",
            "stages.0.media.image.views.type=square",
        ],
    )
    stage = recipe.stages[0]
    assert stage.learning_rate == 1e-4
    assert stage.train["vision_tower"].learning_rate == 2e-6
    assert stage.train["language_model"].freeze
    assert stage.train["multi_modal_projector"] == PartTraining()
    assert (recipe.data[0].name, recipe.data[0].images, recipe.on_bad_record) == ("first", "pictures", "skip")
    assert stage.media == {"image": {"views": {"type": "square"}}}


def test_recipe_files_report_where_they_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages:\n  - name: [\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml:\d+: not valid YAML"):
        load_recipe(broken)
    for text, said in (
        ("- 1\n", "holds a list"),
        ("seed: 2024-02-31\n", "not valid YAML"),
        ("? [a]\n: b\n", "not valid YAML"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("\ufeffstages: []\n", "stages: "),
        ("#" * (1 << 24) + "\n", "has more than"),
    ):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=said):
            load_recipe(broken)


def test_unknown_keys_of_a_part_are_errors(world: Path) -> None:
    for path, message in (
        ("parts.text_config.num_hiden_layers=2", "parts.text_config.num_hiden_layers: unknown key"),
        ("parts.text_config.model_type=lama", "parts.text_config.model_type: there is no 'lama'"),
        ("parts.vision_config.model_type=[clip]", "parts.vision_config.model_type: there is no ['clip']"),
        (
            "parts.extra_encoders={second: {config: {model_type: dinov2, hiden_size: 8}}}",
            "parts.extra_encoders.second.config.hiden_size: unknown key of a dinov2 configuration",
        ),
        ("parts.text_config.hidden_size=wide", "parts.text_config"),
        ("parts.connector.type=mpl", "unknown connector 'mpl'; did you mean 'mlp'?"),
        ("parts.media.image.views.type=padd", "unknown view planner 'padd'; did you mean 'pad'?"),
    ):
        recipe = parse_recipe(tiny_training.recipe(world), [path])
        with pytest.raises(RecipeError, match=re.escape(message)):
            build_meta(recipe)


def test_all_published_recipes_build_at_published_scale() -> None:
    found = {card.slug: card.recipe for card in systems().values() if card.recipe and card.recipe.is_file()}
    assert "llava-1.5" in found
    for path in found.values():
        recipe = load_recipe(path)
        for stage in recipe.stages:
            rows = {token: number for part in stage.train.values() for number, token in enumerate(part.rows or ())}
            tokenizer = SimpleNamespace(get_vocab=lambda rows=rows: rows)  # the published one is on the hub
            if not issubclass(OBJECTIVES.get(stage.objective.type), LanguageObjective):
                objective = OBJECTIVES.get(stage.objective.type)(stage)
                config = part_config(recipe.parts, "vision_config", read_sources=False)
                assert sum(parameter.numel() for parameter in objective.skeleton(config).parameters()) > 1e8
                continue
            with torch.device("meta"):
                assert trainable_by_part(prepare(build_meta(recipe), stage, tokenizer))


def test_llava_trains_the_published_numbers_of_parameters() -> None:
    path = systems()["llava-1.5"].recipe
    recipe = load_recipe(path, ["stages.tune.lora=true", "stages.tune.train={multi_modal_projector: 2e-5}"])
    with torch.device("meta"):
        align = trainable_by_part(prepare(build_meta(recipe), recipe.stages[0]))
        lora = prepare(build_meta(recipe), recipe.stages[1])
        full = trainable_by_part(prepare(build_meta(recipe), load_recipe(path).stages[1]))
    assert align == {"multi_modal_projector": 20_979_712}
    assert trainable_by_part(lora) == {"multi_modal_projector": 20_979_712, "lora": 319_815_680}
    assert full["language_model"] + full["lm_head"] == 6_738_415_616
    rates = [group["lr"] for group in optimizer_groups(lora, Rates.of(recipe.stages[1]))]
    assert rates == [2e-5, 2e-5, 2e-5]  # adapter; connector's weights and biases: the stage's rate is its own


def test_a_scaled_recipe_keeps_kinds_and_stages(world: Path) -> None:
    recipe = load_recipe(systems()["llava-1.5"].recipe)
    small = scale(recipe, vocab=64, patch_size=8, image_size=tiny_training.SIZE, stages={"max_steps": 2})
    model = build_meta(small)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert small.parts.media["image"]["views"] == {"type": "pad", "size": tiny_training.SIZE}
    assert small.stages[0].media["image"]["views"]["size"] == tiny_training.SIZE
    assert [stage.name for stage in small.stages] == ["align", "tune"]
    assert small.stages[1].max_steps == 2
    assert not small.stages[1].bf16


# What trains


def test_groups_follow_parts_and_spare_norms_and_biases() -> None:
    net = tiny.model()
    train_parts = {"all": PartTraining(), "vision_tower": PartTraining(learning_rate=2e-6)}
    train_parts["language_model.layers.0"] = PartTraining(freeze=True)
    freeze_all_but(net, train_parts)
    groups = optimizer_groups(net, Rates(1e-4, 0.1, train_parts))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-4, 0.1),
        (1e-4, 0),
        (2e-6, 0.1),
        (2e-6, 0),
    ]
    names = [{public_name(name) for name in group["names"]} for group in groups]
    assert "lm_head.weight" in names[0]
    assert "language_model.norm.weight" in names[1]
    assert "multi_modal_projector.linear_1.bias" in names[1]
    assert not any(name.startswith("language_model.layers.0.") for own in names for name in own)
    assert all(name.startswith("vision_tower.") for name in names[2] | names[3])
    decayed = optimizer_groups(net, Rates(1e-4, 0.1, train_parts, decay_rms_norms=True))
    assert "model.language_model.norm.weight" in decayed[0]["names"]
    assert any("layer_norm1" in name for name in decayed[3]["names"])


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(RecipeError, match=r"train\.vision_towr: the model has no such part; did you mean"):
        freeze_all_but(tiny.model(), {"vision_towr": PartTraining()})


def test_a_tied_head_trains_with_the_embeddings_where_they_train() -> None:
    net = tiny.model(decoder="qwen2")
    head = {"lm_head": PartTraining()}
    freeze_all_but(net, {"language_model": PartTraining()} | head)
    assert set(trainable_by_part(net)) == {"language_model"}
    assert net.lm_head.weight.requires_grad
    frozen = {"language_model": PartTraining(), "language_model.embed_tokens": PartTraining(freeze=True)}
    with_own_rate = {"language_model": PartTraining(), "lm_head": PartTraining(learning_rate=1e-4)}
    for parts in (head, {"multi_modal_projector": PartTraining()} | head, frozen | head, with_own_rate):
        with pytest.raises(RecipeError, match=r"train\.lm_head: the model has no such part \(it is tied"):
            freeze_all_but(net, parts)


# Batches


def prepared(world: Path, *overrides: str, **options: Any) -> tuple[Any, Samples, Any]:
    recipe = parse_recipe(tiny_training.recipe(world), overrides)
    model, processor = build_model(recipe)
    return model, Samples(open_records(recipe, 1), processor, **options), recipe.stages[1]


def test_batches_depend_on_the_seed_alone_and_cover_every_epoch(world: Path) -> None:
    _, samples, stage = prepared(world, "stages.1.max_steps=null", "stages.1.epochs=2.5")
    batches = plan_batches(samples, stage, seed=3)
    assert batches == plan_batches(samples, stage, seed=3) != plan_batches(samples, stage, seed=4)
    per_epoch = len(samples) // stage.batch_size
    assert len(batches) == 2.5 * per_epoch
    epochs = (batches[n * per_epoch : (n + 1) * per_epoch] for n in (0, 1))
    first, second = ([index for batch in epoch for index in batch] for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(len(samples)))
    assert first != second
    ranks = [plan_batches(samples, stage, seed=3, world=2, rank=rank) for rank in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair][: len(batches)] == batches


def test_packed_batches_hold_every_sample_once_in_few_rows(world: Path) -> None:
    overrides = ("stages.1.packing=true", "stages.1.max_length=96", "stages.1.batch_size=2", "stages.1.max_steps=null")
    _, samples, stage = prepared(world, *overrides)
    batches = plan_batches(samples, stage, seed=0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(samples)))
    collate = Collator(0, max_length=96, packing=True)
    for batch in batches:
        assert collate([samples[index] for index in batch])["input_ids"].shape[0] <= 2


def test_grouped_batches_hold_one_modality(world: Path) -> None:
    _, samples, stage = prepared(world, "stages.1.group_by_modality=true", "stages.1.batch_size=2")
    batches = plan_batches(samples, stage, seed=0)
    mixed = [batch for batch in batches if len({samples.length(index) > 0 for index in batch}) > 1]
    assert len(mixed) <= 1  # the remainder of both


@pytest.mark.parametrize(
    ("key", "grouping"), [("modality", "stretch"), ("modality", "band"), ("length", "stretch"), ("length", "band")]
)
def test_a_stage_trains_on_batches_that_its_grouping_makes(
    world: Path, tmp_path: Path, key: str, grouping: str
) -> None:
    chosen = (f"stages.1.group_by_{key}=true", f"stages.1.grouping={grouping}")
    result = run(world, tmp_path, *chosen, "stages.0.max_steps=1", "stages.1.max_steps=3")
    assert len(losses(result)) == 3
    _, samples, stage = prepared(world, *chosen, "stages.1.batch_size=2")
    stage = stage.model_copy(update={"max_steps": None})
    batches = plan_batches(samples, stage, seed=0)
    assert batches != plan_batches(samples, stage.model_copy(update={"grouping": "megabatch"}), seed=0)
    mixed = [batch for batch in batches if len({samples.words(index) > 0 for index in batch}) > 1]
    if key == "modality" and grouping == "stretch":  # without the last batches of both modalities
        assert sum(map(len, batches)) < len(samples)
        assert not mixed
    else:
        assert sorted(index for batch in batches for index in batch) == list(range(len(samples)))
        assert key == "length" or all(batch in batches[-2:] for batch in mixed)  # the last of both


def test_grouping_needs_something_to_group_by(world: Path) -> None:
    with pytest.raises(RecipeError, match="grouping: says how group_by_length or group_by_modality group"):
        prepared(world, "stages.1.grouping=band")
    _, samples, stage = prepared(world, "stages.1.group_by_modality=true", "stages.1.batch_size=24")
    with pytest.raises(UserError, match="grouping: stretch leaves out the last batches of both modalities"):
        plan_batches(samples, stage.model_copy(update={"grouping": "stretch"}), seed=0)


@pytest.mark.parametrize("layout", ["rows", "one row", "shared beginning"])
def test_packed_rows_give_the_loss_and_gradients_of_single_samples(world: Path, layout: str) -> None:
    model, samples, _ = prepared(world)
    chosen = [samples[index] for index in range(9)]
    items = sum(int((sample["labels"] != -100).sum()) for sample in chosen)
    model.eval()
    alone = 0.0
    for sample in chosen:
        batch = StageCollator(0)([sample])
        batch.pop("tokens")
        loss = model(**batch, skip_logits=True, num_items_in_batch=items).loss
        loss.backward()
        alone += loss.item()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    shares = layout == "shared beginning"
    placeholder = model.config.image_token_id if shares else None
    batch = StageCollator(0, 128, packing=True, flat=layout != "rows", placeholder=placeholder)(chosen)
    tokens = sum(len(sample["input_ids"]) for sample in chosen)
    assert batch.pop("tokens") == tokens
    if layout != "rows":
        assert batch["input_ids"].shape[0] == 1
        assert (batch["input_ids"].shape[1] < tokens - 100) == shares
        assert switch_on(model)
        assert can_share(model)
        assert can_narrow(model)
        with packed_attention():
            row = packed_row(batch["position_ids"][0].tolist())
            options = {"skip_logits": True, "num_items_in_batch": items, "narrow": shares}
            packed = model(**batch, packed_row=row, **options).loss
    else:
        packed = model(**batch, skip_logits=True, num_items_in_batch=items).loss
    packed.backward()
    assert packed.item() == pytest.approx(alone, abs=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, wanted[name], atol=1e-4), name


@pytest.mark.parametrize("decoder", sorted(tiny.DECODERS))
def test_packed_attention_is_exact_or_stays_off(decoder: str) -> None:
    net = tiny.model(decoder=decoder)
    ids = torch.randint(3, 90, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2]])
    wanted = net(input_ids=ids, position_ids=positions).logits
    if switch_on(net):
        with packed_attention():
            row = packed_row(positions[0].tolist())
            got = net(input_ids=ids, position_ids=positions, packed_row=row, use_cache=False).logits
        assert torch.allclose(got, wanted, atol=1e-5)
    padded = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12])}
    unswitched = tiny.model(decoder=decoder)
    assert torch.allclose(net(**padded).logits[1], unswitched(**padded).logits[1], atol=1e-5)


def test_a_row_whose_samples_go_on_from_one_another_is_that_of_whole_samples() -> None:
    samples = [[0, 1, 2, 3, 4], [0, 1, 5, 6], [0, 1, 5, 7, 8, 9], [0, 1, 2, 3, 10], [11, 12]]
    row = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 10, 11, 12]
    positions = [0, 1, 2, 3, 4, 2, 3, 3, 4, 5, 2, 3, 4, 0, 1]
    net = tiny.model()
    with torch.no_grad():
        wanted = {own[-1]: net(input_ids=torch.tensor([own]) + 3).logits[0, -1] for own in samples}
        assert switch_on(net)
        assert can_narrow(net)
        given = {"input_ids": torch.tensor([row]) + 3, "position_ids": torch.tensor([positions]), "use_cache": False}
        with packed_attention():
            found = net(**given, packed_row=packed_row(positions)).logits[0]
            places = torch.tensor([row.index(last) for last in wanted])
            targets = (places.flip(0), torch.arange(5))  # in any order
            narrow = net(**given, packed_row=packed_row(positions), targets=targets, narrow=True).likelihood.logps
    for last, logits in wanted.items():
        torch.testing.assert_close(found[row.index(last)], logits, atol=1e-5, rtol=1e-5)
    logps = torch.stack(list(wanted.values())).log_softmax(-1).flip(0)[torch.arange(5), torch.arange(5)]
    torch.testing.assert_close(narrow, logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", sorted(tiny.DECODERS))
@pytest.mark.parametrize("again", [False, True])
def test_a_narrow_last_layer_learns_the_same(decoder: str, again: bool) -> None:
    net = tiny.model(decoder=decoder).train()
    assert switch_on(net)
    assert can_narrow(net) == (decoder != "gpt2")
    if decoder == "gpt2":
        return
    if again:
        recompute(net, "light")
    ids, labels = torch.randint(3, 90, (1, 12)), torch.full((1, 12), -100)
    labels[0, [3, 4, 9, 11]] = torch.tensor([5, 6, 7, 8])
    positions = [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2]
    found = []
    for narrow in (False, True):
        net.zero_grad()
        with packed_attention():
            given = {"position_ids": torch.tensor([positions]), "packed_row": packed_row(positions)}
            loss = net(input_ids=ids, labels=labels, use_cache=False, skip_logits=True, narrow=narrow, **given).loss
        loss.backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-5)


# Features


def test_cached_features_train_to_the_same_weights(world: Path, tmp_path: Path, plain: TrainResult) -> None:
    cached = run(world, tmp_path / "cached", "stages.0.cache_features=float32", "stages.1.cache_features=true")
    assert losses(plain, 0) == pytest.approx(losses(cached, 0), abs=1e-5)
    assert losses(plain) == pytest.approx(losses(cached), abs=1e-2)  # kept in 16 bit


def test_the_cache_finds_media_by_content_and_survives_a_torn_write(world: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_training.recipe(world))
    model, processor = build_model(recipe)
    records = list(open_records(recipe, 1))
    messages = [record.messages for record in records]
    cache = FeatureCache(tmp_path, model, processor, "float32")
    computed = cache.fill(records)
    assert computed == len(cache) == sum(1 for own in messages if any(p["type"] == "image" for p in own[0]["content"]))
    assert cache.fill(records) == 0
    before = cache(messages[0])[0].clone()
    lines = cache.index.read_bytes()
    cache.index.write_bytes(lines[:-7])
    with cache.data.open("ab") as data:
        data.write(b"half a number")
    again = FeatureCache(tmp_path, model, processor, "float32")
    assert len(again) == computed - 1
    assert again.fill(records) == 1
    assert torch.equal(again(messages[0])[0], before)
    with torch.no_grad():
        model.model.vision_tower.embeddings.class_embedding.add_(1) if hasattr(
            model.model.vision_tower, "embeddings"
        ) else model.model.vision_tower.vision_model.embeddings.class_embedding.add_(1)
    assert len(FeatureCache(tmp_path, model, processor, "float32")) == 0  # other weights, other features


def test_features_of_a_training_encoder_are_not_cached(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.0\.cache_features: an encoder trains"):
        run(world, tmp_path, "stages.0.cache_features=true", "stages.0.train.vision_tower=true")


# Stages


def test_stages_leave_loadable_checkpoints_and_are_not_repeated(world: Path, tmp_path: Path) -> None:
    result = run(world, tmp_path, "stages.1.save_steps=2")
    model, processor = load_checkpoint(result.final)
    assert model.config.system == "llava-1.5"
    assert processor.template == "v1"  # stage 1 had another; that is a matter of its training
    assert processor.spec.route("image").planner.__class__.__name__ == "Pad"
    assert not list((tmp_path / "tune").glob("checkpoint-*"))
    metrics = json.loads((tmp_path / "tune" / "metrics.json").read_text())
    assert metrics["finished"]
    assert [entry["step"] for entry in metrics["log"]] == [1, 2, 3, 4, 5, 6]
    assert metrics["log"][-1]["loss"] < metrics["log"][0]["loss"]
    assert metrics["trainable"]["multi_modal_projector"] > 0
    align = load_file(tmp_path / "align" / "final" / "model.safetensors")
    tune = weights(result)
    assert all(torch.equal(align[name], tune[name]) for name in align if ".vision_tower." in name)
    assert not torch.equal(align["lm_head.weight"], tune["lm_head.weight"])
    began = time.monotonic()
    again = run(world, tmp_path, "stages.1.save_steps=3")
    assert [stage.ran for stage in again.stages] == [False, False]
    assert time.monotonic() - began < 2
    with pytest.raises(RecipeError, match=r"was made by a recipe with another `stages\.tune`"):
        run(world, tmp_path, "stages.1.learning_rate=1e-5")


def test_accumulation_is_a_bigger_batch(world: Path, tmp_path: Path, plain: TrainResult) -> None:
    parts = ("stages.1.batch_size=2", "stages.1.accumulation=2", "stages.0.batch_size=2", "stages.0.global_batch=4")
    small = run(world, tmp_path / "small", *parts)
    assert losses(plain) == pytest.approx(losses(small), abs=1e-5)
    with pytest.raises(UserError, match=r"stages\.align\.global_batch: 5 is not a multiple of 4 samples x 1 processes"):
        run(world, tmp_path / "odd", "stages.0.global_batch=5")


def test_memory_savers_change_little_or_nothing(world: Path, tmp_path: Path, plain: TrainResult) -> None:
    packed = ("stages.1.packing=true", "stages.1.max_length=96", "stages.1.batch_size=2")
    rows = losses(run(world, tmp_path / "rows", *packed))
    checkpointed = run(world, tmp_path / "checkpointed", "stages.1.gradient_checkpointing=true")
    assert losses(plain) == pytest.approx(losses(checkpointed), abs=1e-6)
    both = run(world, tmp_path / "both", "stages.1.gradient_checkpointing=true", *packed)
    assert rows == pytest.approx(losses(both), abs=1e-6)
    half = run(world, tmp_path / "half", "stages.1.bf16=true")
    assert losses(plain) == pytest.approx(losses(half), abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(half).values())


def test_schedule_clipping_and_rates_reach_the_optimiser(world: Path, tmp_path: Path) -> None:
    result = run(
        world,
        tmp_path,
        "stages.1.schedule=linear",
        "stages.1.warmup=2",
        "stages.1.clip=0.5",
        "report_to=tensorboard",
    )
    rates = [entry["learning_rate"] for entry in result.stages[1].metrics["log"]]
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
    assert all("grad_norm" in entry for entry in result.stages[1].metrics["log"])
    assert list((tmp_path / "tune").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "step"])
def test_a_stage_of_one_step_learns(world: Path, tmp_path: Path, schedule: str) -> None:
    options = (f"stages.0.schedule={schedule}", "stages.0.max_steps=1", "stages.1.max_steps=1")
    result = run(world, tmp_path, *options)
    assert result.stages[0].metrics["log"][0]["learning_rate"] == pytest.approx(1e-2)
    before = {
        name: tensor.clone()
        for name, tensor in build_model(parse_recipe(tiny_training.recipe(world)))[0].state_dict().items()
    }
    after = load_file(tmp_path / "align" / "final" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "multi_modal_projector" in name}


def test_the_rate_falls_in_steps(world: Path, tmp_path: Path) -> None:
    options = "stages.1.schedule=step", "stages.1.schedule_options={gamma: 0.5, parts: 3}", "stages.1.max_steps=7"
    result = run(world, tmp_path, *options, "stages.1.warmup=2", "stages.1.log_steps=1", "stages.0.max_steps=1")
    rates = [entry["learning_rate"] for entry in result.stages[1].metrics["log"]]
    assert [rate / max(rates) for rate in rates] == pytest.approx([0.5, 1, 1, 0.5, 0.5, 0.25, 0.25])
    for wrong, said in (("gamma: 2", "gamma: must be above 0"), ("parts: 1.5", "parts: must be a whole number")):
        with pytest.raises(RecipeError, match=f"stages.1.schedule_options: {said}"):
            run(world, tmp_path / "wrong", options[0], "stages.1.schedule_options={" + wrong + "}")


def test_a_reporter_that_is_not_installed_is_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="report_to: mlflow is not installed"):
        run(world, tmp_path, "report_to=mlflow")


def edited(world: Path, path: Path, changes: dict[int, dict[str, Any]]) -> str:
    """The world's records in another file, some with other keys; an override that points to it."""
    records = json.loads((world / "records.json").read_text())
    path.write_text(json.dumps([record | changes.get(number, {}) for number, record in enumerate(records)]))
    return f"data.0.path={path}"


def test_a_broken_record_stops_or_is_listed(world: Path, tmp_path: Path) -> None:
    broken = edited(world, tmp_path / "records.json", {3: {"image": "missing.png"}})
    with pytest.raises(UserError, match=r"records\.json:4: .*missing\.png"):
        run(world, tmp_path / "stop", broken, "stages.0.max_steps=6")
    (tmp_path / "cut.png").write_bytes((world / "images" / "1.png").read_bytes()[:100])
    cut = edited(world, tmp_path / "cut.json", {number: {"image": str(tmp_path / "cut.png")} for number in (3, 8)})
    for extra in ("stages.0.cache_features=true", "stages.0.workers=1"):
        folder = tmp_path / extra[-6:]
        console = Console(file=io.StringIO(), width=300)
        raw = tiny_training.recipe(world, output=str(folder), on_bad_record="skip")
        result = train(parse_recipe(raw, [cut, "stages.0.max_steps=12", extra]), console=console)
        said = result.stages[0].metrics["skipped"]
        assert "2 records were left out" in said
        assert all(f"cut.json:{line}: " in said for line in (4, 9))
        assert "4 of 48 samples (8.3 %) were others of the same source instead" in said
        assert said in console.file.getvalue()


def test_a_record_that_breaks_in_a_worker_is_the_one_line(world: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((world / "images" / "1.png").read_bytes()[:100])
    data = edited(world, tmp_path / "records.json", {1: {"image": str(tmp_path / "cut.png")}})
    with pytest.raises(UserError) as caught:
        run(world, tmp_path / "run", data, "stages.0.workers=2", "stages.0.max_steps=6")
    assert re.fullmatch(r".*records\.json:2: image: .*cut\.png: .*", str(caught.value))
    assert (tmp_path / "run" / "align").is_dir()  # the sample before the first step had not met it


def test_a_sample_without_anything_to_learn_is_a_broken_record(world: Path, tmp_path: Path) -> None:
    hello = {"conversations": [{"from": "gpt", "value": "yes"}, {"from": "human", "value": "<image> is it red ?"}]}
    data = edited(world, tmp_path / "data.json", {23: hello})
    with pytest.raises(UserError, match=r"data\.json:24: record: no answer is left to learn"):
        run(world, tmp_path / "stop", data)
    result = run(world, tmp_path / "skip", data, "on_bad_record=skip", "stages.1.batch_size=1", "stages.1.max_steps=24")
    assert all(math.isfinite(loss) for loss in losses(result))
    assert "data.json:24" in result.stages[1].metrics["skipped"]


# What is known before the first step


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data=[{name: squares, path: RECORDS, images: IMAGES}, {path: none.json}]", "none.json: there is no such"),
        ("stages.1.template=vicuna", "stages.1.template: unknown chat template 'vicuna'"),
        ("stages.1.labels=round", "stages.1.labels: unknown label policy 'round'; did you mean 'rounds'?"),
        ("stages.1.train=[vision_towr]", "stages.1.train.vision_towr: the model has no such part"),
        ("stages.1.lora={rank: 4}", "stages.1.train.language_model: trains in full"),
        ("stages.1.media.image.views.type=squre", "stages.1.media: "),
        ("stages.1.global_batch=5", "stages.tune.global_batch: 5 is not a multiple of 4"),
        ("stages.1.optimizer=adam_w", "stages.1.optimizer: "),
        ("stages.1.schedule_options={min_lr_rate: 0.1}", "stages.1.schedule_options: "),
        ("stages.1.max_length=9", "takes "),
        ("parts.processor={smapling: {}}", "parts.processor.smapling: unknown key; did you mean 'sampling'?"),
        ("parts.template=v9", "unknown chat template 'v9'"),
        ("parts.tokenizer=nowhere", "nowhere: no such folder"),
    ],
)
def test_all_stages_are_checked_before_the_first_step(world: Path, tmp_path: Path, override: str, said: str) -> None:
    override = override.replace("RECORDS", str(world / "records.json")).replace("IMAGES", str(world / "images"))
    with pytest.raises(UserError, match=re.escape(said)):
        run(world, tmp_path / "run", override, "stages.0.data=[squares]")
    assert not (tmp_path / "run").exists()


def test_every_record_is_opened_on_demand(world: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((world / "images" / "1.png").read_bytes()[:100])
    data = edited(world, tmp_path / "d.json", {5: {"image": str(tmp_path / "cut.png")}})
    raw = parse_recipe(tiny_training.recipe(world, output=str(tmp_path / "run")), [data])
    with pytest.raises(UserError, match=r"d\.json:6: "):
        train(raw, check="all", console=QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="check: must be one of sample, all"):
        train(raw, check="some", console=QUIET)


def test_the_first_lines_say_what_is_about_to_happen(world: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    packed = ["stages.1.packing=true", "stages.1.max_length=192", "stages.1.batch_size=2", "stages.1.max_steps=null"]
    result = train(parse_recipe(tiny_training.recipe(world, output=str(tmp_path)), packed), console=console)
    said = console.file.getvalue()
    tokens = result.stages[0].metrics["tokens"]
    assert f"align: 24 records, 16 samples in 4 steps, {tokens:,} tokens, " in said
    assert "align: trains 1,856 of " in said
    assert " parameters: multi_modal_projector 1,856\n" in said
    assert re.search(
        r"align: takes [\d.]+ MB of memory \(weights [\d.]+ MB, .*gradients [\d.]+ MB.*\) beside its activations", said
    )
    assert "align: 4 steps are few, the loss will hardly move" in said
    tokens = result.stages[1].metrics["tokens"]
    found = re.search(
        rf"tune: 24 records, 24 samples in (\d+) steps, {tokens:,} tokens, 0 % padding \((\d+) % without", said
    )
    assert int(found[1]) == result.stages[1].metrics["steps"]
    assert 0 < int(found[2]) < 60


def test_a_line_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("llavakit.training.callbacks.time.monotonic", lambda: now)
    said = Console(file=io.StringIO(), width=200)
    bar, state = Bar("tune", said), TrainerState(max_steps=101)
    for step in range(1, 102):
        now += 60 if step == 1 else 3  # the first step also compiles and allocates
        state.global_step = step
        bar.on_step_end(None, state, None)
        if step in (1, 11, 101):
            bar.on_log(None, state, None, logs={"loss": 1.0})
    assert said.file.getvalue().splitlines() == [
        "tune: step 1 of 101, loss 1.0000",
        "tune: step 11 of 101, loss 1.0000, 4 min left",
        "tune: step 101 of 101, loss 1.0000",
    ]


def test_documented_commands_train_what_they_say() -> None:
    """Every `llavakit train` in the documents that names a recipe of this repository passes the checks of names."""
    root = Path(__file__).parents[1]
    found: dict[str, None] = {}
    for page in (root / "README.md", *(root / "docs").glob("*.md"), *(root / "src").rglob("README.md")):
        found |= dict.fromkeys(re.findall(r"llavakit train (\S+\.yaml.*)", page.read_text().replace("\\\n", " ")))
    for recipe in (root / "src").rglob("recipe.yaml"):
        text = recipe.read_text().replace("\\\n#", " ")
        found |= dict.fromkeys(
            command.replace("recipe.yaml", str(recipe)) for command in re.findall(r"# +llavakit train (recipe.*)", text)
        )
    commands = [shlex.split(command, comments=True) for command in found]
    commands = [command for command in commands if (root / command[0]).is_file()]
    assert len(commands) > 8
    for path, *overrides in commands:
        recipe = load_recipe(root / path, [word for word in overrides if "=" in word])
        for number in range(len(recipe.stages)):
            objective = check_names(recipe, number)
            if recipe.parts is not None and recipe.stages[number].lora is not None:
                check_parts(recipe, number, objective, config_of(recipe, read_sources=False))


# What a run was made of


def test_a_run_goes_on_only_with_the_data_and_the_base_that_it_began_with(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    raw = tiny_training.recipe(tmp_path / "world", output=str(tmp_path / "run"))
    first = train(parse_recipe(raw), console=QUIET)
    shutil.copytree(tmp_path / "world", tmp_path / "elsewhere")
    moved = parse_recipe(tiny_training.recipe(tmp_path / "elsewhere", output=str(tmp_path / "run")))
    assert not any(stage.ran for stage in train(moved, console=QUIET).stages)  # the same content at another place
    records = tmp_path / "world" / "records.json"
    before = records.read_text()
    records.write_text(before.replace("what colour", "which colour", 1))
    with pytest.raises(RecipeError, match=r"run/align: the content of data.squares has changed since this was made"):
        train(parse_recipe(raw), console=QUIET)
    records.write_text(before)
    picture = tmp_path / "world" / "images" / "1.png"
    picture.write_bytes((tmp_path / "world" / "images" / "2.png").read_bytes())
    with pytest.raises(RecipeError, match=r"content of data\.squares has changed"):
        train(parse_recipe(raw), console=QUIET)
    shutil.rmtree(tmp_path / "world")
    assert not any(stage.ran for stage in train(parse_recipe(raw), console=QUIET).stages)  # nothing to compare with
    shutil.copytree(first.final, tmp_path / "base")
    raw = tiny_training.recipe(world, output=str(tmp_path / "more"), model=str(tmp_path / "base"))
    raw["stages"] = raw["stages"][1:]
    del raw["parts"]
    train(parse_recipe(raw), console=QUIET)
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tmp_path / "run" / "align" / "final", tmp_path / "base")
    with pytest.raises(RecipeError, match=r"more/tune: the content of model has changed since this was made"):
        train(parse_recipe(raw), console=QUIET)


def test_an_attempt_that_trained_nothing_refuses_no_corrected_recipe(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavakit.training.trainer import StageTrainer

    step = StageTrainer.training_step

    def stop(self: Any, *args: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", stop)
    for rate in ("1e-2", "1e-3"):  # no checkpoint was written, so another rate is as good
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path, f"stages.0.learning_rate={rate}")
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path, "stages.0.save_steps=2")
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"was made by a recipe with another `stages\.align`"):
        run(world, tmp_path, "stages.0.save_steps=2", "stages.0.learning_rate=1e-3")
    whole = run(world, tmp_path, "stages.0.save_steps=2")
    assert whole.stages[0].metrics["tokens"] == run(world, tmp_path / "other").stages[0].metrics["tokens"]


# Restarts


def _start(recipe: Path, out: Path) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llavakit.training.run", "peft", "tensorboard"])
    process = context.Process(target=train, args=(str(recipe), [f"output={out}"]))
    process.start()
    return process


def test_training_goes_on_from_a_checkpoint_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from llavakit.training.trainer import StageTrainer

    options = ("stages.1.save_steps=2", "stages.1.cache_features=true", "stages.1.accumulation=2")
    whole = run(world, tmp_path / "whole", *options)
    step = StageTrainer.training_step

    def stop(self: Any, *args: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut", *options)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cut" / "tune").glob("checkpoint-*")] == ["checkpoint-4"]
    load_checkpoint(tmp_path / "cut" / "tune" / "checkpoint-4")
    rest = run(world, tmp_path / "cut", *options)
    assert losses(rest) == losses(whole)
    ours, theirs = weights(whole), weights(rest)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_killed_at_random_moments_training_ends_in_the_same_weights(world: Path, tmp_path: Path, lora: bool) -> None:
    raw = tiny_training.recipe(world)
    for stage in raw["stages"]:
        stage |= {"max_steps": 30, "save_steps": 3, "log_steps": 5, "cache_features": True}
    raw["stages"][1] |= {"packing": True, "max_length": 96, "batch_size": 2}
    if lora:
        raw["stages"][1] |= {"lora": {"rank": 4, "dropout": 0.2}, "train": ["multi_modal_projector"]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    process = _start(recipe, tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    moment = random.Random(time.time_ns())
    cut = tmp_path / "cut"

    def made() -> set[Path]:
        return {*cut.glob("*/checkpoint-*"), *cut.glob("*/.saving-*"), *cut.glob("*/final"), *cut.glob("*/.final*")}

    for _ in range(3):
        seen = made()
        process = _start(recipe, cut)
        while process.is_alive() and made() <= seen:
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.4))
        process.kill()
        process.join()
    process = _start(recipe, cut)
    process.join()
    assert process.exitcode == 0
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert ours == theirs
    assert not [path for path in cut.rglob(".*") if path.is_dir()]  # nothing half-written is left


_LIMITED = """
import resource, sys
from llavakit.errors import CheckpointError
from llavakit.training.run import train
import transformers, peft
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    train(sys.argv[1], ["output=" + sys.argv[2]])
except CheckpointError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.1.lora={rank: 4}", "train.language_model: trains in full, so lora has nothing to adapt there"),
        ("system=lava", "system: unknown system 'lava'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(world: Path, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        run(world, tmp_path, override, "stages.0.max_steps=1")


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_loses_nothing(world: Path, tmp_path: Path) -> None:
    raw = tiny_training.recipe(world)
    raw["stages"] = [raw["stages"][1] | {"save_steps": 2}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    out = tmp_path / "out"
    train(recipe, ["output=" + str(tmp_path / "whole")], console=QUIET)
    size = (tmp_path / "whole" / "final" / "model.safetensors").stat().st_size

    def limited(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _LIMITED, str(recipe), str(out), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = limited(size + 2000)  # the weights fit, the optimiser's state does not
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert not list(out.glob("tune/checkpoint-*"))
    done = limited(size - 2000)
    assert done.returncode == 2, done.stderr
    assert not (out / "tune" / "final").exists()
    result = train(recipe, ["output=" + str(out)], console=QUIET)
    assert all(
        torch.equal(tensor, weights(result)[name])
        for name, tensor in load_file(tmp_path / "whole" / "final" / "model.safetensors").items()
    )


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    saved = torch.save

    def full(value: Any, path: Any, *args: Any) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        saved(value, path, *args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-4: could not be written \(No space left on device\); check"):
        run(world, tmp_path, "stages.1.save_steps=2")
    assert [path.name for path in (tmp_path / "tune").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "tune").glob(".saving-*"))


# Several processes


def _launch(recipe: Path, count: int, *overrides: str) -> list[subprocess.Popen[str]]:
    code = "import sys; from llavakit.training.run import train; train(sys.argv[1], sys.argv[2:])"
    port = str(random.randrange(20000, 60000))
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(recipe), *overrides],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def _finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_sharded_processes_have_the_loss_curve_of_one_and_survive_a_kill(world: Path, tmp_path: Path) -> None:
    raw = tiny_training.recipe(world)
    for stage in raw["stages"]:  # one sample a step and process: some steps are text alone in one of them
        stage |= {"batch_size": 1, "global_batch": 4, "save_steps": 2, "clip": 1.0, "max_steps": 4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    one = train(recipe, [f"output={tmp_path / 'one'}"], console=QUIET)
    two = [f"output={tmp_path / 'two'}", "stages.0.shard=true", "stages.1.shard=true"]
    processes = _launch(recipe, 2, *two)
    while not (tmp_path / "two" / "tune" / "checkpoint-2").exists() and processes[0].poll() is None:
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    assert not (tmp_path / "two" / "tune" / "final").exists()
    _finish(_launch(recipe, 2, *two))
    for stage in ("align", "tune"):
        curves = [
            [entry["loss"] for entry in json.loads((tmp_path / run / stage / "metrics.json").read_text())["log"]]
            for run in ("one", "two")
        ]
        assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    ours, theirs = weights(one), load_file(tmp_path / "two" / "final" / "model.safetensors")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def _one_rank(recipe: str, overrides: list[str], rank: int, port: int) -> None:
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in places.items()})
    train(recipe, overrides, console=QUIET)


def _start_two(recipe: Path, overrides: list[str]) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llavakit.training.run", "peft", "tensorboard"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = [context.Process(target=_one_rank, args=(str(recipe), overrides, rank, port)) for rank in (0, 1)]
    for process in found:
        process.start()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_killed_four_times_end_in_the_same_bits(world: Path, tmp_path: Path, shard: bool) -> None:
    raw = tiny_training.recipe(world)
    for stage in raw["stages"]:
        stage |= {"batch_size": 1, "global_batch": 4, "save_steps": 2, "clip": 1.0, "max_steps": 40, "shard": shard}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def finish(folder: Path) -> None:
        processes = _start_two(recipe, [f"output={folder}"])
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0]

    def made() -> set[Path]:
        return {*cut.glob("*/checkpoint-*"), *cut.glob("*/.saving-*"), *cut.glob("*/final"), *cut.glob("*/.final*")}

    finish(whole)
    moment = random.Random(7 + shard)
    for _ in range(4):
        seen = made()
        processes = _start_two(recipe, [f"output={cut}"])
        while all(process.is_alive() for process in processes) and made() <= seen:
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.4))
        assert all(process.is_alive() for process in processes)  # otherwise there was nothing to kill
        for process in moment.sample(processes, 2):
            process.kill()
            time.sleep(moment.uniform(0, 0.05))
        for process in processes:
            process.join()
    assert not (cut / "final").exists()
    finish(cut)
    ours, theirs = ((folder / "final" / "model.safetensors").read_bytes() for folder in (whole, cut))
    assert ours == theirs
    tokens = [json.loads((folder / "tune" / "metrics.json").read_text())["tokens"] for folder in (whole, cut)]
    assert tokens[0] == tokens[1]  # repeated steps count once
    assert not [path for path in cut.rglob(".*") if path.is_dir()]  # nothing half-written is left


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_second_way_to_shard_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RecipeError, match="shard: true"):
        run(world, tmp_path)


def test_repeated_layers_are_what_is_sharded() -> None:
    from llavakit.training.distributed import repeated_blocks

    net = tiny.model()
    kinds = [type(block).__name__ for block in repeated_blocks(net)]
    assert kinds == ["CLIPEncoderLayer"] * 3 + ["LlamaDecoderLayer"] * 2


def test_every_key_is_documented() -> None:
    from llavakit.training.recipe import Lora, LossWeights, Parts, Recipe, Source, Stage

    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    for section in (Recipe, Parts, Source, Stage, PartTraining, Lora, LossWeights):
        for key in section.model_fields:
            assert f"`{key}`" in text or f"{key}:" in text, f"{section.__name__}.{key}"
