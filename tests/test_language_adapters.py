"""Language adapters: stepping decoder layers with an addition inside one, and decoding of several requests together."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llavakit.errors import UserError
from llavakit.generation import Engine, Request, SamplingParams
from llavakit.language.adapter import LanguageAdapter
from llavakit.language.layers import check_decoder, check_inside, run_layers
from llavakit.registry import ADAPTERS


class Expert(LanguageAdapter):
    """A low-rank branch beside the MLP of the last layer, in the smallest form that the seam takes."""

    def __init__(self, text_config):
        super().__init__(text_config)
        width = text_config.hidden_size
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, decoder, *, inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs):
        length = inputs_embeds.shape[1]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(seen, seen + length)[None].expand(len(inputs_embeds), -1)
        rows, columns = torch.arange(seen, seen + length)[:, None], torch.arange(seen + length)
        mask = torch.zeros(1, 1, length, seen + length).masked_fill(columns > rows, torch.finfo(torch.float32).min)
        last = len(decoder.layers) - 1
        hidden = run_layers(
            decoder.layers,
            inputs_embeds,
            decoder.rotary_emb,
            positions,
            attention_mask=mask,
            cache=past_key_values,
            mlp_add=lambda number, y: self.up(self.down(y)) if number == last else None,
        )
        output = BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=past_key_values)
        return output, None


ADAPTERS.add("test_expert", Expert)


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_layers_stepped_one_by_one_equal_the_decoder(decoder):
    net = tiny.model(decoder=decoder, language_adapter={"type": "test_expert"})
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    plain = net.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    nn.init.zeros_(net.model.language_adapter.up.weight)
    with torch.no_grad():
        torch.testing.assert_close(net.model(input_ids=ids, use_cache=False).last_hidden_state, plain)
        net.model.language_adapter.up.weight.normal_()
        assert (net.model(input_ids=ids, use_cache=False).last_hidden_state - plain).abs().max() > 0.1


def test_what_is_added_inside_gets_gradients_and_equals_the_sum_inside():
    net = tiny.model(language_adapter={"type": "test_expert"})
    adapter, layer = net.model.language_adapter, net.model.language_model.layers[-1]
    ids = torch.tensor([[1, 5, 9]])
    inside = []
    hook = layer.mlp.register_forward_hook(lambda module, args, out: inside.append((args[0], out)))
    hidden = net.model(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    ((read, plain),) = inside
    attended = []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: attended.append(args[0]))
    net.model(input_ids=ids, use_cache=False)
    hook.remove()
    expected = net.model.language_model.norm(attended[0] + plain + adapter.up(adapter.down(read)))
    torch.testing.assert_close(hidden, expected)
    hidden.sum().backward()
    assert adapter.down.weight.grad.abs().sum() > 0


def test_decoders_that_cannot_be_stepped_are_refused():
    with pytest.raises(UserError, match="gpt2 has no layers"):
        check_decoder(tiny.model(decoder="gpt2").model.language_model, "expert")
    check_inside(tiny.model().model.language_model.layers[0], "expert")
    with pytest.raises(UserError, match="PhiDecoderLayer differs in"):
        check_inside(tiny.model(decoder="phi").model.language_model.layers[0], "expert")


def test_an_adapter_without_rows_of_its_own_is_decoded_beside_others():
    net = tiny.model(language_adapter={"type": "test_expert"})
    prompts = [[1, 5, 9], [1, 7, 30, 31, 8, 9], [1, 4]]
    sampling = [SamplingParams(max_new_tokens=new, eos_token_ids=()) for new in (6, 3, 9)]
    requests = [Request(ids, sampling=own) for ids, own in zip(prompts, sampling, strict=True)]
    together = Engine(net).generate(requests)
    alone = [Engine(net).generate([request])[0] for request in requests]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    assert [len(reply.token_ids) for reply in together] == [6, 3, 9]
