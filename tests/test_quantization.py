"""Weights of 8 and 4 bits: close to the float model, the same alone as in a batch, refused where they cannot be."""

from __future__ import annotations

import pickle

import pytest
import tiny
import tiny_training
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llavakit
from llavakit.cli.app import app
from llavakit.errors import UserError
from llavakit.generation import Engine, Request, SamplingParams
from llavakit.generation.identity import weights_digest
from llavakit.model.quantization import QuantizedLinear, _Int4, _Int8, quantize

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="PyTorch has FBGEMM for x86 alone"
)
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def net():
    return tiny.model(text_config=tiny.DECODERS["llama"] | TEXT)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_eight_bits_of_weights_and_fourteen_of_what_they_read(rows):
    torch.manual_seed(rows)
    weight, hidden = torch.randn(48, 80), torch.randn(rows, 80) * torch.logspace(-3, 3, rows)[:, None]
    hidden[:, 7] *= 50  # a channel that would take all of 8 bits
    scale = weight.abs().amax(1, keepdim=True) / 127
    exact = hidden @ ((weight / scale).round() * scale).T
    kernel = _Int8(weight)
    made = kernel(hidden)
    error = (made - exact).abs() / hidden.abs().amax(1, keepdim=True)
    assert error.max() < 2e-4 * weight.abs().sum(1).max()
    assert (error.norm() / (exact / hidden.abs().amax(1, keepdim=True)).norm()) < 1e-3
    alone = torch.cat([kernel(row[None]) for row in hidden])
    assert torch.equal(made, alone)  # no row depends on its neighbours
    assert torch.equal(kernel(torch.zeros(1, 80)), torch.zeros(1, 48))
    broken = kernel(torch.cat([hidden, torch.full((1, 80), torch.nan)]))
    assert torch.equal(broken[:-1], made)
    assert broken[-1].isnan().all()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_eight_bits_can_be_pickled():
    torch.manual_seed(0)
    kernel, hidden = _Int8(torch.randn(8, 4)), torch.randn(2, 4)
    assert torch.equal(pickle.loads(pickle.dumps(kernel))(hidden), kernel(hidden))


def test_four_bits_are_groups_with_a_zero():
    torch.manual_seed(0)
    levels = torch.randint(0, 16, (32, 4, 32)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    weight = ((levels - 5) * 0.25).view(32, 128)  # 4 bits hold these exactly
    hidden = torch.randn(5, 128).bfloat16().float()
    torch.testing.assert_close(_Int4(weight)(hidden), hidden @ weight.T, atol=0.2, rtol=1e-2)


@pytest.mark.parametrize(("form", "close"), [("int8", 0.05), ("int4", 0.6)])
def test_a_quantised_decoder_stays_close_and_decodes_together_as_alone(net, form, close):
    samples = [tiny.prompt(net, layout, seed) for seed, layout in enumerate(("ttttt", "tIttt", "ttIttIttt"))]
    exact = [net(**sample).logits for sample in samples]
    before = weights_digest(net)
    assert quantize(net, form) is net
    digest = weights_digest(net)
    assert digest != before
    assert not any(type(one) is nn.Linear for one in net.model.language_model.modules())
    assert isinstance(net.lm_head, QuantizedLinear)
    assert any(type(one) is nn.Linear for one in net.model.vision_tower.modules())
    with torch.no_grad():
        for sample, logits in zip(samples, exact, strict=True):
            assert (net(**sample).logits - logits).norm() < close * logits.norm()
    sampling = SamplingParams(max_new_tokens=12, eos_token_ids=())
    media = [
        {name: value for name, value in sample.items() if name.startswith(("pixel", "visual"))} for sample in samples
    ]
    requests = [
        Request(sample["input_ids"][0], **own, sampling=sampling) for sample, own in zip(samples, media, strict=True)
    ]
    together = Engine(net, max_batch=3).generate(requests)
    for one, reply in zip(requests, together, strict=True):
        assert Engine(net, prefix_bytes=0).generate([one])[0].token_ids == reply.token_ids
        assert len(reply.token_ids) == 12


def test_layers_that_read_the_same_share_one_product(net):
    quantize(net, "int8")
    attention = net.model.language_model.layers[0].self_attn
    calls = []
    attention.q_proj.common.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    hidden = torch.randn(2, 3, 64)
    with torch.no_grad():
        made = [getattr(attention, name)(hidden) for name in ("q_proj", "k_proj", "v_proj")]
        assert [one.shape[-1] for one in made] == [64, 32, 32]
        assert len(calls) == 1
        again = attention.q_proj(hidden.clone())
        assert torch.equal(again, made[0])
        assert torch.equal(attention.v_proj(hidden), made[2])  # another reader in between disturbs nothing
    with pytest.raises(UserError, match="gives no gradients"):
        attention.o_proj(torch.randn(1, 64, requires_grad=True))


def test_parts_are_chosen_by_name(net):
    quantize(net, "int8", ["vision_tower", "multi_modal_projector"])
    assert not isinstance(net.lm_head, QuantizedLinear)
    assert any(isinstance(one, QuantizedLinear) for one in net.model.vision_tower.modules())
    with torch.no_grad():
        assert net(**tiny.prompt(net, "tIt")).logits.isfinite().all()


def test_what_cannot_be_quantised_is_one_line(net):
    with pytest.raises(UserError, match="'int5' is unknown; did you mean 'int"):
        quantize(net, "int5")
    with pytest.raises(UserError, match="no part 'vision_towr'; did you mean 'vision_tower'"):
        quantize(net, "int8", ["vision_towr"])
    with pytest.raises(UserError, match=r"language_model \(GPT2Model\) has no linear layers"):
        quantize(tiny.model(decoder="gpt2"), "int8")
    odd = tiny.model(text_config=tiny.DECODERS["llama"] | TEXT | {"intermediate_size": 80})
    with pytest.raises(
        UserError, match=r"multiple of 32 inputs, language_model\.layers\.0\.mlp\.down_proj has 80; int8"
    ):
        quantize(odd, "int4")
    assert not isinstance(odd.lm_head, QuantizedLinear)  # refused before anything was changed
    with pytest.raises(UserError, match="belongs to a model that runs here"):
        llavakit.load("http://localhost:1/v1", quantize="int8")
    with pytest.raises(UserError, match="say quantize too"):
        llavakit.load("nowhere", quantize_parts=["vision_tower"])


def test_load_and_the_command_line(tmp_path):
    tiny_training.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    config = llavakit.LlavakitConfig(text_config=tiny.DECODERS["llama"] | TEXT, media={}).text_config
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    chat = llavakit.load(tmp_path, quantize="int8", device="cpu")
    assert isinstance(chat.model.lm_head, QuantizedLinear)
    asked = [{"role": "user", "content": "what colour is the square ?"}]
    answer = chat.chat(asked, max_new_tokens=5)
    command = ["chat", str(tmp_path), "--device", "cpu", "--max-new-tokens", "5", "--prompt", asked[0]["content"]]
    result = CliRunner().invoke(app, [*command, "--quantize", "int8"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert answer in result.output
    with pytest.raises(UserError, match="'int2' is unknown"):
        CliRunner().invoke(app, [*command, "--quantize", "int2"], catch_exceptions=False)
