"""LoRA stages: what is adapted, what trains beside it, the files that are left, and single rows of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_training
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.inspect import inspect_model
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.connectors.general import MLP
from llavakit.errors import CheckpointError, RecipeError
from llavakit.generation.load import load
from llavakit.registry import CONNECTORS
from llavakit.training.lora import load_adapter, merged_state, prepare
from llavakit.training.parameter_groups import Rates, is_lora, optimizer_groups, public_name, trainable_by_part
from llavakit.training.recipe import Stage, parse_recipe
from llavakit.training.run import TrainResult, train

pytest.importorskip("peft")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_world(tmp_path_factory.mktemp("squares"))


def run(world: Path, out: Path, *overrides: str, **changes: Any) -> TrainResult:
    return train(parse_recipe(tiny_training.recipe(world, output=str(out), **changes), overrides), console=QUIET)


def stage(**keys: Any) -> Stage:
    options = {"name": "s", "train": {}, "learning_rate": 1e-3, "lora": {"rank": 2, "alpha": 4}}
    return Stage.model_validate(options | keys)


def adapted(model: nn.Module) -> set[str]:
    """Layers with an adapter, by their names in a recipe."""
    return {public_name(name.partition(".lora_")[0]) for name, _ in model.named_parameters() if is_lora(name)}


def trained(model: nn.Module) -> set[str]:
    """What trains in full."""
    return {public_name(n) for n, p in model.named_parameters() if p.requires_grad and not is_lora(n)}


def backward(model: nn.Module, layout: str = "tItt") -> None:
    model(**tiny.prompt(model.get_base_model(), layout)).loss.backward()


# What is adapted and what trains


def test_names_are_exact_and_the_longest_counts() -> None:
    net = tiny.model(
        extra_connectors={"second_multi_modal_projector": {"type": "mlp"}},
        media={
            "image": {"views": {"type": "squash", "size": tiny.SIZE}},
            "multi_image": {
                "views": {"type": "squash", "size": tiny.SIZE},
                "connector": "second_multi_modal_projector",
            },
        },
    )
    train = {
        "multi_modal_projector": 1e-9,
        "multi_modal_projector.linear_2": 1e-2,
        "language_model.layers.0": True,
        "language_model.layers.0.mlp": False,
        "language_model.embed_tokens": True,
    }
    inside = {public_name(name) for name, _ in net.named_parameters()}
    model = prepare(net, stage(train=train))
    assert trained(model) == {
        name
        for name in inside
        if name.startswith(("multi_modal_projector.", "language_model.embed_tokens", "language_model.layers.0."))
        and ".mlp." not in name
    }
    layers = {name.removesuffix(".weight") for name in inside if "_proj." in name and "language_model" in name}
    assert adapted(model) == {name for name in layers if "layers.1." in name}
    rates = {
        public_name(name): group["lr"]
        for group in optimizer_groups(model, Rates.of(stage(train=train)))
        for name in group["names"]
    }
    assert rates["multi_modal_projector.linear_1.weight"] == 1e-9
    assert rates["multi_modal_projector.linear_2.weight"] == 1e-2
    assert rates["language_model.embed_tokens.weight"] == 1e-3


def test_only_layers_of_an_encoder_that_are_read_are_adapted() -> None:
    net = tiny.model(encoder="siglip", vision_feature_layer=-2)
    net.model.vision_tower.config.vision_use_head = True
    model = prepare(net, stage(lora={"rank": 2, "parts": ["vision_tower"]}))
    layers = {name.split(".")[3] for name in adapted(model) if "encoder.layers" in name}
    assert layers == {"0", "1"}  # of three: the last one is behind the features
    assert len(adapted(model)) == 2 * 6
    backward(model)
    assert all(p.grad is not None for n, p in model.named_parameters() if is_lora(n))


@pytest.mark.parametrize(
    ("keys", "parts", "said"),
    [
        ({"lora": {"parts": ["lm_head"]}}, {"decoder": "qwen2"}, "lm_head is tied to the embeddings"),
        ({"lora": {"parts": ["vision_towr"]}}, {}, "no part 'vision_towr'; did you mean 'vision_tower'?"),
        ({"lora": {"targets": ["q_prj"]}}, {}, "no layer in language_model can be adapted with targets"),
        ({"train": {"all": True}}, {}, "train.all: with lora, name the parts that train in full"),
        ({"train": {"language_model": True}}, {}, "train.language_model: trains in full"),
        (
            {"train": {"language_model": True}, "lora": {"parts": ["language_model.layers.0"]}},
            {},
            "q_proj trains in full (train.language_model)",
        ),
        (
            {"lora": {"parts": ["multi_modal_projector"], "targets": ["out_proj"]}},
            {"connector": "resampler"},
            "multi_modal_projector.attn.out_proj is read by its attention module and never called",
        ),
        (
            {"lora": {"parts": ["multi_modal_projector"]}, "shard": True},
            {"connector": "resampler"},
            "shard: the attention module multi_modal_projector.attn cannot be adapted in shards",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(keys: dict[str, Any], parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(tiny.model(**parts), stage(**keys))
    assert said in str(caught.value)


def test_an_attention_module_is_adapted_as_a_whole_and_its_base_never_changes() -> None:
    net = tiny.model(connector="resampler")
    model = prepare(net, stage(lora={"rank": 2, "parts": ["multi_modal_projector"]}))
    assert {"multi_modal_projector.attn", "multi_modal_projector.attn.out_proj"} <= adapted(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        assert all(p.grad is not None for n, p in model.named_parameters() if is_lora(n))
        optimizer.step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(is_lora(name) for name in changed)
    model.eval()
    with torch.no_grad():
        wanted = model(**tiny.prompt(net, "tItt")).logits
    merged = tiny.model(connector="resampler")
    merged.load_state_dict(dict(merged_state(model, model.state_dict())))
    with torch.no_grad():
        got = merged(**tiny.prompt(merged, "tItt")).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_quantised_layers_beside_an_attention_module(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    lora = {"rank": 2, "parts": ["language_model", "multi_modal_projector"], "quantize": "nf4"}
    result = run(
        world,
        tmp_path,
        "parts.connector={type: resampler, queries: 4, heads: 2}",
        "stages.0.media=null",
        "stages.1.max_steps=2",
        f"stages.1.lora={json.dumps(lora)}",
        "stages.1.train={}",
    )
    start = load_file(tmp_path / "align" / "final" / "model.safetensors")
    end = load_file(result.final / "model.safetensors")
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert "model.multi_modal_projector.attn.in_proj_weight" in changed
    assert "model.multi_modal_projector.attn.out_proj.weight" in changed
    assert "model.language_model.layers.0.mlp.up_proj.weight" in changed


class WithUnusedLayer(MLP):
    """A connector with a layer that nothing calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spare = nn.Linear(4, 4)


def test_an_adapter_without_gradient_ends_the_stage_at_once(world: Path, tmp_path: Path) -> None:
    if "test_unused_layer" not in CONNECTORS:
        CONNECTORS.add("test_unused_layer", WithUnusedLayer)
    lora = "{rank: 2, parts: [language_model, multi_modal_projector]}"
    with pytest.raises(RecipeError, match=r"adapter of multi_modal_projector\.spare got no gradient in the first step"):
        run(
            world,
            tmp_path,
            "parts.connector.type=test_unused_layer",
            "stages.0.max_steps=1",
            f"stages.1.lora={lora}",
            "stages.1.train={}",
        )


# What is left


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_lora_trains_merges_and_leaves_an_adapter(world: Path, tmp_path: Path, quantize: str | None) -> None:
    pytest.importorskip("peft")
    if quantize:
        pytest.importorskip("bitsandbytes")
    stage = {"rank": 4, "alpha": 8, "quantize": quantize}
    lora = (f"stages.1.lora={json.dumps(stage)}", "stages.1.train={multi_modal_projector: 1e-3}")
    result = run(world, tmp_path, *lora)
    start = load_file(tmp_path / "align" / "final" / "model.safetensors")
    end = load_file(result.final / "model.safetensors")
    assert set(start) == set(end)
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_1", "linear_2"
    }  # fmt: skip
    adapter = load_file(tmp_path / "tune" / "adapter" / "adapter_model.safetensors")
    name = "language_model.layers.1.mlp.up_proj"
    down, up = (adapter[f"base_model.model.model.{name}.lora_{which}.weight"] for which in "AB")
    assert torch.allclose(end[f"model.{name}.weight"], start[f"model.{name}.weight"] + 2 * up @ down, atol=1e-6)
    connector = "multi_modal_projector.linear_1.weight"
    assert torch.equal(adapter[f"base_model.model.model.{connector}"], end[f"model.{connector}"])


def test_an_adapter_that_is_not_merged_is_what_peft_reads(world: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = ("stages.1.lora={rank: 4, merge: false}", "stages.1.train=[multi_modal_projector]")
    result = run(world, tmp_path / "apart", *lora)
    merged = run(world, tmp_path / "merged", *lora, "stages.1.lora.merge=true")
    base = build(open_checkpoint(tmp_path / "apart" / "align" / "final"))
    state = peft.PeftModel.from_pretrained(base, result.final).merge_and_unload().state_dict()
    for name, tensor in load_file(merged.final / "model.safetensors").items():
        assert torch.allclose(state[name], tensor, atol=1e-5), name


def test_an_adapter_alone_is_a_model_for_every_command(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from llavakit.training.trainer import StageTrainer

    lora = ("stages.1.lora={rank: 4, merge: false}", "stages.1.train=[multi_modal_projector]", "stages.1.save_steps=2")
    kept = {}
    finish = StageTrainer.train

    def watch(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        done = finish(self, *args, **kwargs)
        for folder in self.args.output_dir and Path(self.args.output_dir).glob("checkpoint-*"):
            kept[folder.name] = build(open_checkpoint(folder)).state_dict()
        return done

    monkeypatch.setattr(StageTrainer, "train", watch)
    run(world, tmp_path / "run", *lora)
    monkeypatch.undo()
    (tmp_path / "run").rename(tmp_path / "moved")
    final = tmp_path / "moved" / "final"
    raw = json.loads((final / "adapter_config.json").read_text())
    assert raw["target_modules"] == sorted(raw["target_modules"])
    assert raw["modules_to_save"] == ["model.multi_modal_projector"]
    assert not (final / "config.json").exists()
    assert inspect_model(final)["adapter"] == str((tmp_path / "moved" / "align" / "final").resolve())
    chat = load(final)
    assert chat.processor.tokenizer.vocab_size > 0
    convert(final, tmp_path / "whole", to="llavakit")
    written = load_file(tmp_path / "whole" / "model.safetensors")
    ours = chat.model.state_dict()
    assert all(torch.equal(written[name], ours[name]) for name in written)
    step = kept["checkpoint-4"]
    assert any(not torch.equal(step[name], ours[name]) for name in ours)
    (tmp_path / "moved" / "align" / "final" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not the model that the adapter was trained on any more"):
        load(final)


def test_the_first_stage_may_leave_an_adapter_on_a_model_from_parts(world: Path, tmp_path: Path) -> None:
    raw = tiny_training.recipe(world)
    raw["stages"] = [raw["stages"][1] | {"lora": {"rank": 2, "merge": False}, "train": ["image_newline"]}]
    raw["parts"]["media"]["image"]["arrange"] = {"type": "spatial_unpad"}
    raw["parts"]["media"]["image"]["views"] = {"type": "anyres", "size": 24, "pinpoints": [[24, 48]]}
    result = train(parse_recipe(raw | {"output": str(tmp_path)}), console=QUIET)
    folder = tmp_path / "tune" / "base"
    assert open_checkpoint(result.final).base.folder == folder.resolve()
    before, after = open_checkpoint(folder).state, open_checkpoint(result.final).state
    assert not torch.equal(before["model.image_newline"], after["model.image_newline"])


def test_an_adapter_of_another_recipe_is_refused(world: Path, tmp_path: Path) -> None:
    result = run(world, tmp_path, "stages.1.lora={rank: 2, merge: false}", "stages.1.train=[multi_modal_projector]")
    base = build(open_checkpoint(tmp_path / "align" / "final"))
    with pytest.raises(CheckpointError, match=r"linear_1\.bias' is unknown to the recipe's adapter"):
        load_adapter(prepare(base, stage(lora={"rank": 2})), result.final)
    base = build(open_checkpoint(tmp_path / "align" / "final"))
    with pytest.raises(CheckpointError, match="is missing; the recipe trains it"):
        load_adapter(prepare(base, stage(lora={"rank": 2}, train=["multi_modal_projector", "lm_head"])), result.final)


# Rows


def test_single_rows_of_a_table_train_and_all_others_stay(world: Path, tmp_path: Path) -> None:
    rows = '{language_model.embed_tokens: {rows: [USER, red, "?"], learning_rate: 0.1}, lm_head: {rows: [red]}}'
    result = run(world, tmp_path, f"stages.1.train={rows}", "stages.1.weight_decay=0.5")
    assert result.stages[1].metrics["trainable"] == {"language_model": 3 * 32, "lm_head": 32}
    start = load_file(tmp_path / "align" / "final" / "model.safetensors")
    end = load_file(result.final / "model.safetensors")
    ids = json.loads((result.final / "tokenizer.json").read_text())["model"]["vocab"]
    changed = {
        name: {row for row in range(len(end[name])) if not torch.equal(start[name][row], end[name][row])}
        for name in end
        if not torch.equal(start[name], end[name])
    }
    assert changed == {
        "model.language_model.embed_tokens.weight": {ids["USER"], ids["red"], ids["?"]},
        "lm_head.weight": {ids["red"]},
    }


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            "{language_model.embed_tokens: {rows: [rde]}}",
            "embed_tokens.rows: the tokenizer has no token 'rde'; did you",
        ),
        ("{multi_modal_projector: {rows: [red]}}", "multi_modal_projector is no table with one row per token"),
        ("{lm_head: {rows: [red], weight_decay: 0.1}}", "weight_decay: would also change the rows that do not train"),
        ("{lm_head: {rows: []}}", "rows"),
    ],
)
def test_rows_that_are_none_are_refused(world: Path, tmp_path: Path, train: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        run(world, tmp_path, f"stages.1.train={train}", "stages.0.max_steps=1")
    assert said in str(caught.value)


def test_rows_are_counted(world: Path) -> None:
    net = tiny.model(decoder="qwen2")
    tokenizer = type("Tokenizer", (), {"get_vocab": lambda self: {"a": 3, "b": 5}})()
    model = prepare(net, stage(lora=None, train={"language_model.embed_tokens": {"rows": ["a", "b"]}}), tokenizer)
    assert trainable_by_part(model) == {"language_model": 2 * 32}
