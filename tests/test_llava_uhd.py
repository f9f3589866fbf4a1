"""LLaVA-UHD: planner, resamplers, schema, checkpoint, recipe, and its parts under other systems' parts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.llava_uhd.checkpoint import Released
from llavakit.systems.llava_uhd.partition import NativeSlices
from llavakit.systems.llava_uhd.resampler import SpatialResampler, region_weights
from llavakit.views.plan import MediaSize

GOLDEN = Path(__file__).parent / "golden" / "llava-uhd"
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@pytest.mark.parametrize("path", [p for p in find_cases([GOLDEN]) if p.name != "flops"], ids=lambda p: p.name)
def test_golden_cases(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.mark.slow
def test_golden_flops():
    report = run_case(GOLDEN / "flops")
    assert report.status == "passed", report.reason


@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_views_are_whole_patches_and_tile_the_canvas(size):
    width, height = size
    plan = NativeSlices().plan(MediaSize(1, height, width))
    *slices, overview = plan.views
    assert all(view.width % 14 == 0 and view.height % 14 == 0 for view in plan.views)
    assert len(slices) == plan.rows * plan.cols <= 7
    assert overview.role == "whole"
    if slices:
        assert plan.canvas == (plan.rows * slices[0].height, plan.cols * slices[0].width)
        assert [(v.row, v.col) for v in slices] == [(r, c) for r in range(plan.rows) for c in range(plan.cols)]
    if 0.25 <= width / height <= 4 and min(width, height) > 400:
        areas = [view.width * view.height / 336**2 for view in plan.views]
        assert all(0.88 <= area <= 1.001 for area in areas)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (30, 5000)])
def test_extreme_shapes_can_be_capped(size):
    width, height = size
    plan = NativeSlices(max_patches=600).plan(MediaSize(1, height, width))
    assert all((v.width // 14) * (v.height // 14) <= 600 for v in plan.views)
    views = NativeSlices(max_patches=600).cut(Image.new("RGB", size), plan)
    assert [view.shape[1:] for view in views] == [(v.height, v.width) for v in plan.views]


def test_regions_of_a_map_read_only_their_own_cells():
    weights = region_weights(12, 12, 12)  # one cell per region
    assert torch.allclose(weights.sum(-1), torch.ones(144, weights.shape[1]), atol=1e-5)
    net = SpatialResampler(vision_width=8, hidden_size=16, queries=9, heads=2).eval()
    tokens = torch.randn(1, 36, 8)
    changed = tokens.clone()
    changed[0, 0] += 5  # the first cell of a 6 x 6 map belongs to the first region alone
    with torch.no_grad():
        difference = (net.resample(tokens, (1, 6, 6)) - net.resample(changed, (1, 6, 6))).abs().amax(-1)[0]
    assert difference[0] > 1e-4
    assert difference[[2, 4, 5, 6, 7, 8]].max() < 1e-6


def test_separators_stand_between_slices_as_words():
    media = {
        "image": {
            "views": {"type": "native_slices", "size": 16, "patch": 8},
            "arrange": {"type": "spatial_schema", "column_separator": 7, "row_separator": 8},
        }
    }
    net = tiny.model(connector="resampler", media=media)
    size = MediaSize(1, 32, 48)
    layout = net.model.media.layout("image", size)
    plan = net.model.media.plan("image", size)
    marks = [run.ids[0] for run in layout if run.ids]
    assert len(marks) == plan.rows * plan.cols
    assert marks[plan.cols - 1 :: plan.cols] == [8] * plan.rows
    assert net.model.media.count("image", size) == 4 * len(plan.views) + len(marks)


UHD = {
    "image": {
        "views": {"type": "native_slices", "size": 16, "patch": 8},
        "arrange": {"type": "spatial_schema", "column_separator": 7, "row_separator": 8},
    }
}


def sample_of(net, sizes, seed=0):
    """A prompt with one image per size: ids with expanded placeholders, views of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    ids, views = [1, 5], []
    for height, width in sizes:
        size = MediaSize(1, height, width)
        for run in net.model.media.layout("image", size):
            ids += [tiny.TOKEN] * run.visual + list(run.ids)
        ids += [9, 11]
        plan = net.model.media.plan("image", size)
        views += [torch.randn(3, v.height, v.width, generator=generator) for v in plan.views]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == tiny.TOKEN, -100),
        "pixel_values": views,
        "visual_sizes": torch.tensor([(1, h, w) for h, w in sizes]),
    }


@pytest.mark.parametrize(("encoder", "decoder"), [("clip", "llama"), ("siglip", "qwen2")])
def test_other_encoders_and_decoders_by_configuration_alone(tmp_path, encoder, decoder):
    net = tiny.model(encoder=encoder, decoder=decoder, connector="resampler", media=UHD)
    sample = sample_of(net, [(32, 48), (16, 16)])
    loss = net(**sample).loss
    loss.backward()
    assert net.model.multi_modal_projector.query.grad.abs().sum() > 0
    sample.pop("labels")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(net.generate(**sample, **options), net.generate(**sample, **options, use_cache=False))
    net.save_pretrained(tmp_path)
    again = LlavakitForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(net(**sample).logits, again(**sample).logits)


def test_views_encoded_together_equal_views_encoded_alone():
    net = tiny.model(connector="resampler", media=UHD)
    both = sample_of(net, [(32, 48), (40, 20)])
    with torch.no_grad():
        together = net.model.get_image_features(both["pixel_values"], both["visual_sizes"]).pooler_output
        start = 0
        for number, size in enumerate(both["visual_sizes"]):
            count = len(net.model.media.plan("image", MediaSize(*size.tolist())).views)
            alone = net.model.get_image_features(both["pixel_values"][start : start + count], size[None])
            torch.testing.assert_close(together[number], alone.pooler_output[0], atol=1e-5, rtol=0)
            start += count


@pytest.fixture
def released(tmp_path):
    """A tiny checkpoint under the released names, encoder included."""
    case = GOLDEN / "end_to_end"
    config = json.loads((case / "case.json").read_text())["config"]
    folder = tmp_path / "released"
    folder.mkdir()
    save_file(load_file(case / "weights.safetensors"), folder / "model.safetensors")
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **config["clip"]}))
    raw = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        **config["llama"],
        "mm_vision_tower": "encoder",
        "mm_hidden_size": config["clip"]["hidden_size"],
        "mm_projector_type": "adapt_spatial_resampler",
        "mm_num_queries": config["resampler"]["grid_size"] ** 2,
        "mm_num_heads": config["resampler"]["num_heads"],
        "mm_vision_select_layer": -2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, encoder


def test_released_layout_round_trips(released, tmp_path):
    folder, encoder = released
    checkpoint = open_checkpoint(folder, vision_tower=encoder)
    assert checkpoint.config.system == "llava-uhd"
    net = build(checkpoint)
    convert(folder, tmp_path / "native", to="llavakit", vision_tower=encoder)
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.allclose(written[name], source[name], atol=1e-6) for name in source)
    back = build(open_checkpoint(tmp_path / "again", vision_tower=encoder))
    assert torch.equal(net.model.multi_modal_projector.proj.weight, back.model.multi_modal_projector.proj.weight)


def test_published_shapes():
    raw = {
        "model_type": "llava_llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "adapt_spatial_resampler",
    }
    config = Released().read_config(raw, {})
    with torch.device("meta"):
        net = LlavakitForConditionalGeneration(config)
    shapes = {n: tuple(t.shape) for n, t in Released().write_state(config, net.state_dict())}
    assert shapes["model.mm_projector.query"] == (144, 5120)
    assert shapes["model.mm_projector.kv_proj.weight"] == (5120, 1024)
    assert shapes["model.mm_projector.attn.in_proj_weight"] == (15360, 5120)
    assert shapes["model.mm_projector.proj"] == (5120, 5120)
    assert shapes["model.mm_projector.pos_embed"] == (144, 5120)


def test_recipe_builds_at_published_scale_on_meta_tensors():
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    recipe = load_recipe(get_system("llava-uhd").recipe)
    net = build_meta(recipe)
    connector = sum(p.numel() for p in net.model.multi_modal_projector.parameters())
    width = 5120
    expected = 144 * width + 1024 * width + 4 * width * width + 4 * width + 3 * 2 * width + width * width
    assert connector == expected
    assert math.isclose(sum(p.numel() for p in net.model.language_model.parameters()), 12.85e9, rel_tol=0.01)


def test_planner_before_and_after_the_evaluation_resize():
    plan = NativeSlices(long_side=1024).plan(MediaSize(1, 100, 100))
    assert len(plan.views) == 7
    image = Image.fromarray(np.zeros((100, 100, 3), np.uint8))
    assert len(NativeSlices(long_side=1024).cut(image, plan)) == 7


def test_miniature_measures_every_arm():
    from llavakit.systems.llava_uhd.miniature import run

    verdict = run(seeds=(0,), steps=2, held_out=4)
    assert {c.idea.name for c in verdict.comparisons} == {"native slices, 34 tokens at most"}
    assert verdict.verdict in ("supported", "not supported", "inconclusive")
