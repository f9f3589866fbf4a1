"""What the backward pass computes again: the same gradients, fewer bytes kept."""

import pytest
import tiny
import torch

from llavakit.errors import RecipeError
from llavakit.training.memory import LiveBytes
from llavakit.training.parameter_groups import freeze_all_but
from llavakit.training.recipe import PartTraining
from llavakit.training.recompute import parts_to_recompute, recompute


def net_of():
    torch.manual_seed(0)
    return tiny.model().train()


@pytest.fixture
def net():
    return net_of()


def step(chosen):
    """Bytes that are kept for the backward pass, and all gradients."""
    net = net_of()
    sample = tiny.prompt(net, "ttIttttt" * 8)
    recompute(net, chosen)
    with LiveBytes([*net.parameters(), *net.buffers()]) as live:
        loss = net(**sample, use_cache=False, skip_logits=True).loss
        kept = live.now
        loss.backward()
    return kept, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def share_kept(chosen):
    """Of what is kept without a choice; the gradients must be the same."""
    (every, plain), (kept, found) = step(False), step(chosen)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    return kept / every


def test_light_keeps_products_and_full_keeps_inputs():
    assert share_kept(True) < share_kept("light") < 0.8


def test_the_choice_is_per_part():
    both = share_kept({"language_model": True, "vision_tower": "light"})
    assert both < share_kept({"language_model": True}) < 1


def test_parts_without_gradients_are_left_alone(net):
    freeze_all_but(net, {"multi_modal_projector": PartTraining()})
    assert list(parts_to_recompute(net, "light")) == ["language_model"]
    freeze_all_but(net, {"vision_tower": PartTraining()})
    assert list(parts_to_recompute(net, True)) == ["vision_tower", "language_model"]


def test_a_frozen_encoder_keeps_nothing(net):
    freeze_all_but(net, {"multi_modal_projector": PartTraining()})
    sample = tiny.prompt(net, "ttIttttt")
    own = [*net.parameters(), *net.buffers(), sample["pixel_values"]]
    with LiveBytes(own) as live:
        visuals = net.model.encode_media(sample["pixel_values"])
    (features,) = visuals.features["multi_modal_projector"]
    assert not features.values.requires_grad
    assert live.now == features.values.untyped_storage().nbytes()


def test_parts_that_have_no_layers_are_named(net):
    with pytest.raises(RecipeError, match=r"gradient_checkpointing\.languge_model: .* did you mean 'language_model'"):
        recompute(net, {"languge_model": True})
    with pytest.raises(RecipeError, match=r"gradient_checkpointing: the module has no parts"):
        recompute(net.model.vision_tower, {"vision_tower": True})
