"""INF-LLaVA: golden figures, croppings, views, files, recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.connectors.base import Features
from llavakit.errors import UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.inf_llava.checkpoint import Published
from llavakit.systems.inf_llava.connector import CrossAttention, DualEnhancement, DualPerspectiveMLP, count_of
from llavakit.systems.inf_llava.cropping import (
    merge_blocks,
    merge_interleaved,
    split_blocks,
    split_interleaved,
)
from llavakit.systems.inf_llava.views import DualPerspective
from llavakit.views.plan import MediaSize
from llavakit.views.tensors import resize

GOLDEN = Path(__file__).parent / "golden" / "inf-llava"


def options(crops: int = 2) -> dict:
    return {
        "connector": {"type": "dual_perspective", "crops": crops, "heads": 2},
        "media": {"image": {"views": {"type": "dual_perspective", "size": tiny.SIZE, "crops": crops}}},
    }


def model(crops: int = 2, encoder: str = "clip", decoder: str = "llama") -> LlavakitForConditionalGeneration:
    config = tiny.config(encoder=encoder, decoder=decoder).to_dict() | options(crops)
    torch.manual_seed(0)
    return LlavakitForConditionalGeneration(LlavakitConfig.from_dict(config)).eval()


def pictures(net, sizes):
    """Views, sizes and token counts of random pictures."""
    planner, rng = net.model.media.route("image").planner, np.random.default_rng(0)
    views, shapes = [], []
    for height, width in sizes:
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        size = MediaSize(1, height, width)
        views += [torch.from_numpy(view) for view in planner.cut(image, net.model.media.plan("image", size))]
        shapes.append(size)
    return torch.stack(views), torch.tensor(shapes)


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_cutting_and_merging_are_inverse(n):
    maps = torch.randn(2, 2 * n, 3 * n, 4)
    assert torch.equal(merge_blocks(split_blocks(maps, n), n), maps)
    assert torch.equal(merge_interleaved(split_interleaved(maps, n), n), maps)
    assert split_interleaved(maps, n)[0, 0].tolist() == maps[0, ::n, ::n].tolist()


@pytest.mark.parametrize("side", [12, 36, 50])
def test_the_whole_view_is_the_middle_piece_for_odd_numbers_of_crops(side):
    picture = np.random.default_rng(0).normal(size=(3, side, side)).astype(np.float32)
    planner = DualPerspective(size=12, crops=3)
    views = planner.split(picture)
    assert len(views) == count_of(3) == 18
    np.testing.assert_allclose(views[9 + 4], resize(picture, 12, 12, "bicubic"), atol=1e-5)
    even = DualPerspective(size=12, crops=2).split(picture)
    assert len(even) == count_of(2) == 9
    np.testing.assert_array_equal(even[-1], resize(picture, 12, 12, "bicubic"))


def test_full_size_is_the_default_and_the_published_small_one_a_switch():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    size = MediaSize(1, 90, 90)
    full, lost = DualPerspective(size=12), DualPerspective(size=12, image_size=12)
    detail = [np.abs(np.diff(planner.cut(image, planner.plan(size))[0])).mean() for planner in (full, lost)]
    assert detail[0] > 1.5 * detail[1]


def test_enhancement_keeps_its_promises():
    torch.manual_seed(0)
    net = DualEnhancement(32, 2).eval()
    local, sampled = torch.randn(2, 2, 4, 3, 5, 32)
    with torch.no_grad():
        whole = net(local, sampled)
        assert whole.shape == (2, 3, 5, 32)
        assert torch.allclose(net(local[1:], sampled[1:]), whole[1:], atol=1e-6)
        mask = torch.zeros(1, 2, 3)  # a query without a key attends to all alike
        attention = CrossAttention(32)
        attention.init_parameters()
        assert torch.allclose(
            attention.weights(torch.randn(1, 2, 32), torch.randn(1, 3, 32), mask), torch.tensor(1 / 3)
        )
        assert all(torch.equal(linear.weight, attention.linears[0].weight) for linear in attention.linears)


@pytest.mark.parametrize(("crops", "encoder", "decoder"), [(2, "siglip", "qwen2"), (3, "clip", "llama")])
def test_batches_equal_single_pictures_and_train(crops, encoder, decoder):
    net = model(crops, encoder, decoder)
    views, sizes = pictures(net, [(40, 60), (33, 20)])
    count = count_of(crops)
    with torch.no_grad():
        together = net.model.get_image_features(views, visual_sizes=sizes).pooler_output
        for number in range(2):
            own = views[number * count : (number + 1) * count]
            alone = net.model.get_image_features(own, visual_sizes=sizes[number : number + 1]).pooler_output[0]
            torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=0)
    ids = torch.tensor([[1, *[tiny.TOKEN] * len(together[0]), 5], [1, *[tiny.TOKEN] * len(together[1]), 9]])
    labels = ids.masked_fill(ids == tiny.TOKEN, -100)
    net(input_ids=ids, labels=labels, pixel_values=views, visual_sizes=sizes).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.model.multi_modal_projector.parameters())


def test_views_that_do_not_fit_are_one_line():
    fields = tiny.config().to_dict() | options(3) | {"media": options(2)["media"]}
    net = LlavakitForConditionalGeneration(LlavakitConfig.from_dict(fields))
    with pytest.raises(UserError, match="with crops 3 reads 18 views of one size, the planner gives 9"):
        net.model.media.count("image", MediaSize(1, 20, 20))
    with pytest.raises(UserError, match="heads is 3"):
        DualPerspectiveMLP(vision_width=16, hidden_size=8, heads=3)


@pytest.fixture
def published(tmp_path):
    """The end-to-end case as a published folder: nothing in config.json says that pictures are cut."""
    config = json.loads((GOLDEN / "end_to_end" / "case.json").read_text())["config"]
    folder, encoder = tmp_path / "inf", tmp_path / "clip"
    folder.mkdir()
    encoder.mkdir()
    save_file(load_file(GOLDEN / "end_to_end" / "weights.safetensors"), folder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **config["clip"]}))
    raw = {"model_type": "llava_llama", **config["llama"], "mm_projector_type": "mlp2x_gelu"}
    raw |= {"mm_vision_tower": str(encoder), "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, encoder


def test_published_layout_round_trips(published, tmp_path):
    folder, encoder = published
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.system == "inf-llava"
    views = checkpoint.config.media["image"]["views"]
    assert (views["size"], views["crops"], views["image_size"]) == (28, 3, 84)
    convert(folder, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    back = open_checkpoint(tmp_path / "again", vision_tower=encoder)
    assert back.config.media == checkpoint.config.media
    one, other = (dict(build(c).named_parameters()) for c in (checkpoint, back))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_option_of_the_export_is_refused(published):
    folder, _ = published
    raw = json.loads((folder / "config.json").read_text()) | {"dual_perspective": {"crops_per_side": 3, "layers": 2}}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="layers"):
        open_checkpoint(folder)


def test_published_shapes_and_recipe():
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    net = build_meta(load_recipe(get_system("inf-llava").recipe))
    dem = net.model.multi_modal_projector.dem
    assert sum(p.numel() for p in dem.parameters()) == 4_400_256
    linear = [net.model.multi_modal_projector.linear_1, net.model.multi_modal_projector.linear_2]
    assert sum(p.numel() for layer in linear for p in layer.parameters()) == 20_979_712
    shapes = {name: tuple(t.shape) for name, t in Published().write_state(net.config, net.state_dict())}
    assert shapes["model.spatial_embed.attention.linears.3.weight"] == (1024, 1024)
    assert shapes["model.spatial_embed.ffn_stride.2.weight"] == (512, 64)
    assert shapes["model.spatial_embed.ln_fuse.bias"] == (1024,)
    assert net.model.media.count("image", MediaSize(1, 1200, 900)) == 576


def test_connector_needs_no_square_views():
    net = DualPerspectiveMLP(vision_width=16, hidden_size=8, crops=2, heads=2)
    features = Features(torch.randn(2 * 9 * 6, 16), [(1, 2, 3)] * 18, [0] * 9 + [1] * 9)
    out = net(features, [])
    assert out.grids == [(1, 2, 3)] * 2
    assert out.values.shape == (12, 8)


@pytest.mark.slow
def test_miniature_measures_every_arm():
    from llavakit.systems.inf_llava.miniature import run

    verdict = run(seeds=(0,), steps=8, held_out=16)
    assert len(verdict.comparisons) == 5
    assert all(0 <= value <= 1 for c in verdict.comparisons for side in (c.idea, c.baseline) for value in side.values)
