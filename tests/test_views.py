"""Planners and tiled arrangements: golden figures, equality with transformers, layout against tensors."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llavakit.errors import UserError
from llavakit.media import frame_sampling as sampling
from llavakit.proof.golden import Case, run_case
from llavakit.registry import ARRANGEMENTS, PLANNERS
from llavakit.splice.tiles import pool
from llavakit.systems.llava_1_5.parity_views import ADAPTERS
from llavakit.views import pixels, tiles
from llavakit.views.plan import MediaSize, Plan

GOLDEN = Path(__file__).parent / "golden" / "llava-1.5"
GREY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
V16 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ODD_SIZES = [(64, 48), (47, 65), (1, 1), (3, 90), (90, 2), (28, 28), (27, 29), (200, 199), (10, 400), (401, 11)]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def size_of(image):
    return MediaSize(1, image.height, image.width)


def cut(planner, image):
    return planner.cut(image, planner.plan(size_of(image)))


# Golden figures


@pytest.mark.parametrize("case", ["image-pad", "image-crop", "image-anyres", "anyres-plan", "unpad"])
def test_golden_views(case):
    report = run_case(GOLDEN / case, adapter=ADAPTERS[Case.read(GOLDEN / case).component])
    assert report.status == "passed", report.reason
    assert report.max_abs_error in (None, 0.0)


# Pixels


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("size", "crop"), [(28, 28), (30, 24), (20, 26)])
def test_pixels_equal_transformers(pad, size, crop):
    theirs = LlavaImageProcessorPil(do_pad=pad, size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
    ours = PLANNERS.build({"type": "pad" if pad else "square", "size": size, "crop": crop})
    for width, height in ODD_SIZES:
        image = noise(width, height, seed=width)
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        (view,) = cut(ours, image)
        assert view.dtype == np.float32
        assert np.array_equal(view, expected), (width, height)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "nearest", "box"])
def test_padding_in_bands_is_padding_at_once(monkeypatch, resample):
    monkeypatch.setattr(pixels, "_BAND_PIXELS", 1000)
    monkeypatch.setattr(pixels, "_SMALL_SQUARE", 0)
    for width, height in ODD_SIZES:
        image = noise(width, height)
        method = pixels.resampling(resample)
        expected = pixels.pad_to_square(image, (122, 116, 104)).resize((28, 28), method)
        assert pixels.pad_and_resize(image, (122, 116, 104), 28, method).tobytes() == expected.tobytes()


@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "bilinear", "nearest"])
def test_cropping_early_is_cropping_late(resample):
    method = pixels.resampling(resample)
    for width, height in ODD_SIZES:
        image = noise(width, height)
        whole = image.resize(pixels.shortest_edge(width, height, 28), method)
        expected = pixels.centre_crop(whole, 28, 28)
        assert pixels.resize_and_crop(image, 28, 28, method).tobytes() == expected.tobytes()


def test_cropping_early_is_cropping_late_at_every_aspect_ratio():
    generator = np.random.default_rng(0)
    for width, height, size in generator.integers((5, 5, 8), (260, 260, 64), (300, 3)).tolist():
        image, crop = noise(width, height), size - size % 3
        whole = image.resize(pixels.shortest_edge(width, height, size), Image.Resampling.BICUBIC)
        expected = pixels.centre_crop(whole, crop, crop)
        assert pixels.resize_and_crop(image, size, crop).tobytes() == expected.tobytes(), (width, height, size)


def test_very_long_strip_does_not_fill_memory():
    for planner in ("square", "pad"):
        (view,) = cut(PLANNERS.build({"type": planner, "size": 336}), Image.new("RGB", (60_000, 2), (9, 9, 9)))
        assert view.shape == (3, 336, 336)
        assert np.isfinite(view).all()


def test_square_and_pad_differ_in_what_they_keep():
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 20))  # a white stripe at the far left
    white = (1 - pixels.CLIP_MEAN[0]) / pixels.CLIP_STD[0]
    assert cut(PLANNERS.build({"type": "square", "size": 20}), image)[0].max() < white - 1
    assert cut(PLANNERS.build({"type": "pad", "size": 60}), image)[0][0].max() == pytest.approx(white, abs=1e-5)


def test_pad_plan_says_where_the_image_lies():
    plan = PLANNERS.build({"type": "pad", "size": 28}).plan(MediaSize(1, 25, 40))
    assert plan.canvas == (40, 40)
    assert plan.content == (0, 7, 40, 32)
    assert [(view.height, view.width) for view in plan.views] == [(28, 28)]


def test_planners_take_preprocessor_options():
    planner = PLANNERS.build({"type": "squash", "size": 14, **GREY, "resample": 2})
    (view,) = cut(planner, Image.new("RGB", (5, 9), (255, 0, 127)))
    assert view[0].max() == 1.0
    assert view[1].min() == -1.0
    with pytest.raises(UserError, match="unknown filter 'bicubik'"):
        PLANNERS.build({"type": "pad", "resample": "bicubik"})
    with pytest.raises(UserError, match="size: must be a positive"):
        PLANNERS.build({"type": "pad", "size": 0})
    with pytest.raises(UserError, match="view planner 'pad': has no option 'sise'"):
        PLANNERS.build({"type": "pad", "sise": 3})


# Tiles


def test_range_of_canvases_lists_widths_first():
    assert tiles.candidates("(1x1),...,(2x3)", 10) == ((10, 10), (10, 20), (10, 30), (20, 10), (20, 20), (20, 30))
    assert tiles.candidates("[[10, 20], [20, 10]]", 10) == ((10, 20), (20, 10))
    with pytest.raises(UserError, match="multiples of the tile size 10"):
        tiles.candidates([[10, 25]], 10)
    with pytest.raises(UserError, match="not a list"):
        tiles.candidates("ten by ten", 10)


def test_canvas_of_extreme_images():
    canvases = tiles.candidates("(1x1),...,(6x6)", 384)
    assert tiles.select_canvas((1, 100_000), canvases) == (384, 384)  # nothing survives anywhere: the smallest
    assert tiles.select_canvas((640, 480), ()) is None
    planner = PLANNERS.build({"type": "anyres", "size": 24, "pinpoints": "(1x1),...,(3x3)"})
    for width, height in ((1, 5000), (5000, 1), (1, 1)):
        image = noise(width, height)
        plan = planner.plan(size_of(image))
        assert len(planner.cut(image, plan)) == 1 + plan.rows * plan.cols


def test_mirrored_size_transposes_the_grid():
    planner = PLANNERS.build({"type": "anyres", "size": 384, "pinpoints": "(1x1),...,(6x6)"})
    for width, height in ((1000, 300), (1920, 1080), (500, 2600), (700, 650)):
        plan, mirrored = (planner.plan(MediaSize(1, *size)) for size in ((height, width), (width, height)))
        assert (plan.rows, plan.cols) == (mirrored.cols, mirrored.rows)


def test_tiles_together_are_the_canvas():
    planner = PLANNERS.build({"type": "anyres", "size": 8, "pinpoints": "(1x1),...,(3x3)", **GREY})
    image = noise(50, 33)
    plan = planner.plan(size_of(image))
    views = planner.cut(image, plan)
    canvas = np.zeros((3, *plan.canvas), np.float32)
    for view, values in zip(plan.views[1:], views[1:], strict=True):
        canvas[:, view.row * 8 : view.row * 8 + 8, view.col * 8 : view.col * 8 + 8] = values
    left, top, right, bottom = plan.content
    resized = cut(PLANNERS.build({"type": "squash", "size": 8, **GREY}), image)[0]
    assert np.array_equal(views[0], resized)
    inner = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), np.float32) / 255
    assert np.allclose(canvas[:, top:bottom, left:right], (inner.transpose(2, 0, 1) - 0.5) / 0.5, atol=1e-6)
    outside = np.ones(plan.canvas, bool)
    outside[top:bottom, left:right] = False
    assert (canvas[:, outside] == -1).all()


# Arrangements


def features(count, rows, cols, hidden=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows * cols, hidden, generator=generator) for _ in range(count)]


SPATIAL = [
    {"type": "flat"},
    {"type": "spatial"},
    {"type": "spatial", "maxpool": True},
    {"type": "spatial_unpad"},
    {"type": "spatial_unpad", "rounding": "hf"},
    {"type": "spatial_unpad", "max_tiles": 2},
    {"type": "spatial_unpad", "max_tiles": 4, "rounding": "hf"},
    {"type": "spatial_unpad", "base": False, "single_newline": False},
]


@pytest.mark.parametrize("options", SPATIAL, ids=str)
def test_layout_of_tiles_counts_what_arrange_makes(options):
    arrangement = ARRANGEMENTS.build(options)
    planner = PLANNERS.build({"type": "anyres", "size": 336, "pinpoints": V16})
    newline, draw = torch.full((3,), 7.0), random.Random(0)
    for _ in range(40):
        size = MediaSize(1, draw.randint(1, 3000), draw.randint(1, 3000))
        plan = planner.plan(size)
        rows, cols = draw.choice([(4, 4), (5, 5), (3, 4), (2, 2)])
        grids = [(1, rows, cols)] * len(plan.views)
        tokens = arrangement.arrange(plan, grids, features(len(grids), rows, cols), newline)
        assert len(tokens) == arrangement.layout(plan, grids)[0].visual, (size, rows, cols)
    for thin in (MediaSize(1, 3000, 1), MediaSize(1, 1, 3000)):  # unpadding leaves next to nothing
        plan = planner.plan(thin)
        grids = [(1, 4, 4)] * len(plan.views)
        tokens = arrangement.arrange(plan, grids, features(len(grids), 4, 4), newline)
        assert len(tokens) == arrangement.layout(plan, grids)[0].visual
    single = Plan("image", MediaSize(1, 5, 5), ())
    tokens = arrangement.arrange(single, [(1, 4, 4)], features(1, 4, 4), newline)
    assert len(tokens) == arrangement.layout(single, [(1, 4, 4)])[0].visual


def test_map_keeps_tiles_in_place():
    plan = PLANNERS.build({"type": "anyres", "size": 336, "pinpoints": V16}).plan(MediaSize(1, 640, 640))
    grids = [(1, 2, 2)] * 5
    numbered = [torch.stack([torch.full((4,), float(view)), torch.arange(4.0)], dim=1) for view in range(5)]
    tokens = ARRANGEMENTS.build({"type": "spatial_unpad"}).arrange(plan, grids, numbered, torch.tensor([-1.0, -1.0]))
    assert torch.equal(tokens[:4], numbered[0])
    body = tokens[4:].view(4, 5, 2)
    assert (body[:, 4] == -1).all()
    for view, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)], start=1):
        assert torch.equal(body[top : top + 2, left : left + 2].reshape(4, 2), numbered[view])


# LLaVA-OneVision at 384 pixels, 27 x 27 features: (width, height), tokens with a limit of 9, of 4, and without
ONEVISION = [
    ((640, 480), 2929, 2929, 2929),
    ((336, 336), 1485, 1485, 1485),
    ((385, 384), 1512, 1512, 1512),
    ((1000, 300), 2779, 2779, 2779),
    ((1920, 1080), 7269, 3649, 10929),
    ((4000, 3000), 7309, 3627, 20452),
]


@pytest.mark.parametrize(("size", "nine", "four", "unlimited"), ONEVISION)
def test_token_budget_of_onevision(size, nine, four, unlimited):
    planner = PLANNERS.build({"type": "anyres", "size": 384, "pinpoints": "(1x1),...,(6x6)"})
    plan = planner.plan(MediaSize(1, size[1], size[0]))
    grids = [(1, 27, 27)] * len(plan.views)
    for limit, tokens in ((9, nine), (4, four), (None, unlimited)):
        arrangement = ARRANGEMENTS.build({"type": "spatial_unpad", "max_tiles": limit})
        assert arrangement.layout(plan, grids)[0].visual == tokens


def test_rounding_of_transformers_differs_where_it_should():
    planner = PLANNERS.build({"type": "anyres", "size": 384, "pinpoints": "(1x1),...,(6x6)"})
    plan = planner.plan(MediaSize(1, 1809, 603))
    grids = [(1, 27, 27)] * len(plan.views)
    counts = {
        rounding: ARRANGEMENTS.build({"type": "spatial_unpad", "max_tiles": 9, "rounding": rounding})
        .layout(plan, grids)[0]
        .visual
        for rounding in ("int", "hf")
    }
    assert counts == {"int": 6804, "hf": 7074}


@pytest.mark.parametrize("newline", ["one_token", "grid", "frame", "no_token"])
@pytest.mark.parametrize(
    "options", [None, *({"mode": m, "stride": s} for m in ("bilinear", "average", "max") for s in (2, 4))]
)
def test_layout_of_frames_counts_what_arrange_makes(newline, options):
    arrangement = ARRANGEMENTS.build({"type": "frames", "newline": newline, "pool": options})
    plan = Plan("video", MediaSize(3, 9, 9), ())
    for side in (4, 5, 7):
        grids = [(1, side, side)] * 3
        tokens = arrangement.arrange(plan, grids, features(3, side, side), torch.zeros(3))
        assert len(tokens) == arrangement.layout(plan, grids)[0].visual
        deep = arrangement.arrange(plan, [(3, side, side)], [torch.cat(features(3, side, side))], torch.zeros(3))
        assert torch.equal(tokens, deep)  # one entry of three layers is three frames


def test_tokens_of_video_frames():
    plan = Plan("video", MediaSize(32, 384, 384), ())
    grids = [(1, 27, 27)] * 32
    expected = {"one_token": 196 * 32 + 1, "grid": 210 * 32, "frame": 197 * 32, "no_token": 196 * 32}
    for newline, count in expected.items():
        arrangement = ARRANGEMENTS.build({"type": "frames", "newline": newline, "pool": {"mode": "bilinear"}})
        assert arrangement.layout(plan, grids)[0].visual == count
        assert arrangement.uses_newline == (newline != "no_token")
    average = ARRANGEMENTS.build({"type": "frames", "pool": {"mode": "average", "stride": 2}})
    assert average.layout(plan, grids)[0].visual == 169 * 32
    with pytest.raises(UserError, match="newline: must be one of"):
        ARRANGEMENTS.build({"type": "frames", "newline": "row"})
    with pytest.raises(UserError, match="pool:"):
        ARRANGEMENTS.build({"type": "frames", "pool": {"mode": "cubic"}})


def test_faster_video_alternates_pooling():
    arrangement = ARRANGEMENTS.build({"type": "faster_video", "every": 2, "pool": {"mode": "average", "stride": 2}})
    grids = [(1, 8, 8)] * 3
    frames = features(3, 8, 8)
    marks = torch.stack([torch.full((3,), 2.0), torch.full((3,), 3.0)])
    tokens = arrangement.arrange(Plan("video", MediaSize(3, 8, 8), ()), grids, frames, marks)
    assert len(tokens) == arrangement.layout(None, grids)[0].visual == (4 * 5 + 1) + (2 * 3 + 1) + (4 * 5 + 1)
    assert (tokens[[20, 27, 48]] == 3).all()
    assert torch.allclose(tokens[21], pool(frames[1].view(1, 8, 8, 3), "average", 4)[0, 0, 0])


# Frames


def test_frames_go_through_the_planner_of_images():
    planner = PLANNERS.build({"type": "frames", "frame": {"type": "squash", "size": 6, **GREY}})
    frames = [noise(9, 7, seed) for seed in range(3)]
    plan = planner.plan(MediaSize(3, 7, 9))
    assert [(view.role, view.index) for view in plan.views] == [("frame", 0), ("frame", 1), ("frame", 2)]
    views = planner.cut(frames, plan)
    single = PLANNERS.build({"type": "squash", "size": 6, **GREY})
    assert all(np.array_equal(view, cut(single, frame)[0]) for view, frame in zip(views, frames, strict=True))
    tiled = PLANNERS.build({"type": "frames", "frame": {"type": "anyres", "size": 6, "pinpoints": [[6, 12]]}})
    plan = tiled.plan(MediaSize(2, 7, 9))
    assert [(view.role, view.index) for view in plan.views] == [
        (r, i) for i in (0, 1) for r in ("whole", "tile", "tile")
    ]
    assert len(tiled.cut(frames[:2], plan)) == 6
    with pytest.raises(ValueError, match="2 frames, there are 3"):
        tiled.cut(frames, plan)


def test_nearest_squash_is_torchs():
    frame = noise(50, 31)
    planner = PLANNERS.build({"type": "frames", "nearest": 24, "frame": {"type": "square", "size": 24, **GREY}})
    (view,) = planner.cut([frame], planner.plan(MediaSize(1, 31, 50)))
    pixels_first = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels_first, size=(24, 24), mode="nearest")[0]
    assert np.allclose(view, (expected / 255 - 0.5) / 0.5, atol=1e-6)


def test_sampling_rules_follow_the_published_code():
    assert sampling.uniform(5, 8) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert sampling.midpoints(100, 8) == [6, 18, 31, 43, 56, 68, 80, 93]
    assert sampling.midpoints(8, 8) == [0, 1, 2, 3, 4, 4, 5, 6]
    assert sampling.midpoints(1, 8) == [0]
    assert sampling.midpoints_per_second(100, 29.97) == [16, 49, 82]
    assert sampling.step(48, 24.0, 2, 32) == [0, 12, 24, 36]
    assert sampling.step(10, 25.0, 1, 0) == [0]
    assert sampling.step(90, 29.97, 1, 4, force=True) == [0, 29, 59, 89]
    assert sampling.every(10, 4) == [0, 2, 5, 7]
    assert sampling.rate([0.0, 0.1, 0.2, 1.0, 3.0], fps=1.0) == [0, 3, 4]  # seconds 1 and 2 show the same frame
    assert sampling.rate([0.0, 0.1, 0.2, 1.0, 3.0], fps=10, max_frames=3) == [0, 3, 4]


def test_sampling_names_mistakes():
    known = {"total": 9, "average_rate": 3.0, "timestamps": [i / 3 for i in range(9)]}
    assert sampling.choose(None, **known) == [0, 1, 2, 3, 4, 5, 6, 8]
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        sampling.choose({"type": "unifrom"}, **known)
    with pytest.raises(UserError, match=r"sampling\.fps: must be positive"):
        sampling.choose({"type": "step", "fps": 0}, **known)
    with pytest.raises(UserError, match="unexpected keyword"):
        sampling.choose({"type": "uniform", "count": 3}, **known)


def test_options_survive_json():
    options = {"type": "frames", "frame": {"type": "anyres", "size": 8, "pinpoints": [[8, 16]], **GREY}, "nearest": 9}
    assert PLANNERS.build(json.loads(json.dumps(options))).plan(MediaSize(2, 5, 6)).rows == 2


def test_float_images_are_resized_without_antialias():
    from llavakit.views.tensors import resize, short_side

    ramp = np.arange(8, dtype=np.float32).reshape(1, 1, 8).repeat(4, 1)
    assert resize(ramp, 2, 4)[0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    pulse = np.zeros((1, 1, 9), np.float32)
    pulse[..., 0] = 1
    assert resize(pulse, 1, 3)[0, 0].tolist() == [0.0, 0.0, 0.0]  # an antialiased filter would spread it
    assert resize(np.stack([ramp, ramp]), 3, 5, "bicubic").shape == (2, 1, 3, 5)
    assert (short_side(480, 640, 224), short_side(640, 480, 224)) == ((224, 298), (298, 224))
    with pytest.raises(UserError, match="mode must be one of"):
        resize(ramp, 2, 2, "nearest")
