"""CLIP's activation with less memory traffic, beside transformers' own."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import QuickGELUActivation

from llavakit.vision.activations import QuickGELU, with_lean_activations

STATES = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 20, torch.tensor([0.0, -1e4, 1e4])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_are_those_of_transformers(dtype):
    states = STATES.to(dtype)
    before = states.clone()
    found = QuickGELU()(states)
    torch.testing.assert_close(found, QuickGELUActivation()(states), rtol=0 if dtype.itemsize == 2 else 1e-6, atol=1e-7)
    assert torch.equal(states, before)


def test_gradients_are_those_of_transformers():
    grads = []
    for activation in (QuickGELU(), QuickGELUActivation()):
        states = STATES.clone().requires_grad_()
        activation(states).sum().backward()
        grads.append(states.grad)
    assert torch.equal(*grads)


def test_an_encoder_takes_it():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, hidden_act="quick_gelu")
    encoder = CLIPVisionModel(config).eval()
    pixels, names = torch.randn(1, 3, 8, 8), set(encoder.state_dict())
    with torch.no_grad():
        wanted = encoder(pixels).last_hidden_state
        found = with_lean_activations(encoder)(pixels).last_hidden_state
    assert sum(isinstance(module, QuickGELU) for module in encoder.modules()) == 2
    assert set(encoder.state_dict()) == names
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
