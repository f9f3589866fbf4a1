"""MedM-VL: 3D encoders, volume planners, attention pooling, checkpoints of both generations, other combinations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.conversation.messages import normalise
from llavakit.conversation.template import get_template
from llavakit.errors import CheckpointError, MediaError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.golden import find_cases, results, run_case
from llavakit.system import get_system
from llavakit.systems.medm_vl.checkpoint import KNOWN_LLMS, Published
from llavakit.systems.medm_vl.encoders import M3DClipConfig, M3DClipVision
from llavakit.systems.medm_vl.volumes import Box, Slices
from llavakit.views.plan import MediaSize

GOLDEN = Path(__file__).parent / "golden" / "medm-vl"
BOX = {"volume": {"views": {"type": "volume_box", "size": [8, 16, 16]}}}
DEEP = {
    "model_type": "m3d_clip_vision",
    "image_size": [8, 16, 16],
    "patch_size": [2, 4, 4],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden_cases(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


def test_a_bright_voxel_changes_the_token_of_its_patch():
    encoder = M3DClipVision(M3DClipConfig(**{k: v for k, v in DEEP.items() if k != "model_type"})).eval()
    torch.nn.init.normal_(encoder.patch_embedding.patch_embeddings["1"].weight)
    empty = torch.zeros(1, 1, 8, 16, 16)
    lit = empty.clone()
    lit[0, 0, 5, 9, 2] = 10.0  # depth cell 2, row cell 2, column cell 0
    with torch.no_grad():
        cut = [
            encoder.patch_embedding.patch_embeddings["1"](encoder._cut(v).permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4))
            for v in (empty, lit)
        ]
    changed = (cut[0] - cut[1]).abs().sum(-1)[0].nonzero().tolist()
    assert changed == [[2, 2, 0]]


def test_a_tiny_phi_3_needs_no_padding_token(tmp_path):
    from transformers import Phi3Config, Phi3ForCausalLM

    source = GOLDEN / "e2e_2d_siglip_mlp"
    case = json.loads((source / "case.json").read_text())
    llm = {name: value for name, value in case["config"]["llm"].items() if name not in ("type", "qkv_bias")}
    case["config"]["llm"] = {"type": "phi3", **llm}
    model = Phi3ForCausalLM(Phi3Config(**llm, pad_token_id=None)).eval()
    weights = {name: own for name, own in load_file(source / "weights.safetensors").items() if name[:4] != "llm."}
    save_file(weights | {f"llm.{k}": v for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    (tmp_path / "case.json").write_text(json.dumps(case))
    for name in ("inputs", "outputs"):
        save_file(load_file(source / f"{name}.safetensors"), tmp_path / f"{name}.safetensors")
    found = next(iter(results(tmp_path, [GOLDEN]).values())).tensors
    seen = found["spliced_attention_mask"]
    with torch.no_grad():
        logits = model(inputs_embeds=found["inputs_embeds"], attention_mask=seen).logits
    assert torch.allclose(found["logits"][seen.bool()], logits[seen.bool()], atol=1e-5)


def test_pretraining_learns_the_stripped_caption():
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": " Two lungs. \n"}]
    text, spans = get_template("caption").render(normalise(said))
    assert (text, [text[a:b] for a, b in spans]) == ("Two lungs.", ["Two lungs."])


def volume(seed=0, shape=(12, 20, 24)):
    return np.random.default_rng(seed).uniform(-900, 900, shape).astype(np.float32)


def test_shifted_window_gives_the_same_box_of_values():
    planner = Box(size=(8, 16, 16))
    plan = planner.plan(MediaSize(12, 20, 24))
    one = planner.cut(volume(), plan)[0]
    inner = volume() * 0.5  # inside the window, so only minimum and maximum matter
    other = planner.cut(inner, plan)[0]
    assert one.shape == (1, 8, 16, 16)
    np.testing.assert_allclose(one, other, atol=2e-2)


def test_background_around_a_body_is_cropped_away():
    body = volume()
    padded = np.full((20, 30, 34), -2000, np.float32)
    padded[4:16, 5:25, 6:30] = body
    planner = Slices(size=16, slices=6)
    plain = planner.cut(body, planner.plan(MediaSize(*body.shape)))
    framed = planner.cut(padded, planner.plan(MediaSize(*padded.shape)))
    assert len(plain) == 6
    np.testing.assert_array_equal(np.stack(plain), np.stack(framed))


def test_empty_and_mistaken_volumes_are_one_clear_line():
    planner = Slices(size=16)
    with pytest.raises(MediaError, match="nothing is above the background"):
        planner.cut(np.full((4, 8, 8), -2000, np.float32), planner.plan(MediaSize(4, 8, 8)))
    grey = Slices(size=16, stored="grey")
    with pytest.raises(MediaError, match="takes grey levels from 0 to 255"):
        grey.cut(volume(), grey.plan(MediaSize(12, 20, 24)))


def sample(net, media, text=6, seed=0):
    """A batch of one: text, then each media item given as (kind, size)."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("image", "video", "volume", "multi_image")
    ids, views, sizes, numbers = [1], [], [], []
    for kind, size in media:
        ids += [tiny.TOKEN] * net.model.media.count(kind, size) + [7]
        for view in net.model.media.plan(kind, size).views:
            channels = 1 if view.role == "volume" else 3
            shape = (
                (channels, view.depth, view.height, view.width)
                if view.role == "volume"
                else (3, view.height, view.width)
            )
            views.append(torch.randn(shape, generator=generator))
        sizes.append(size)
        numbers.append(kinds.index(kind))
    ids += torch.randint(3, tiny.TOKEN, (text,), generator=generator).tolist()
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == tiny.TOKEN, -100),
        "pixel_values": views,
        "visual_sizes": torch.tensor(sizes),
        "visual_modalities": torch.tensor(numbers),
    }


def trains_decodes_and_survives(net, inputs, folder):
    net(**inputs).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.model.multi_modal_projector.parameters())
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(net.generate(**inputs, **options), net.generate(**inputs, **options, use_cache=False))
    net.save_pretrained(folder)
    again = LlavakitForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(net(**inputs).logits, again(**inputs).logits)


def test_a_volume_and_a_radiograph_in_one_conversation(tmp_path):
    media = {
        "image": {"views": {"type": "squash", "size": tiny.SIZE}},
        "volume": {**BOX["volume"], "encoder": "volume_tower", "connector": "volume_projector"},
    }
    net = tiny.model(
        media=media,
        extra_encoders={"volume_tower": {"config": DEEP, "layer": -1}},
        extra_connectors={"volume_projector": {"type": "pooling", "stride": [2, 2, 2], "encoder": "volume_tower"}},
    )
    both = sample(net, [("image", MediaSize(1, 40, 30)), ("volume", MediaSize(20, 64, 64))])
    assert (both["input_ids"] == tiny.TOKEN).sum() == 16 + 2 * 2 * 2
    trains_decodes_and_survives(net, both, tmp_path)
    assert net.model.volume_projector.linear_1.weight.grad.abs().sum() > 0


def test_attention_pooling_on_tiles_of_another_encoder(tmp_path):
    views = {"type": "anyres", "size": tiny.SIZE, "pinpoints": [[32, 64], [64, 32], [64, 64]]}
    net = tiny.model(
        encoder="siglip",
        decoder="qwen2",
        media={"image": {"views": views}},
        connector="mlp",
    )
    net = LlavakitForConditionalGeneration(
        type(net.config)(
            **{**net.config.to_dict(), "connector": {"type": "attention_pooling", "queries": 6, "heads": 2}}
        )
    ).eval()
    inputs = sample(net, [("image", MediaSize(1, 60, 64)), ("image", MediaSize(1, 64, 20))])
    assert (inputs["input_ids"] == tiny.TOKEN).sum() == 12
    trains_decodes_and_survives(net, inputs, tmp_path)


@pytest.fixture
def ct(tmp_path):
    """A checkpoint in the first generation's form, which holds its parts' configurations."""
    case = GOLDEN / "e2e_3d_slices_siglip_attn_pooling"
    config = json.loads((case / "case.json").read_text())["config"]
    weights = load_file(case / "weights.safetensors")
    folder = tmp_path / "ct"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    encoder = {k: v for k, v in config["encoder"].items() if k != "type"}
    encoder["vision_use_head"] = any(".head." in name for name in weights)
    llm = {k: v for k, v in config["llm"].items() if k not in ("type", "qkv_bias")}
    raw = {
        "model_type": "lvlm",
        "llm_type": "qwen2",
        "llm_config": {"model_type": "qwen2", **llm},
        "encoder_image_type": "siglip",
        "encoder_image_config": {"model_type": "siglip_vision_model", **encoder},
        "encoder_image_select_layer": -1,
        "encoder_image_select_feature": "cls_patch",
        "connector_image_type": "attn_pooling",
        "connector_image_name": "mlp2x_gelu",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_published_layout_round_trips(ct, tmp_path):
    checkpoint = open_checkpoint(ct)
    assert checkpoint.config.media["volume"]["views"]["stored"] == "grey"
    build(checkpoint)
    convert(ct, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(ct / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    build(open_checkpoint(tmp_path / "again"))


def test_patch_of_siglip_drops_the_first_patch_as_published(ct, tmp_path):
    raw = json.loads((ct / "config.json").read_text()) | {"encoder_image_select_feature": "patch"}
    (ct / "config.json").write_text(json.dumps(raw))
    config = open_checkpoint(ct).config
    assert config.vision_feature_select_strategy == "drop_first"
    size = config.vision_config.image_size
    net = build(open_checkpoint(ct))
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tower = net.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        seen = net.get_image_features(pixels).last_hidden_state
    assert torch.equal(seen, tower[:, 1:])
    convert(ct, tmp_path / "again", to="original")
    assert open_checkpoint(tmp_path / "again").config.vision_feature_select_strategy == "drop_first"
    (ct / "config.json").write_text(json.dumps(raw | {"encoder_image_select_feature": "pooled"}))
    with pytest.raises(CheckpointError, match="encoder_image_select_feature is 'pooled'"):
        open_checkpoint(ct)


def test_the_text_side_of_a_contrastive_encoder_is_left_out_and_nothing_else(ct):
    state = load_file(ct / "model.safetensors")
    save_file(state | {"encoder_image.encoder.logit_scale": torch.zeros(1)}, ct / "model.safetensors")
    build(open_checkpoint(ct))
    save_file(state | {"encoder_image.encoder.logit_scales": torch.zeros(1)}, ct / "model.safetensors")
    with pytest.raises(CheckpointError, match="is unknown to the configuration"):
        build(open_checkpoint(ct))


def test_published_shapes_of_the_second_generation():
    raw = {
        "model_type": "lvlm",
        "lvlm_llm_type": "qwen2",
        "lvlm_llm_name_or_path": "Qwen/Qwen2.5-3B-Instruct",
        "lvlm_encoder_image_type": "siglip",
        "lvlm_encoder_image_name_or_path": "google/siglip-base-patch16-256-multilingual",
        "lvlm_encoder_image_select_layer": -1,
        "lvlm_encoder_image_select_feature": "cls_patch",
        "lvlm_connector_image_type": "attn_pooling",
        "lvlm_connector_image_name": "mlp2x_gelu",
    }
    config = Published().read_config(raw, {})
    with torch.device("meta"):
        net = LlavakitForConditionalGeneration(config)
    shapes = {name: tuple(t.shape) for name, t in Published().write_state(config, net.state_dict())}
    assert shapes["connector_image.query"] == (256, 768)
    assert shapes["connector_image.attn.in_proj_weight"] == (2304, 768)
    assert shapes["connector_image.connector.2.weight"] == (2048, 2048)
    assert shapes["llm.lm_head.weight"] == (151936, 2048)
    assert sum(p.numel() for p in net.model.multi_modal_projector.parameters()) == 8_330_240
    assert sum(p.numel() for p in net.model.vision_tower.parameters()) == 92_930_304
    assert sum(p.numel() for p in net.model.language_model.parameters()) == 3_085_938_688
    assert KNOWN_LLMS["Qwen/Qwen2.5-3B-Instruct"]["num_hidden_layers"] == 36


def test_recipe_builds_at_published_scale_on_meta_tensors():
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    net = build_meta(load_recipe(get_system("medm-vl").recipe))
    assert sum(p.numel() for p in net.model.multi_modal_projector.parameters()) == 8_330_240


@pytest.mark.slow
def test_cost_gives_the_published_figures():
    rows = {row.name: row.value for row in get_system("medm-vl").load("cost")().rows}
    assert rows["SigLIP base on one image, without the head"] == 46_204_452_864
    assert rows["SigLIP base on one image, with the head"] == 46_821_015_552
    assert rows["M3D-CLIP"] == 87_389_184
    assert rows["M3D-CLIP on one volume"] == 506_053_300_224
    assert rows["attention pooling, 8192 to 256 tokens: attention"] == 26_373_783_552
    assert rows["attention pooling, 8192 to 256 tokens: MLP"] == 2_952_790_016
    assert rows["spatial pooling and MLP"] == 5_771_264
    assert rows["prefill of 320 tokens (256 visual + 64)"] == 1_806_521_860_096
    assert rows["prefill of 8256 tokens (8192 unpooled slice tokens + 64)"] == 65_915_351_203_840


def test_miniature_measures_every_arm():
    from llavakit.systems.medm_vl.miniature import run

    assert run(seeds=(0, 1), steps=3, held_out=50).verdict in ("supported", "not supported", "inconclusive")
