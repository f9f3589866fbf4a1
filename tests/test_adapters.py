"""LoRA adapters: every option of PEFT, other programs' names, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import tiny
import torch
from peft_cases import CASES, TOLERANCE, WITHOUT_EFFECT, Case
from safetensors.torch import load_file, save_file

from llavakit.checkpoints.adapter_base import OtherBase, record_base
from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.inspect import inspect_model
from llavakit.checkpoints.opening import Checkpoint, build, open_checkpoint
from llavakit.errors import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_adapter_gives_pefts_logits_or_is_refused(case: Case, bases: Path, tmp_path: Path) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    outcome = peft_cases.run(case, tmp_path, bases, to_disk=False)
    if case.refused:
        assert case.refused in outcome.said
        assert "\n" not in outcome.said
    else:
        assert outcome.difference is not None, outcome.said
        assert outcome.difference <= TOLERANCE
        assert outcome.effect > 100 * TOLERANCE


def test_the_cases_cover_every_option_of_the_installed_peft() -> None:
    """A release with a new option fails here until a case says what becomes of it."""
    covered = {key for case in CASES for key in case.options} | WITHOUT_EFFECT
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == covered


# One plain adapter, changed


@pytest.fixture(scope="module")
def plain(bases: Path) -> tuple[Path, Path, torch.Tensor]:
    """Base, adapter and PEFT's logits."""
    case = Case("plain", {"target_modules": ["q_proj", "linear_1"], "bias": "all", "rank_pattern": {"linear_1": 2}})
    base = peft_cases.base_of(case, bases)
    return base.folder, bases / "plain", peft_cases.make(case, base, bases / "plain")


def _copy(source: Path, target: Path, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter's options, changed, in a new folder; returns its tensors."""
    target.mkdir()
    raw = json.loads((source / "adapter_config.json").read_text()) | options
    (target / "adapter_config.json").write_text(json.dumps(raw))
    return load_file(source / "adapter_model.safetensors")


def _difference(checkpoint: Checkpoint, wanted: torch.Tensor) -> float:
    net = build(checkpoint)
    return (peft_cases.logits(net, net) - wanted).abs().max().item()


LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        ({"use_frobnication": True}, None, "option 'use_frobnication' is unknown to the installed PEFT"),
        ({"peft_type": "VERA"}, None, "peft_type 'VERA' is not supported"),
        ({"bias": "none"}, None, "whose bias is 'none'"),
        ({"r": 5}, None, "has shape [4, 32], adapter_config.json and the base call for [5, 32]"),
        ({"modules_to_save": ["lm_head"]}, None, "tensor 'lm_head.weight' is missing; modules_to_save calls for it"),
        ({"trainable_token_indices": [3]}, None, "trained rows of 'model.language_model.embed_tokens' are missing"),
        ({}, lambda state: state.pop(f"{LAYER}.lora_B.weight"), "q_proj.lora_B.weight' is missing"),
        ({}, lambda state: state.update({f"{LAYER}.lora_C.weight": torch.ones(1)}), "q_proj.lora_C.weight' is unknown"),
        (
            {},
            lambda state: state.update({f"{LAYER}.token_adapter.trainable_tokens_delta": torch.ones(1)}),
            "trainable_tokens_delta' is unknown",
        ),
        (
            {},
            lambda state: state.update({"base_model.model.head.weight": torch.ones(1)}),
            "the adapter changes 'head.weight', which the base model does not have",
        ),
        (
            {},
            lambda state: state.update({LAYER.replace("layers.0", "layers.9") + ".lora_A.weight": torch.ones(4, 32)}),
            "layers.9.self_attn.q_proj', which the base model does not have",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    plain: tuple[Path, Path, torch.Tensor], tmp_path: Path, options: dict[str, Any], change: Callable | None, said: str
) -> None:
    base, adapter, _ = plain
    state = _copy(adapter, tmp_path / "changed", **options)
    if change is not None:
        change(state)
    save_file(state, tmp_path / "changed" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "changed", base=base)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_older_releases_that_are_off_are_no_obstacle(
    plain: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    base, adapter, wanted = plain
    state = _copy(adapter, tmp_path / "old", enable_lora=None, merge_weights=False)
    save_file(state, tmp_path / "old" / "adapter_model.safetensors")
    assert _difference(open_checkpoint(tmp_path / "old", base=base), wanted) <= TOLERANCE


def _older(name: str) -> str:
    name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    name = name.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")
    return name.replace("base_model.model.model.", "base_model.model.")


def _with_adapters_name(name: str) -> str:
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


@pytest.mark.parametrize("rename", [_older, _with_adapters_name], ids=["older transformers", "with the adapter's name"])
def test_names_that_other_programs_wrote(
    plain: tuple[Path, Path, torch.Tensor], tmp_path: Path, rename: Callable[[str], str]
) -> None:
    base, adapter, wanted = plain
    state = _copy(adapter, tmp_path / "renamed")
    save_file({rename(n): t for n, t in state.items()}, tmp_path / "renamed" / "adapter_model.safetensors")
    assert _difference(open_checkpoint(tmp_path / "renamed", base=base), wanted) <= TOLERANCE


def test_an_adapter_of_the_language_model_alone(bases: Path, tmp_path: Path) -> None:
    case = Case("language model", {"target_modules": r"model\.language_model\..*q_proj"})
    base = peft_cases.base_of(case, bases)
    wanted = peft_cases.make(case, base, tmp_path / "whole")
    state = _copy(tmp_path / "whole", tmp_path / "alone", target_modules=["q_proj"])
    state = {name.replace("model.language_model.", "model."): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "alone" / "adapter_model.safetensors")
    assert _difference(open_checkpoint(tmp_path / "alone", base=base.folder), wanted) <= TOLERANCE


def test_only_what_an_adapter_changes_is_read_to_merge_it(plain: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = plain
    before, after = open_checkpoint(base).state, open_checkpoint(adapter, base=base).state
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.endswith("weight")} == {
        name for name in before if name.endswith(("q_proj.weight", "projector.linear_1.weight"))
    }
    assert {name for name in changed if not name.endswith("weight")} == {n for n in before if n.endswith(".bias")}


# Which model an adapter belongs to


def test_an_adapter_finds_its_base_by_content(plain: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, adapter, wanted = plain
    shutil.copytree(base, tmp_path / "run" / "base")
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    record_base(tmp_path / "run" / "adapter", tmp_path / "run" / "base")
    (tmp_path / "run").rename(tmp_path / "moved")  # together: the relative place still holds
    folder = tmp_path / "moved" / "adapter"
    assert _difference(open_checkpoint(folder), wanted) <= TOLERANCE
    facts = inspect_model(folder)
    assert (facts["layout"], facts["adapter"]) == ("llavakit", str(tmp_path / "moved" / "base"))
    convert(folder, tmp_path / "merged", to="llavakit")
    assert _difference(open_checkpoint(tmp_path / "merged"), wanted) <= TOLERANCE

    other = tiny.model(seed=1)
    save(other.state_dict(), other.config, None, tmp_path / "other")
    with pytest.warns(OtherBase, match="trained on another model than .*other"):
        open_checkpoint(folder, base=tmp_path / "other")
    shutil.rmtree(tmp_path / "moved" / "base")
    (tmp_path / "other").rename(tmp_path / "moved" / "base")
    with pytest.raises(CheckpointError, match="is not the model that the adapter was trained on any more"):
        open_checkpoint(folder)
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(CheckpointError, match=r"holds an adapter without its base model .* name it with --base"):
        open_checkpoint(folder)
    assert _difference(open_checkpoint(folder, base=base), wanted) <= TOLERANCE
