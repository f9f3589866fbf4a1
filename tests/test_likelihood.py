"""The loss in chunks equals the plain one in value and gradient, and never holds the logits of all positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from llavakit.language import likelihood
from llavakit.language.head import Head
from llavakit.language.likelihood import cross_entropy, token_logps

TARGETS, WIDTH, VOCABULARY = 37, 24, 211


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Eight positions at a time, so that 37 targets make five chunks of unequal length."""
    monkeypatch.setitem(likelihood.CHUNK, "cpu", 4 * VOCABULARY * 8)


def head_of(scale=1.0, cap=None, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    head = Head(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    head.scale, head.cap = scale, cap
    return head


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TARGETS, WIDTH, generator=generator, dtype=dtype) * 3
    ids = torch.randint(VOCABULARY, (TARGETS,), generator=generator)
    return hidden.requires_grad_(), ids, torch.rand(TARGETS, generator=generator, dtype=dtype)


def gradients(value, hidden, head):
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return torch.autograd.grad(value, wanted)


SHAPES = [{}, {"bias": True}, {"cap": 5.0}, {"scale": 0.3, "cap": 2.0, "bias": True}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_cross_entropy_is_the_plain_one(shape, weighted, frozen):
    head, (hidden, ids, factors) = head_of(**shape), inputs()
    head.requires_grad_(not frozen)
    each = F.cross_entropy(head(hidden), ids, reduction="none")
    plain = (each * factors if weighted else each).sum() / 7  # what follows scales the gradients
    found = cross_entropy(head, hidden, ids, factors if weighted else None) / 7
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    for own, wanted in zip(gradients(found, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_log_probabilities_are_the_plain_ones(shape, frozen):
    head, (hidden, ids, factors) = head_of(**shape), inputs()
    head.requires_grad_(not frozen)
    logits = head(hidden)
    plain = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    found = token_logps(head, hidden, ids, likeliest=True)
    torch.testing.assert_close(found.logps, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.likeliest, logits.argmax(-1))
    mixed = [(torch.sigmoid(logps) * factors).sum() for logps in (found.logps, plain)]  # a loss that is not linear
    for own, wanted in zip(*(gradients(value, hidden, head) for value in mixed), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


def test_in_float64_it_is_exact():
    head, (hidden, ids, factors) = head_of(0.7, 3.0, True, torch.float64), inputs(torch.float64)
    plain = (F.cross_entropy(head(hidden), ids, reduction="none") * factors).sum()
    wanted = gradients(plain, hidden, head)
    for value in (cross_entropy(head, hidden, ids, factors), -(token_logps(head, hidden, ids).logps * factors).sum()):
        for own, exact in zip(gradients(value, hidden, head), wanted, strict=True):
            torch.testing.assert_close(own, exact, atol=1e-12, rtol=1e-12)


def test_a_second_backward_pass_is_refused():
    head, (hidden, ids, _) = head_of(), inputs()
    loss = cross_entropy(head, hidden, ids)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # rather than wrong gradients
        loss.backward()


class Wrapped(nn.Module):
    """An output layer with something beside its weights, as an adapter is."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.more, self.out_features = inner, nn.Linear(WIDTH, VOCABULARY), VOCABULARY

    def forward(self, hidden):
        return self.inner(hidden) + self.more(hidden)


def test_a_wrapped_output_layer_is_called():
    head, (hidden, ids, factors) = Wrapped(head_of(cap=4.0)), inputs()
    plain = (F.cross_entropy(head(hidden), ids, reduction="none") * factors).sum()
    found = cross_entropy(head, hidden, ids, factors)
    torch.testing.assert_close(found, plain)
    for own, wanted in zip(gradients(found, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_is_close():
    head, (hidden, ids, _) = head_of(), inputs()
    plain = F.cross_entropy(head(hidden), ids, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy(head, hidden, ids)
        logps = token_logps(head, hidden, ids).logps
    assert found.dtype == logps.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.01, atol=0)
    wanted = gradients(plain, hidden, head)
    for value in (found, -logps.sum()):
        for own, exact in zip(gradients(value, hidden, head), wanted, strict=True):
            assert own.dtype == torch.float32
            assert F.cosine_similarity(own.flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_to_learn_is_zero(frozen, wrapped):
    head, (hidden, ids, _) = head_of().requires_grad_(not frozen), inputs()
    head = Wrapped(head) if wrapped else head
    total = cross_entropy(head, hidden[:0], ids[:0]) + token_logps(head, hidden[:0], ids[:0]).logps.sum()
    assert total == 0
    assert all((gradient == 0).all() for gradient in gradients(total, hidden, head))


class Largest(TorchDispatchMode):
    """Notes the most values that a new tensor has."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.values = max(
            [self.values, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))]
        )
        return made


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "token_logps"])
def test_no_tensor_holds_the_logits_of_all_positions(name, frozen, wrapped):
    head, (hidden, ids, _) = head_of(cap=5.0), inputs()
    head = (Wrapped(head) if wrapped else head).requires_grad_(not frozen)
    with Largest() as plain:
        F.cross_entropy(head(hidden), ids, reduction="sum").backward()
    assert plain.values >= TARGETS * VOCABULARY
    with Largest() as own:
        value = cross_entropy(head, hidden, ids) if name == "cross_entropy" else token_logps(head, hidden, ids).logps
        value.sum().backward()
    assert own.values <= VOCABULARY * WIDTH  # the weight; a chunk's logits are smaller


FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8, "layer_types": ["full_attention"]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_family(family):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    head = Head.of(config)
    head.load_state_dict(model.lm_head.state_dict())
    ids = torch.randint(64, (1, 5))
    with torch.no_grad():
        wanted = model(ids).logits
        found = head(model.base_model(ids).last_hidden_state)
    torch.testing.assert_close(found, wanted)
