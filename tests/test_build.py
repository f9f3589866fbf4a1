"""Building what a recipe describes: encoders by registered name, configurations over those of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llavakit import registry
from llavakit.errors import RecipeError
from llavakit.training.build import build_meta, build_model, config_of
from llavakit.training.recipe import Recipe, parse_recipe


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, an encoder and a tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"num_hidden_layers": 2, "vocab_size": 64, "rms_norm_eps": 1e-4, "rope_theta": 777.0}
    LlamaForCausalLM(LlamaConfig(**text)).save_pretrained(folder / "llm")
    tiny_training.write_tokenizer(folder / "llm")
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": tiny_training.SIZE, "patch_size": 8, "hidden_act": "gelu"}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "clip")
    return folder


def recipe(sources: Path, **parts: Any) -> Recipe:
    raw = tiny_training.recipe(sources)
    init = {"language_model": str(sources / "llm"), "vision_tower": str(sources / "clip")}
    media = {"image": {"views": {"type": "pad", "size": tiny_training.SIZE}}}
    return parse_recipe(raw | {"parts": {"init": init, "media": media, **parts}})


def test_a_partial_configuration_goes_over_that_of_the_checkpoint(sources: Path) -> None:
    given = {"text_config": {"max_position_embeddings": 99}, "vision_config": {"layer_norm_eps": 1e-3}}
    model, _ = build_model(recipe(sources, **given))
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.max_position_embeddings, text.num_hidden_layers, text.rms_norm_eps) == (99, 2, 1e-4)
    assert text.rope_parameters["rope_theta"] == 777.0
    assert (vision.layer_norm_eps, vision.hidden_act, vision.patch_size) == (1e-3, "gelu", 8)
    weights = LlamaForCausalLM.from_pretrained(sources / "llm").state_dict()
    own = model.model.language_model.state_dict()
    assert torch.equal(own["layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_a_configuration_may_name_fewer_layers_than_the_checkpoint(sources: Path) -> None:
    config = config_of(recipe(sources, text_config={"num_hidden_layers": 1}))
    assert config.text_config.num_hidden_layers == 1
    assert config.text_config.hidden_size == 32


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"text_config": {"model_type": "qwen2"}}, "text_config.model_type: is 'qwen2', but the checkpoint under"),
        ({"text_config": {"hiden_size": 3}}, "text_config.hiden_size: unknown key of a llama configuration; did you"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(sources: Path, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        config_of(recipe(sources, **parts))


ENCODERS = {
    "llavakit_multiscale": {
        "encoder_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        "scales": [32, 16],
    },
    "m3d_clip_vision": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [8, 16, 16],
        "patch_size": [4, 8, 8],
    },
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_of_llavakit_or_of_a_system_is_named_in_a_recipe(sources: Path, name: str) -> None:
    raw = tiny_training.recipe(sources)["parts"]
    own = {"model_type": name, **ENCODERS[name]}
    media = {"image": {"views": {"type": "squash", "size": 32}}}
    where = {"vision_config": own} if name == "llavakit_multiscale" else {"extra_encoders": {"second": {"config": own}}}
    model = build_meta(recipe(sources, **{**raw, "media": media, **where}))
    found = model.model.vision_tower if name == "llavakit_multiscale" else model.model.second
    assert found.config.model_type == name
    assert getattr(found.config, "scales", [16, 32]) == [16, 32], "kept ascending, as the classic towers sort them"
    wrong = {"model_type": name, "no_such_key": 1}
    with pytest.raises(RecipeError, match=f"no_such_key: unknown key of a {name} configuration"):
        build_meta(recipe(sources, **{**raw, "vision_config": wrong}))


def test_every_registered_part_exists() -> None:
    registries = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    found = [(each.kind, name, each.get(name)) for each in registries for name in each]
    assert len(registries) > 8
    assert all(target is not None for _, _, target in found)
