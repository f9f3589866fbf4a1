"""Encoders of open_clip and timm as transformers' classes: the figures of the originals, and nothing left over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from llavakit.checkpoints.encoder_names import names_on_disk, to_memory
from llavakit.checkpoints.files import LazyState, assign_state
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.vision.encode import hidden_states
from llavakit.vision.open_clip import OpenClipEncoder, is_open_clip, read_open_clip, read_open_clip_folder

GOLDEN = Path(__file__).parent / "golden"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def case(name: str) -> tuple[LazyState, dict, dict]:
    folder = GOLDEN / name
    files = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    weights, inputs, outputs = files
    return LazyState.of(weights), inputs, outputs


def build(found: OpenClipEncoder) -> nn.Module:
    """transformers' model with every tensor given, and none left over."""
    options = dict(found.config)
    config = CONFIG_MAPPING[options.pop("model_type")](**options)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
    outer = LlavakitConfig(vision_config=config)
    state = found.state.renamed(lambda name: f"model.vision_tower.{name}")
    state = to_memory(outer, state).renamed(lambda name: name.removeprefix("model.vision_tower."))
    wrapped = any(name.startswith("vision_model.") for name in encoder.state_dict())
    state = state.renamed(lambda name: f"vision_model.{name}") if wrapped else state
    assign_state(encoder, state, where="golden")
    fresh = AutoModel.from_config(config)
    for name, buffer in fresh.named_buffers():
        owner, _, attribute = name.rpartition(".")
        encoder.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    return encoder.eval()


@torch.no_grad()
def test_clip_of_open_clip_gives_the_originals_features():
    weights, inputs, outputs = case("robust-clip/vision_tower")
    encoder = build(read_open_clip(weights, heads=4, quick_gelu=True))
    assert encoder.config.image_size == 16
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    (features,) = hidden_states(encoder, (inputs["x"] - mean) / std, [-2])
    torch.testing.assert_close(features[:, 1:], outputs["llava_patch"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_vit_of_timm_with_layer_scale_gives_the_originals_features():
    weights, inputs, outputs = case("llava-rad/vision-tower")
    encoder = build(read_open_clip(weights.renamed(lambda name: f"module.visual.trunk.{name}"), heads=4))
    for layer in (-2, -1, 0):
        (features,) = hidden_states(encoder, inputs["pixel_values"], [layer])
        torch.testing.assert_close(features[:, 1:], outputs[f"features_layer{layer}_patch"], atol=2e-5, rtol=2e-5)
    whole = encoder(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(whole, outputs["trunk_forward_with_final_norm"], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_plain_vit_of_timm_is_one_whose_scales_are_one():
    weights, inputs, outputs = case("llava-med/biomedclip-tower-v1.0")
    encoder = build(read_open_clip(weights, heads=4))
    (features,) = hidden_states(encoder, inputs["pixel_values"], [-2])
    torch.testing.assert_close(features[:, 1:], outputs["features"], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_convnext_of_timm_gives_the_originals_maps():
    weights, inputs, outputs = case("mg-llava/convnext_pyramid")
    state = weights.renamed(lambda name: f"visual.trunk.{name.removeprefix('vision_')}")
    encoder = build(read_open_clip(state))
    maps = encoder(inputs["pixels"], output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(maps[-1], outputs["last"], atol=5e-5, rtol=5e-4)
    size = maps[0].shape[-2:]
    pyramid = torch.cat([maps[0], *(F.interpolate(m, size=size, mode="bilinear") for m in maps[1:])], dim=1)
    torch.testing.assert_close(pyramid, outputs["pyramid"], atol=5e-5, rtol=5e-4)


def timm_siglip(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """A SigLIP of transformers under timm's names, written out by hand."""
    own = {name.removeprefix("vision_model."): tensor for name, tensor in encoder.state_dict().items()}
    found = {"patch_embed.proj.weight": own["embeddings.patch_embedding.weight"]}
    found["patch_embed.proj.bias"] = own["embeddings.patch_embedding.bias"]
    found["pos_embed"] = own["embeddings.position_embedding.weight"][None]
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = own[f"post_layernorm.{kind}"]
        query, key_value = own[f"head.attention.in_proj_{kind}"].split([16, 32])
        found[f"attn_pool.q.{kind}"], found[f"attn_pool.kv.{kind}"] = query.clone(), key_value.clone()
        found[f"attn_pool.proj.{kind}"] = own[f"head.attention.out_proj.{kind}"]
        found[f"attn_pool.norm.{kind}"] = own[f"head.layernorm.{kind}"]
        for part in ("fc1", "fc2"):
            found[f"attn_pool.mlp.{part}.{kind}"] = own[f"head.mlp.{part}.{kind}"]
        for n in range(2):
            block, layer = f"blocks.{n}.", f"encoder.layers.{n}."
            parts = [own[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{block}attn.proj.{kind}"] = own[f"{layer}self_attn.out_proj.{kind}"]
            for m in (1, 2):
                found[f"{block}norm{m}.{kind}"] = own[f"{layer}layer_norm{m}.{kind}"]
                found[f"{block}mlp.fc{m}.{kind}"] = own[f"{layer}mlp.fc{m}.{kind}"]
    return found | {"attn_pool.latent": own["head.probe"]}


@torch.no_grad()
def test_siglip_of_timm_with_its_pooling_head():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG_MAPPING["siglip_vision_model"](**sizes, image_size=16, patch_size=4)
    source = AutoModel.from_config(config).eval()
    for parameter in source.parameters():
        parameter.normal_(0, 0.3)
    text = {"text.transformer.resblocks.0.ln_1.weight": torch.zeros(2), "logit_scale": torch.zeros(())}
    state = {f"visual.trunk.{name}": tensor for name, tensor in timm_siglip(source).items()} | text
    encoder = build(read_open_clip(LazyState.of(state), heads=2))
    pixels = torch.randn(2, 3, 16, 16)
    ours, theirs = encoder(pixels), source(pixels)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


@torch.no_grad()
def test_a_folder_says_what_tensors_do_not(tmp_path):
    weights, _, _ = case("robust-clip/vision_tower")
    state = {f"visual.{name}": weights[name].contiguous() for name in weights}
    state |= {"text_projection": torch.zeros(2, 2), "transformer.resblocks.0.ln_1.bias": torch.zeros(3)}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 16, "layers": 3, "width": 32, "patch_size": 4, "head_width": 8}
    raw = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(raw))
    assert is_open_clip(tmp_path)
    found = read_open_clip_folder(tmp_path)
    assert found.config["num_attention_heads"] == 4
    assert found.config["hidden_act"] == "quick_gelu"
    for broken, said in ((3, "vision_cfg is 3"), ({"head_width": "x"}, "head_width is 'x'")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": broken}}))
        with pytest.raises(CheckpointError, match=said):
            read_open_clip_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.0.attn.q_norm.weight": torch.zeros(6)}, "'blocks.0.attn.q_norm.weight' has no place"),
        ({"reg_token": torch.zeros(1, 4, 24)}, "'reg_token' has no place"),
        ({"pos_embed": torch.zeros(1, 8, 24)}, "7 positions, which are no square"),
        ({"blocks.7.norm1.weight": torch.zeros(24)}, "with gaps"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(71, 24)}, "has no 3 equal parts"),
    ],
)
def test_what_has_no_place_is_refused(change, said):
    weights, _, _ = case("llava-rad/vision-tower")
    with pytest.raises(CheckpointError, match=said):
        build(read_open_clip(weights.joined(change), heads=4))


def test_other_weights_are_refused():
    with pytest.raises(CheckpointError, match="of no encoder of open_clip or timm"):
        read_open_clip(LazyState.of({"layer1.0.conv1.weight": torch.zeros(2)}))
    weights, _, _ = case("llava-rad/vision-tower")
    with pytest.raises(CheckpointError, match="do not divide the width 24"):
        read_open_clip(weights)  # width 24 is less than a head of 64


def test_names_on_disk_join_what_memory_splits():
    """DINOv2's giant fuses two projections in its files and may have them apart in memory; both directions agree."""
    encoder = {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "use_swiglu_ffn": True,
    }
    config = LlavakitConfig(vision_config=encoder)
    pairs = names_on_disk(config)
    fused = "model.vision_tower.encoder.layer.0.mlp.weights_in.weight"
    model = AutoModel.from_config(config.vision_config)
    in_memory = {f"model.vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}
    from llavakit.checkpoints.encoder_names import to_disk

    on_disk = to_disk(config, in_memory)
    assert fused in on_disk
    if len(pairs.get(fused, ())) == 2:
        assert torch.equal(on_disk[fused], torch.cat([in_memory[name] for name in pairs[fused]]))
    again = to_memory(config, on_disk)
    assert set(again) == set(in_memory)
    assert all(torch.equal(again[name], in_memory[name]) for name in in_memory)
