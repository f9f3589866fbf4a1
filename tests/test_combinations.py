"""Any part with any part: published systems and recipes that nobody published, each by configuration alone.

Every combination is a dictionary that could stand in a config.json. Each must train in full, with LoRA and in packed
rows, decode with a cache as without one, and come back from its folder.
"""

from __future__ import annotations

import copy
import functools
import json

import pytest
import tiny
import torch

from llavakit.data.collate import Collator
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.training.lora import prepare
from llavakit.training.recipe import parse_recipe
from llavakit.views.plan import MediaSize

SQUASH = {"type": "squash", "size": tiny.SIZE}
FRAMES = {"type": "frames", "frame": SQUASH}
ANYRES = {"type": "anyres", "size": tiny.SIZE, "pinpoints": "(1x1),...,(3x3)"}
SLICES = {"type": "native_slices", "size": tiny.SIZE, "patch": 8, "max_slices": 4}
SCHEMA = {"type": "spatial_schema", "column_separator": 5, "row_separator": 6}
ONEVISION = {
    "image": {"views": ANYRES, "arrange": {"type": "spatial_unpad", "max_tiles": 2}},
    "multi_image": {"views": SQUASH, "arrange": {"type": "flat"}},
    "video": {"views": FRAMES, "arrange": {"type": "frames", "newline": "one_token", "pool": {"mode": "bilinear"}}},
}
COMPRESSOR = {"type": "compressor_prefusion", "compressor_size": 2, "compressor_heads": 2, "prefusion_layer_num": 2}
SPARSE = {
    "type": "dynamic_sparsification",
    "vision_keep_rate": 0.5,
    "output_text_len_for_training": 2,
    "sparse_layer": 1,
    "d_model": 16,
    "nhead": 4,
    "dim_feedforward": 32,
    "num_layers": 1,
}
EXPERT_SIZES = {"embed_dim": 6, "hyper_hidden": 5, "bottleneck": 2}
EXPERT_MLP = {"type": "visual_expert_mlp", **EXPERT_SIZES}
EXPERTS = {"type": "language_experts", **EXPERT_SIZES}
M3D = {
    "model_type": "m3d_clip_vision",
    "image_size": [8, 16, 16],
    "patch_size": [2, 4, 4],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PYRAMID = {
    "model_type": "convnext_pyramid",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 8, 8],
    "patch_size": 64 // (tiny.SIZE // 8) // 8,
}
BOX = {"type": "volume_box", "size": [8, 16, 16]}
IMAGE = ("image", MediaSize(1, 40, 90))
SMALL = ("image", MediaSize(1, 30, 20))
VIDEO = ("video", MediaSize(3, 30, 40))
TILED = ("multi_image", MediaSize(1, 40, 90))
CLIP = ("video", MediaSize(2, 30, 40))
VOLUME = ("volume", MediaSize(20, 64, 64))


def combination(encoder: str, connector: dict, decoder: str, media: dict, layers: int = 2, **more) -> dict:
    return {
        "vision_config": tiny.ENCODERS[encoder],
        "connector": connector,
        "text_config": tiny.DECODERS[decoder] | {"num_hidden_layers": layers},
        "image_token_id": tiny.TOKEN,
        "media": media,
        **more,
    }


# name: (configuration, media of the first sample, media of the second)
COMBINATIONS = {
    "OneVision": (combination("siglip", tiny.CONNECTORS["mlp"], "qwen2", ONEVISION), [IMAGE], [VIDEO]),
    "UHD": (
        combination(
            "clip",
            {"type": "spatial_resampler", "queries": 4, "heads": 2},
            "llama",
            {"image": {"views": SLICES, "arrange": SCHEMA}},
        ),
        [IMAGE],
        [SMALL],
    ),
    "Mini": (
        combination("clip", COMPRESSOR, "llama", {"image": {"views": SQUASH}, "video": {"views": FRAMES}}),
        [IMAGE],
        [VIDEO],
    ),
    "Dynamic": (
        combination(
            "clip",
            tiny.CONNECTORS["mlp"],
            "llama",
            {"image": {"views": SQUASH}},
            layers=4,
            language_adapter=SPARSE,
        ),
        [IMAGE],
        [SMALL],
    ),
    "MedM-VL": (
        combination(
            "clip",
            {"type": "pooling", "stride": [2, 2, 2]},
            "phi",
            {"volume": {"views": BOX}},
            vision_feature_layer=-1,
        )
        | {"vision_config": M3D},
        [VOLUME],
        [VOLUME],
    ),
    "UHD's slices into SigLIP and Qwen2": (
        combination(
            "siglip",
            {"type": "resampler", "queries": 4, "heads": 2},
            "qwen2",
            {"image": {"views": SLICES, "arrange": SCHEMA}},
        ),
        [IMAGE, SMALL],
        [SMALL],
    ),
    "Mini's compressor on OneVision's frames with Qwen2": (
        combination(
            "siglip",
            COMPRESSOR,
            "qwen2",
            {
                "image": {"views": ANYRES},
                "video": {"views": FRAMES, "arrange": {"type": "frames", "newline": "one_token"}},
            },
        ),
        [VIDEO],
        [IMAGE],
    ),
    "Dynamic sparsification under UHD's slices": (
        combination(
            "clip",
            {"type": "spatial_resampler", "queries": 4, "heads": 2},
            "llama",
            {"image": {"views": SLICES, "arrange": SCHEMA}},
            layers=4,
            language_adapter=SPARSE,
        ),
        [IMAGE],
        [SMALL],
    ),
    "MedM-VL's attention pooling on SigLIP's tiles": (
        combination(
            "siglip", {"type": "attention_pooling", "queries": 6, "heads": 2}, "qwen2", {"image": {"views": ANYRES}}
        ),
        [IMAGE],
        [SMALL, IMAGE],
    ),
    "INF's enhancement on SigLIP's tiles with Qwen2": (
        combination(
            "siglip",
            {"type": "dual_perspective", "crops": 2, "heads": 2},
            "qwen2",
            {"image": {"views": {"type": "dual_perspective", "size": tiny.SIZE, "crops": 2}}},
        ),
        [IMAGE, SMALL],
        [SMALL],
    ),
    "A volume and a radiograph in one conversation": (
        combination(
            "clip",
            tiny.CONNECTORS["mlp"],
            "llama",
            {
                "image": {"views": SQUASH},
                "volume": {"views": BOX, "encoder": "volume_tower", "connector": "volume_projector"},
            },
            extra_encoders={"volume_tower": {"config": M3D, "layer": -1}},
            extra_connectors={"volume_projector": {"type": "pooling", "stride": [2, 2, 2], "encoder": "volume_tower"}},
        ),
        [VOLUME, IMAGE],
        [IMAGE, VOLUME],
    ),
    "Mini's compressor in front of Dynamic sparsification": (
        combination("siglip", COMPRESSOR, "qwen2", {"image": {"views": ANYRES}}, layers=4, language_adapter=SPARSE),
        [IMAGE, SMALL],
        [SMALL],
    ),
    "Mini's compressor over Video-LLaVA's encoder": (
        combination(
            "clip",
            COMPRESSOR,
            "llama",
            {
                "image": {"views": SQUASH},
                "video": {
                    "views": {"type": "clip", "frame": SQUASH, "frames": 2},
                    "encoder": "video_tower",
                    "connector": "video_projector",
                },
            },
            extra_encoders={
                "video_tower": {
                    "config": tiny.ENCODERS["clip"] | {"model_type": "languagebind_video", "num_frames": 2},
                    "layer": -2,
                }
            },
            extra_connectors={"video_projector": COMPRESSOR | {"encoder": "video_tower"}},
        ),
        [IMAGE, CLIP],
        [CLIP],
    ),
    "MG's object tokens for one picture, OneVision's tiles for several": (
        combination(
            "clip",
            {"type": "conv_gate", "encoder": ["vision_tower", "detail"], "level_width": 8},
            "llama",
            {
                "image": {"views": {"type": "low_and_high", "size": 64, "low_size": tiny.SIZE}},
                "multi_image": {
                    "views": ANYRES,
                    "connector": "tiles_projector",
                    "arrange": {"type": "spatial_unpad", "max_tiles": 2},
                },
            },
            extra_encoders={"detail": {"config": PYRAMID, "layer": -1}},
            extra_connectors={"tiles_projector": {"type": "mlp"}},
        ),
        [IMAGE],
        [TILED, TILED],
    ),
    "Surgical pooling on a volume slice by slice": (
        combination(
            "siglip",
            {"type": "spatio_temporal", "slots": 6, "precision": "float32", "depth": 2},
            "qwen2",
            {"volume": {"views": {"type": "volume_slices", "size": tiny.SIZE, "slices": 4}}},
        ),
        [VOLUME],
        [VOLUME, VOLUME],
    ),
    "HyperLLaVA's experts on OneVision's media with Qwen2": (
        combination("siglip", EXPERT_MLP | {"variant": "both"}, "qwen2", ONEVISION, language_adapter=EXPERTS),
        [IMAGE],
        [VIDEO],
    ),
    "HyperLLaVA's connector in front of Dynamic sparsification": (
        combination("clip", EXPERT_MLP, "llama", {"image": {"views": SQUASH}}, layers=4, language_adapter=SPARSE),
        [IMAGE],
        [SMALL],
    ),
    "Language experts behind Mini's compressor": (
        combination("clip", COMPRESSOR, "llama", {"image": {"views": SQUASH}}, layers=3, language_adapter=EXPERTS),
        [IMAGE],
        [SMALL, SMALL],
    ),
}
NAMES = list(COMBINATIONS)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@functools.cache
def _built(name: str) -> LlavakitForConditionalGeneration:
    torch.manual_seed(NAMES.index(name))
    config = LlavakitConfig(**json.loads(json.dumps(COMBINATIONS[name][0])))
    net = LlavakitForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return net


def build(name: str) -> LlavakitForConditionalGeneration:
    return copy.deepcopy(_built(name))


def sample(net, media, seed: int, text: int = 8) -> dict:
    """One sample as a processor gives it: text, every media item with words behind it, a reply of five tokens."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(7, tiny.TOKEN, (count,), generator=generator).tolist()

    ids, views, kinds = [1, *words(2)], [], []
    spec = net.model.media
    for kind, size in media:
        for run in spec.layout(kind, size):
            ids += [tiny.TOKEN] * run.visual + list(run.ids)
        ids += words(2)
        kinds.append(MODALITIES.index(kind))
        for view in spec.plan(kind, size).views:
            shape = {"volume": (1, view.depth), "clip": (3, view.depth)}.get(view.role, (3,))
            views.append(torch.randn(*shape, view.height, view.width, generator=generator))
    ids += words(text)
    labels = [-100] * (len(ids) - 5) + ids[-5:]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "pixel_values": views,
        "visual_sizes": torch.tensor([size for _, size in media]),
        "visual_modalities": torch.tensor(kinds),
    }


def samples(net, name):
    _, first, second = COMBINATIONS[name]
    return [sample(net, first, 0), sample(net, second, 1, text=12)]


def prompts(net, name):
    """The two samples as one ragged batch, padded on the left, without labels."""
    batch = Collator(0, padding_side="left")(samples(net, name))
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_trains_every_part(name):
    net = build(name).train()
    loss = net(**Collator(0)(samples(net, name))).loss
    loss.backward()
    assert torch.isfinite(loss)
    for part, module in net.model.named_children():
        grads = [float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None]
        assert sum(grads) > 0, part


@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_uncached_and_batched_equals_alone(name):
    net = build(name)
    batch = prompts(net, name)
    together = net.generate(**batch, **GREEDY)
    assert torch.equal(together, net.generate(**batch, **GREEDY, use_cache=False))
    for row, one in enumerate(samples(net, name)):
        alone = Collator(0)([one])
        alone.pop("labels")
        assert torch.equal(net.generate(**alone, **GREEDY)[0, -6:], together[row, -6:])


@pytest.mark.parametrize("name", NAMES)
def test_comes_back_from_its_folder(name, tmp_path):
    net = build(name)
    batch = prompts(net, name)
    net.save_pretrained(tmp_path)
    again = LlavakitForConditionalGeneration.from_pretrained(tmp_path)
    stored = again.state_dict()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in net.state_dict().items())
    with torch.no_grad():  # convolutions on CPUs round by where in memory their weights lie
        torch.testing.assert_close(net(**batch).logits, again(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_equal_padded_ones(name):
    net = build(name)  # in evaluation: what drops tokens decides by chance while it trains
    padded = Collator(0)(samples(net, name))
    packed = Collator(0, 512, packing=True)(samples(net, name))
    assert len(packed["input_ids"]) == 1
    with torch.no_grad():
        one, other = net(**padded), net(**packed)
    torch.testing.assert_close(one.loss, other.loss, atol=2e-5, rtol=1e-4)
    start = 0
    for row, length in enumerate(padded["attention_mask"].sum(1).tolist()):
        own = other.logits[0, start : start + length]
        torch.testing.assert_close(own, one.logits[row, :length], atol=5e-5, rtol=1e-3)
        start += length


@pytest.mark.parametrize("name", NAMES)
def test_lora_learns_in_packed_rows(name):
    pytest.importorskip("peft")
    net = build(name)
    train = {"multi_modal_projector": 3e-3}
    if net.model.language_adapter is not None:
        train["language_adapter"] = 3e-3
    stage = {"name": "s", "learning_rate": 3e-3, "train": train, "lora": {"rank": 2, "alpha": 4, "dropout": 0.0}}
    model = prepare(net, parse_recipe({"model": "tiny", "stages": [stage]}).stages[0]).train()
    batch = Collator(0, 512, packing=True)(samples(net, name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)  # the same tokens are dropped every time
        loss = model(**batch, skip_logits=True).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_B" in n for n in moved)
    for part in train:
        assert any(part in n for n in moved), part
    assert not any("vision_tower" in n or "volume_tower" in n for n in moved)
