"""The one model: any encoder x connector x decoder, mixed batches, packing, save and load."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.views.plan import MediaSize

GRID = list(itertools.product(tiny.ENCODERS, tiny.CONNECTORS, tiny.DECODERS))
LAYOUTS = ("ttItttt", "tttttt", "tItttItt", "Ittttttttt")


def logits(net, **inputs):
    with torch.no_grad():
        return net(**inputs).logits


def join(samples, side):
    """Samples as one padded batch, with the slice that each takes in its row."""
    length = max(s["input_ids"].shape[1] for s in samples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    places = []
    for sample in samples:
        own = sample["input_ids"].shape[1]
        start = length - own if side == "left" else 0
        places.append(slice(start, start + own))
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            row = torch.full((length,), fill)
            row[places[-1]] = sample[name][0]
            batch[name].append(row)
    batch = {name: torch.stack(rows) for name, rows in batch.items()}
    for name in ("pixel_values", "visual_sizes", "visual_modalities"):
        batch[name] = torch.cat([s[name] for s in samples if name in s])
    return batch, places


@pytest.mark.parametrize(("encoder", "connector", "decoder"), GRID, ids=lambda part: part)
def test_every_combination_runs_trains_decodes_and_is_kept(tmp_path, encoder, connector, decoder):
    net = tiny.model(encoder=encoder, connector=connector, decoder=decoder)
    sample = tiny.prompt(net, "ttItttt")
    out = net(**sample)
    assert torch.isfinite(out.loss)
    out.loss.backward()
    for part in (net.model.vision_tower, net.model.multi_modal_projector, net.model.language_model):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    sample.pop("labels")
    greedy = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4, "pad_token_id": 0}
    cached = net.generate(**sample, **greedy)
    uncached = net.generate(**sample, **greedy, use_cache=False)
    assert torch.equal(cached, uncached)
    net.save_pretrained(tmp_path)
    again = LlavakitForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(net, **sample), logits(again, **sample))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_mixed_padded_batches_give_the_logits_of_each_sample_alone(decoder, side):
    net = tiny.model(decoder=decoder)
    samples = [tiny.prompt(net, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        chosen = [samples[n] for n in order]
        batch, places = join(chosen, side)
        together = logits(net, **batch)
        for row, (sample, place) in enumerate(zip(chosen, places, strict=True)):
            torch.testing.assert_close(together[row, place], logits(net, **sample)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_packed_rows_give_the_logits_of_each_sample_alone(decoder):
    net = tiny.model(decoder=decoder)
    samples = [tiny.prompt(net, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    row = {name: torch.cat([s[name] for s in samples], dim=1) for name in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(s["input_ids"].shape[1]) for s in samples])[None]
    for name in ("pixel_values", "visual_sizes", "visual_modalities"):
        row[name] = torch.cat([s[name] for s in samples if name in s])
    packed = logits(net, **row)
    start = 0
    for sample in samples:
        length = sample["input_ids"].shape[1]
        torch.testing.assert_close(packed[0, start : start + length], logits(net, **sample)[0], atol=1e-4, rtol=0)
        start += length


def test_order_of_images_matters_and_order_of_samples_does_not():
    net = tiny.model()
    sample = tiny.prompt(net, "tItttItt")
    swapped = sample | {"pixel_values": sample["pixel_values"].flip(0)}
    assert (logits(net, **sample) - logits(net, **swapped)).abs().max() > 1e-3


def test_loss_from_supervised_positions_equals_full_loss_and_gradients():
    net = tiny.model()
    sample = tiny.prompt(net, "ttItttt")
    sample["labels"][:, :4] = -100
    full = net(**sample).loss
    full.backward()
    gradient = net.lm_head.weight.grad.clone()
    net.zero_grad()
    lean = net(**sample, skip_logits=True)
    lean.loss.backward()
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, full)
    torch.testing.assert_close(net.lm_head.weight.grad, gradient)


def test_features_that_were_encoded_before_give_the_same_logits():
    net = tiny.model()
    sample = tiny.prompt(net, "tItttItt")
    media = {name: sample.pop(name) for name in ("pixel_values", "visual_sizes", "visual_modalities")}
    with torch.no_grad():
        visuals = net.model.encode_media(**media)
    torch.testing.assert_close(logits(net, **sample, visuals=visuals), logits(net, **sample, **media))


def test_wrong_number_of_visual_tokens_is_an_error():
    net = tiny.model()
    sample = tiny.prompt(net, "ttIt")
    sample["input_ids"][0, 2] = 5
    with pytest.raises(ValueError, match="tokens: 15, features: 16"):
        net(**sample)


def test_unused_layers_of_the_tower_do_not_change_logits():
    net = tiny.model()
    sample = tiny.prompt(net, "ttIt")
    before = logits(net, **sample)
    torch.nn.init.normal_(net.model.vision_tower.encoder.layers[-1].mlp.fc1.weight)
    torch.nn.init.normal_(net.model.vision_tower.post_layernorm.weight)
    assert torch.equal(before, logits(net, **sample))


def test_gradient_checkpointing_gives_the_same_gradients():
    net = tiny.model().train()
    sample = tiny.prompt(net, "ttItttt")
    net(**sample).loss.backward()
    plain = net.model.multi_modal_projector.linear_1.weight.grad.clone()
    net.zero_grad()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net(**sample).loss.backward()
    assert torch.equal(net.model.multi_modal_projector.linear_1.weight.grad, plain)


def test_a_second_separator_ends_frames_and_images_take_the_first(tmp_path):
    view = {"type": "squash", "size": tiny.SIZE}
    tiles = {"type": "anyres", "size": tiny.SIZE, "pinpoints": [[tiny.SIZE, 2 * tiny.SIZE]]}
    media = {
        "image": {"views": tiles, "arrange": {"type": "spatial_unpad"}},
        "video": {"views": {"type": "frames", "frame": view}, "arrange": {"type": "faster_video", "every": 2}},
    }
    net = tiny.model(media=media)
    assert net.model.image_newline.shape == (2, net.config.hidden_size)
    with torch.no_grad():
        net.model.image_newline.copy_(torch.tensor([[7.0], [9.0]]).expand(2, net.config.hidden_size))
    net.save_pretrained(tmp_path)
    net = LlavakitForConditionalGeneration.from_pretrained(tmp_path)
    views = torch.randn(3, 3, tiny.SIZE, tiny.SIZE)
    for modality, depth, height in (("image", 1, 2 * tiny.SIZE), ("video", 3, tiny.SIZE)):
        size = MediaSize(depth, height, tiny.SIZE)
        sizes, kinds = torch.tensor([size]), torch.tensor([MODALITIES.index(modality)])
        (vectors,) = net.get_image_features(views, visual_sizes=sizes, visual_modalities=kinds).pooler_output
        assert len(vectors) == net.model.media.count(modality, size)
        ends = [(vectors == value).all(-1).sum().item() for value in (7.0, 9.0)]
        assert ends == ([8, 0] if modality == "image" else [2 + 1 + 2, 3])
