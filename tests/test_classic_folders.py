"""The authors' folders: templates by content, images between marks, sources that fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import WIDTH, write_classic

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.errors import CheckpointError, UserError
from llavakit.registry import ARRANGEMENTS
from llavakit.splice.layout import Run
from llavakit.splice.wrapped import Wrapped


def add_tokens(folder: Path, *tokens: str) -> list[int]:
    """Special tokens in the tokenizer's file and rows for them in the weights."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    first = len(raw["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] += [{"id": first + n, "content": token, **flags} for n, token in enumerate(tokens)]
    path.write_text(json.dumps(raw))
    weights = folder / "pytorch_model-00001-of-00002.bin"
    state = torch.load(weights)
    generator = torch.Generator().manual_seed(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.randn(len(tokens), WIDTH, generator=generator)])
    torch.save(state, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": first + len(tokens)}))
    return [first + n for n in range(len(tokens))]


@pytest.mark.parametrize(
    ("fields", "tokens", "template"),
    [
        ({}, (), "v1"),
        ({"_name_or_path": "lmsys/vicuna-7b-v1.5"}, (), "v1"),
        ({"_name_or_path": "meta-llama/Llama-2-13b-chat-hf"}, (), "llava_llama_2"),
        ({"_name_or_path": "liuhaotian/llava-llama-2-13b-chat-lightning-preview"}, (), "llava_llama_2"),
        ({"_name_or_path": "lmsys/vicuna-13b-from-llama2"}, (), "v1"),
        ({}, ("<|im_start|>", "<|im_end|>"), "chatml_direct"),
        ({}, ("<|start_header_id|>", "<|eot_id|>"), "llava_llama_3"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, (), "mistral_instruct"),
        ({"mm_use_im_start_end": True}, ("<im_start>", "<im_end>"), "llava_v0"),
        ({"mm_use_im_start_end": True, "_name_or_path": "LLaVA-7b-v1-1"}, ("<im_start>", "<im_end>"), "llava_v1"),
    ],
)
def test_the_template_follows_from_decoder_and_tokenizer_not_from_the_folders_name(tmp_path, fields, tokens, template):
    folder, encoder = write_classic(tmp_path, **fields)
    folder = folder.rename(tmp_path / "llava-v1.6-34b-llama-2-mistral")
    if tokens:
        add_tokens(folder, *tokens)
    assert open_checkpoint(folder, vision_tower=encoder).config.template == template
    assert open_checkpoint(folder, vision_tower=encoder, template="plain").config.template == "plain"


def test_images_stand_between_marks_where_the_config_says_so(tmp_path):
    folder, encoder = write_classic(tmp_path, mm_use_im_start_end=True)
    with pytest.raises(CheckpointError, match=r"config\.json: mm_use_im_start_end is true, .* no token '<im_start>'"):
        open_checkpoint(folder, vision_tower=encoder)
    start, end = add_tokens(folder, "<im_start>", "<im_end>")
    chat = llavakit.load(folder, vision_tower=encoder, template="v1")
    part = {"type": "image", "image": Image.new("RGB", (40, 20), "red")}
    request = chat.request([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])
    ids, image = request.input_ids.tolist(), chat.config.image_token_id
    first, last = ids.index(start), ids.index(end)
    assert ids[first : last + 1] == [start, *[image] * 16, end]
    assert ids.count(image) == 16
    # the marks are ordinary embeddings around the features, which never move them
    model = chat.model
    inputs = {"input_ids": request.input_ids[None], "pixel_values": torch.stack(request.pixel_values)}
    with torch.no_grad():
        whole = model(**inputs, visual_sizes=request.visual_sizes).logits
        table = model.get_input_embeddings().weight
        features = model.get_image_features(inputs["pixel_values"], visual_sizes=request.visual_sizes).pooler_output[0]
        by_hand = torch.cat([table[ids[: first + 1]], features, table[ids[last:]]])
        wanted = model(inputs_embeds=by_hand[None]).logits
    torch.testing.assert_close(whole, wanted)


def test_marks_survive_every_layout_that_has_them(tmp_path):
    folder, encoder = write_classic(tmp_path, mm_use_im_start_end=True, image_aspect_ratio="square")
    start, end = add_tokens(folder, "<im_start>", "<im_end>")
    arrange = {"type": "wrapped", "before": [start], "after": [end], "inner": {"type": "flat"}}
    convert(folder, tmp_path / "own", to="llavakit", vision_tower=encoder)
    assert open_checkpoint(tmp_path / "own").config.media["image"]["arrange"] == arrange
    convert(tmp_path / "own", tmp_path / "again", to="original")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["mm_use_im_start_end"] is True
    assert open_checkpoint(tmp_path / "again").config.media["image"]["arrange"] == arrange
    with pytest.raises(UserError, match=r"media\.image\.arrange\.type: is 'wrapped'"):
        convert(tmp_path / "own", tmp_path / "hf", to="hf")


def test_wrapped_lays_literal_ids_around_any_block():
    inner = {"type": "frames", "newline": "frame"}
    arrangement = ARRANGEMENTS.build({"type": "wrapped", "before": [5, 6], "after": [7], "inner": inner})
    grids = [(1, 2, 2), (1, 2, 2)]
    assert arrangement.layout(None, grids) == [Run(ids=(5, 6)), Run(visual=10), Run(ids=(7,))]
    assert arrangement.uses_newline
    assert arrangement.literal_ids == (5, 6, 7)
    tokens = [torch.ones(4, 3), torch.zeros(4, 3)]
    assert arrangement.arrange(None, grids, tokens, torch.full((3,), 9.0)).shape == (10, 3)
    for options in ({}, {"before": "im_start"}, {"before": [-1]}, {"after": [True]}, {"before": [1], "inner": "flat"}):
        with pytest.raises((UserError, ValueError)):
            Wrapped(**options)


def split_weights(folder: Path) -> dict[str, torch.Tensor]:
    state = {}
    for file in sorted(folder.glob("pytorch_model-*.bin")):
        state |= torch.load(file)
    return state


def test_weight_differences_are_added_to_their_base(tmp_path):
    """As apply_delta of the first LLaVA and LLaVA-Med: larger tables overlap, the connector has no base."""
    folder, encoder = write_classic(tmp_path)
    add_tokens(folder, "<im_start>", "<im_end>", "<im_patch>")
    state = build(open_checkpoint(folder, vision_tower=encoder)).state_dict()
    wanted = {name: tensor.clone() for name, tensor in state.items()}  # the files are mapped, and written below
    target, generator = split_weights(folder), torch.Generator().manual_seed(7)
    base = tmp_path / "base"
    base.mkdir()
    rows = target["lm_head.weight"].shape[0] - 3
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    names = [name for name in target if "mm_projector" not in name and "vision_tower" not in name]
    below = {
        n: torch.round(target[n] * 256) / 256 + torch.randn(target[n].shape, generator=generator) / 64 for n in names
    }
    below |= {name: below[name][:rows].clone() for name in tables}
    torch.save(below, base / "pytorch_model.bin")
    for file in sorted(folder.glob("pytorch_model-*.bin")):
        delta = torch.load(file)
        for name in set(delta) & set(below):
            delta[name] = delta[name].clone()
            delta[name][: len(below[name])] -= below[name]
        torch.save(delta, file)
    with pytest.raises(CheckpointError, match=r"weight differences .* --base"):
        open_checkpoint(folder, vision_tower=encoder)
    opened = open_checkpoint(folder, base=base, vision_tower=encoder)
    restored = build(opened).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(restored[name], tensor, atol=1e-6, rtol=0)
    below["model.layers.0.extra.weight"] = torch.zeros(2)
    torch.save(below, base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"base model has 'model\.layers\.0\.extra\.weight'"):
        open_checkpoint(folder, base=base, vision_tower=encoder)
    below.pop("model.layers.0.extra.weight")
    below["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    torch.save(below, base / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight' has shape \[48, 32\], the base model's tensor \[2, 2\]"
    ):
        build(open_checkpoint(folder, base=base, vision_tower=encoder))


def test_another_encoder_is_taken_only_if_that_is_asked_for(tmp_path):
    folder, encoder = write_classic(tmp_path)
    build(open_checkpoint(folder, vision_tower=encoder))  # the same weights
    state = load_file(encoder / "model.safetensors")
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, encoder / "model.safetensors")
    build(open_checkpoint(folder, vision_tower=encoder))  # the same in less precision
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file(state | {name: state[name] + 1}, encoder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc1\.weight' differs.*--exchange-vision-tower"):
        open_checkpoint(folder, vision_tower=encoder)
    convert(folder, tmp_path / "own", to="llavakit", vision_tower=encoder, exchange_vision_tower=True)
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert torch.equal(own["model.vision_tower.encoder.layers.1.mlp.fc1.weight"], state[name] + 1)
    with pytest.raises(UserError, match="name the new encoder with --vision-tower"):
        open_checkpoint(folder, exchange_vision_tower=True)


def test_a_base_for_a_whole_checkpoint_is_not_ignored(tmp_path):
    folder, encoder = write_classic(tmp_path)
    shutil.copytree(folder, tmp_path / "base")
    with pytest.raises(CheckpointError, match="--base"):
        build(open_checkpoint(folder, base=tmp_path / "base", vision_tower=encoder))


def test_an_encoder_in_open_clips_files_is_read(tmp_path):
    """OpenAI's CLIP under open_clip's names: fused projections, sizes and activation from its own config."""
    folder, encoder = write_classic(tmp_path)
    for file in sorted(folder.glob("pytorch_model-*.bin")):
        kept = {name: tensor.clone() for name, tensor in torch.load(file).items() if "vision_tower" not in name}
        torch.save(kept, file)
    names = dict.fromkeys(torch.load(folder / "pytorch_model-00001-of-00002.bin"), "pytorch_model-00001-of-00002.bin")
    names |= dict.fromkeys(torch.load(folder / "pytorch_model-00002-of-00002.bin"), "pytorch_model-00002-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    wanted = build(open_checkpoint(folder, vision_tower=encoder)).state_dict()
    own = {name.removeprefix("vision_model."): t for name, t in load_file(encoder / "model.safetensors").items()}
    state = {
        "visual.class_embedding": own["embeddings.class_embedding"],
        "visual.positional_embedding": own["embeddings.position_embedding.weight"],
        "visual.conv1.weight": own["embeddings.patch_embedding.weight"],
        "visual.proj": torch.zeros(16, 8),
    }
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = own[f"pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = own[f"post_layernorm.{kind}"]
        for n in range(3):
            block, layer = f"visual.transformer.resblocks.{n}.", f"encoder.layers.{n}."
            state[f"{block}attn.in_proj_{kind}"] = torch.cat([own[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            state[f"{block}attn.out_proj.{kind}"] = own[f"{layer}self_attn.out_proj.{kind}"]
            state[f"{block}mlp.c_fc.{kind}"] = own[f"{layer}mlp.fc1.{kind}"]
            state[f"{block}mlp.c_proj.{kind}"] = own[f"{layer}mlp.fc2.{kind}"]
            for m in (1, 2):
                state[f"{block}ln_{m}.{kind}"] = own[f"{layer}layer_norm{m}.{kind}"]
    other = tmp_path / "open_clip"
    other.mkdir()
    save_file(state, other / "open_clip_model.safetensors")
    model = {"vision_cfg": {"head_width": 8}, "quick_gelu": True}
    (other / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    opened = open_checkpoint(folder, vision_tower=other)
    assert opened.config.vision_config.hidden_act == "quick_gelu"
    found = build(opened).state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_layouts_with_several_encoders_name_a_prefix_for_each():
    from llavakit.checkpoints.classic import ClassicLayout
    from llavakit.checkpoints.layouts import rename_with

    class Two(ClassicLayout):
        system = "two"
        tower_prefixes = {
            "vision_tower": "model.image_tower.image_tower.",
            "video_tower": "model.video_tower.video_tower.vision_model.",
        }

    inward = rename_with(Two().renames_in())
    assert inward("model.image_tower.image_tower.pre_layrnorm.bias") == "model.vision_tower.pre_layrnorm.bias"
    assert inward("model.video_tower.video_tower.vision_model.x") == "model.video_tower.x"
    assert inward("model.video_tower.video_tower.x") == "model.video_tower.x"
