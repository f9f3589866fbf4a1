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
from llavakit.data.records import Record
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
from llavakit.vision.geometry import geometry_of

GOLDEN = Path(__file__).parent / "golden" / "inf-llava"


def options(crops: int = 2) -> dict:
    return {
        "connector": {"type": "dual_perspective", "crops": crops, "heads": 2},
        "media": {"image": {"views": {"type": "dual_perspective", "size": tiny.SIZE, "crops": crops}}},
    }


def clip_mean():
    return torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)


def clip_std():
    return torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


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


def test_a_picture_of_full_size_is_seen_in_full_by_training_and_by_asking(published):
    """1008 pixels (3 x the view) reach the encoder both ways; `image_size` of one view is the published loader's."""
    from llavakit.model.processing import LlavakitProcessor
    from llavakit.proof.entries import byte_tokenizer
    from llavakit.training.dataset import Samples, StageCollator

    folder, _ = published
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8))  # stripes of a pixel: lost at 28
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    answered = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    seen = {}
    for size in (84, 28):
        checkpoint = open_checkpoint(folder)
        checkpoint.config.media["image"]["views"]["image_size"] = size
        net = build(checkpoint)
        processor = LlavakitProcessor.from_config(net.config, byte_tokenizer(), template="plain")
        asked = processor.encode(turns, add_generation_prompt=True)["pixel_values"]
        trained = Samples([Record(answered, "r", 1, {})], processor)[0]
        batch = StageCollator(0, None)([trained])
        assert batch["pixel_values"].shape == (18, 3, 28, 28)
        assert all(torch.equal(one, other) for one, other in zip(asked, batch["pixel_values"], strict=True))
        assert int((torch.as_tensor(trained["input_ids"]) == processor.image_token_id).sum()) == 16
        seen[size] = torch.stack(list(asked))
    pixels = seen[84][:9].unflatten(0, (3, 3)).permute(2, 0, 3, 1, 4).reshape(3, 84, 84)
    exact = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - clip_mean()) / clip_std()
    torch.testing.assert_close(pixels, exact, atol=1e-5, rtol=0)  # every pixel of the picture is in a block
    assert (seen[28][:9] - seen[84][:9]).abs().mean() > 0.5


@pytest.mark.parametrize("crops", [1, 2, 3, 4])
@pytest.mark.parametrize(("encoder", "width", "heads"), [("clip", 16, 2), ("siglip", 32, 8)])
def test_any_number_of_crops_and_width_on_any_encoder(crops, encoder, width, heads):
    vision = tiny.ENCODERS[encoder] | {"hidden_size": width, "image_size": 24, "patch_size": 8}
    fields = tiny.config(encoder=encoder).to_dict() | options(crops) | {"vision_config": vision}
    fields["connector"]["heads"] = heads
    fields["media"]["image"]["views"]["size"] = 24
    net = LlavakitForConditionalGeneration(LlavakitConfig.from_dict(fields)).eval()
    views, sizes = pictures(net, [(50, 31), (7, 90), (24, 24)])
    assert len(views) == 3 * count_of(crops)
    with torch.no_grad():
        tokens = net.model.get_image_features(views, visual_sizes=sizes).pooler_output
    assert [tuple(own.shape) for own in tokens] == [(9, net.config.hidden_size)] * 3
    assert net.model.media.count("image", MediaSize(1, 50, 31)) == 9


def test_all_views_of_a_batch_are_encoded_in_one_call(monkeypatch):
    net = model(3)
    views, sizes = pictures(net, [(40, 60), (33, 20), (10, 10)])
    calls = []
    forward = net.model.vision_tower.embeddings.forward
    monkeypatch.setattr(
        net.model.vision_tower.embeddings,
        "forward",
        lambda pixels, **k: calls.append(len(pixels)) or forward(pixels, **k),
    )
    net.model.get_image_features(views, visual_sizes=sizes)
    assert calls == [54]


def test_parts_of_a_pass_on_a_cpu_change_nothing(monkeypatch):
    from llavakit.vision import encode

    net = model(3)
    views, sizes = pictures(net, [(40, 60), (33, 20)])
    together = net.model.get_image_features(views, visual_sizes=sizes).pooler_output
    monkeypatch.setattr(encode, "CPU_PASS", 1)
    apart = net.model.get_image_features(views, visual_sizes=sizes).pooler_output
    assert len(encode.passes(net.model.vision_tower, views, geometry_of(net.config.vision_config))) == len(views)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_enhancement_keeps_its_promises():
    torch.manual_seed(0)
    net = DualEnhancement(32, 2).eval()
    local, sampled = torch.randn(2, 2, 4, 3, 5, 32)
    with torch.no_grad():
        whole = net(local, sampled)
        assert whole.shape == (2, 3, 5, 32)
        assert torch.allclose(net(local[1:], sampled[1:]), whole[1:], atol=1e-6)
        for ffn in (net.ffn_crop, net.ffn_stride):
            for parameter in ffn[2].parameters():
                parameter.zero_()
        enhanced = []
        net.ln_fuse.register_forward_pre_hook(lambda module, args: enhanced.append(args[0]))
        net(local, sampled)  # without the two small networks what is fused is the plain sum
        maps = merge_blocks(net._attend(split_blocks(merge_interleaved(sampled, 2), 2), local), 2)
        maps = maps + merge_interleaved(net._attend(split_interleaved(merge_blocks(local, 2), 2), sampled), 2)
        torch.testing.assert_close(enhanced[0], maps)
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


@pytest.mark.parametrize("n", [1, 4, 5])
def test_enhancement_is_attention_between_the_same_places(n):
    """The module beside a plain reading of the paper's formula, place by place."""
    torch.manual_seed(n)
    net, rows, columns = DualEnhancement(32, n).eval(), 2, 3
    local, sampled = torch.randn(2, 1, n * n, rows, columns, 32)
    low, high = merge_blocks(local, n), merge_interleaved(sampled, n)
    better_low, better_high = torch.zeros_like(low), torch.zeros_like(high)
    with torch.no_grad():
        for row in range(n):
            for col in range(n):
                block = slice(None), slice(row * rows, (row + 1) * rows), slice(col * columns, (col + 1) * columns)
                piece = slice(None), slice(row, None, n), slice(col, None, n)
                for place, query, key, out in ((block, high, low, better_high), (piece, low, high, better_low)):
                    q, k = query[place].flatten(1, 2), key[place].flatten(1, 2)
                    attended = net.attention.weights(q, k) @ net.attention._heads(q, k, k)[2]
                    attended = net.attention.linears[3](attended.transpose(1, 2).flatten(2))
                    out[place] = net.attention.ln(attended + q).unflatten(1, (rows, columns))
        fused = torch.cat([net.ffn_crop(better_low), net.ffn_stride(better_high)], -1) + better_high + better_low
        fused = net.ln_fuse(fused).movedim(-1, 1)
        wanted = torch.nn.functional.interpolate(fused, size=(rows, columns), mode="bilinear").movedim(1, -1)
        torch.testing.assert_close(net(local, sampled), wanted, atol=1e-5, rtol=1e-5)


def test_an_empty_turn_is_its_header_alone():
    from llavakit.conversation.template import get_template

    template = get_template("inf_llama_3")
    text, spans = template.render(
        [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", ""), ("assistant", "b"))
        ]
    )
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    assert text.endswith(f"questions.<|eot_id|>{user}{assistant}b<|eot_id|>")
    assert [text[slice(*span)] for span in spans] == ["b<|eot_id|>"]


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
    assert len(verdict.comparisons) == 4
    assert all(0 <= value <= 1 for c in verdict.comparisons for side in (c.idea, c.baseline) for value in side.values)
