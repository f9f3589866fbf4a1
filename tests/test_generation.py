"""The engine: whatever is decoded together, every request gets what it would get alone."""

from __future__ import annotations

import functools
import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny_server import small_chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llavakit.connectors.base import Connector
from llavakit.conversation.builtin import VICUNA_V1
from llavakit.conversation.template import Template
from llavakit.errors import UserError
from llavakit.generation import Engine, Request, RequestFailed, SamplingParams
from llavakit.generation.cache import ByteBounded, PrefixStore, RowCache, one_row_cache, prompt_keys, stack_layers
from llavakit.generation.lean import LeanDecoder, product
from llavakit.generation.rows import PlainRows
from llavakit.generation.sampling import RowRng, TokenSampler
from llavakit.generation.search import Branch, best_of_n, expand_branches, stage_beam_search
from llavakit.generation.stopping import StopStrings
from llavakit.generation.streaming import TextStream
from llavakit.language import likelihood
from llavakit.language.adapter import LanguageAdapter
from llavakit.language.head import Head
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.registry import ADAPTERS, CONNECTORS

LAYOUTS = ["ttttt", "tIttt", "ttIttIttttttttttt", "t", "Itt", "tttttttttttttttttttttttt", "tItttttt", "tttItttIttt"]


def request(sample: dict[str, Any], **sampling: Any) -> Request:
    sampling = {"max_new_tokens": 12, "eos_token_ids": ()} | sampling
    media = {name: sample[name] for name in ("pixel_values", "visual_sizes", "visual_modalities") if name in sample}
    return Request(sample["input_ids"][0], **media, sampling=SamplingParams(**sampling))


def alone(net: Any, sample: dict[str, Any], new: int, **options: Any) -> list[int]:
    """Transformers' own generate on one request."""
    inputs = {name: value for name, value in sample.items() if name != "labels"}
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new} | options
    return net.generate(**inputs, **options)[0, sample["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def states_of(net: Any, ids: list[int]) -> torch.Tensor:
    cache = one_row_cache()
    embeds = net.model.embed_ids(torch.tensor([ids]))
    net.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return stack_layers(cache)


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def samples(net: Any) -> list[dict[str, Any]]:
    return [tiny.prompt(net, layout, seed) for seed, layout in enumerate(LAYOUTS)]


def bytes_tokenizer(special: dict[int, str] | None = None) -> PreTrainedTokenizerFast:
    """Byte-level: ids below the vocabulary are single bytes, so that characters spread over tokens.

    Args:
        special: Special tokens in the place of bytes, by id.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {(special or {}).get(number, token): number for number, token in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": list((special or {}).values())})
    return tokenizer


# ---------------------------------------------------------------------- equality with single requests


@pytest.mark.parametrize("decoder", [*tiny.DECODERS, "mistral-window", "qwen2-window"])
def test_ragged_batch_equals_single_generate(decoder: str) -> None:
    fields: dict[str, Any] = {"decoder": decoder.split("-")[0]}
    if decoder == "mistral-window":
        fields["text_config"] = tiny.DECODERS["mistral"] | {"sliding_window": 10}
    if decoder == "qwen2-window":
        window = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}
        fields["text_config"] = tiny.DECODERS["qwen2"] | window
    net = tiny.model(seed=3, **fields)
    samples = [tiny.prompt(net, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    lengths = [3, 70, 1, 20, 9, 40, 15, 2]
    requests = [request(sample, max_new_tokens=new) for sample, new in zip(samples, lengths, strict=True)]
    replies = Engine(net, max_batch=3).generate(requests)
    expected = [alone(net, sample, new) for sample, new in zip(samples, lengths, strict=True)]
    assert [reply.token_ids for reply in replies] == expected
    assert {reply.finish_reason for reply in replies} == {"length"}


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_lean_step_gives_the_decoders_own_logits_and_leaves_others_alone(decoder: str) -> None:
    net = tiny.model(seed=4, decoder=decoder)
    language = net.model.language_model
    assert LeanDecoder.fits(language)
    ids = request(tiny.prompt(net, "ttttt", 1)).ids()
    found = []
    for lean in (True, False):
        rows = PlainRows(net, states_of(net, ids), rows=2, max_rows=2, max_length=64)
        assert rows.lean is not None
        rows.lean = rows.lean if lean else None
        for row, length in enumerate((len(ids), len(ids) - 2)):
            rows.insert(row, states_of(net, ids[:length]), length)
        with torch.inference_mode():
            found.append(torch.stack([rows.step([3, 7]), rows.step([9, 4])]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    hook = language.layers[0].mlp.register_forward_hook(lambda module, args, out: None)
    assert not LeanDecoder.fits(language)  # a step written out would never call it
    hook.remove()
    assert not LeanDecoder.fits(tiny.model(decoder="gpt2").model.language_model)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_few_rows_are_the_layers_own(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    plain, head = torch.nn.Linear(6, 10, bias=bias), Head(6, 10, bias=bias)
    head.scale, head.cap = 0.5, 2.0
    for layer in (plain, head):
        hidden = torch.randn(6, rows).t()  # one column behind the other
        torch.testing.assert_close(product(layer, hidden), layer(hidden))
    handle = plain.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(product(plain, hidden), plain(hidden))
    handle.remove()


def test_requests_join_while_others_decode(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, max_batch=4)
    handles = [engine.submit(request(samples[0], max_new_tokens=30))]
    for sample in samples[1:]:
        for _ in range(3):
            engine.step()
        handles.append(engine.submit(request(sample, max_new_tokens=10)))
    engine.run()
    assert not engine.busy
    assert engine.active == 0
    for handle, sample, new in zip(handles, samples, [30] + [10] * 7, strict=True):
        assert handle.result().token_ids == alone(net, sample, new)


def test_eos_ends_a_reply_and_defaults_to_the_models(net: Any, samples: list[dict[str, Any]]) -> None:
    free = alone(net, samples[1], 12)
    eos = free[5]
    reply = Engine(net).submit(request(samples[1], eos_token_ids=(eos,))).result()
    assert reply.token_ids == free[: free.index(eos) + 1]
    assert reply.finish_reason == "stop"
    assert reply.stop is None
    assert Engine(net).eos_token_ids == {2}


def test_reply_is_cut_at_the_decoders_positions(net: Any, samples: list[dict[str, Any]]) -> None:
    length = samples[1]["input_ids"].shape[1]
    engine = Engine(net, max_length=length + 6)
    assert len(engine.submit(request(samples[1], max_new_tokens=50)).result().token_ids) == 6
    with pytest.raises(UserError, match="allowed are 1 to"):
        Engine(net, max_length=length).submit(request(samples[1]))
    with pytest.raises(UserError, match="more than the decoder's 256"):
        Engine(net, max_length=1000)


def test_embeddings_instead_of_media(net: Any, samples: list[dict[str, Any]]) -> None:
    sample = samples[2]
    media = {name: sample[name] for name in ("pixel_values", "visual_sizes", "visual_modalities")}
    with torch.no_grad():
        embeds, _, _ = net.model.embed(sample["input_ids"], **media)
    params = SamplingParams(max_new_tokens=8, eos_token_ids=())
    reply = Engine(net).submit(Request(inputs_embeds=embeds[0], sampling=params)).result()
    assert reply.token_ids == alone(net, sample, 8)


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_generate_of_transformers_still_works(decoder: str) -> None:
    net = tiny.model(decoder=decoder)
    samples = [tiny.prompt(net, layout, seed) for seed, layout in enumerate(LAYOUTS[:4])]
    longest = max(sample["input_ids"].shape[1] for sample in samples)

    def padded(name: str) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(s[name], (longest - s[name].shape[1], 0)) for s in samples])

    batch = {name: padded(name) for name in ("input_ids", "attention_mask")}
    for name in ("pixel_values", "visual_sizes", "visual_modalities"):
        batch[name] = torch.cat([sample[name] for sample in samples if name in sample])
    options = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
    for search in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        together = net.generate(**batch, **options, **search)[:, longest:].tolist()
        assert together == [alone(net, sample, 8, **search) for sample in samples]
    cached = net.generate(**batch, **options, do_sample=False)
    assert torch.equal(cached, net.generate(**batch, **options, do_sample=False, use_cache=False))
    torch.manual_seed(0)
    sampled = net.generate(**batch, **options, do_sample=True, top_p=0.9)
    torch.manual_seed(0)
    assert torch.equal(sampled, net.generate(**batch, **options, do_sample=True, top_p=0.9, use_cache=False))


@pytest.mark.slow
def test_compiled_steps_give_the_same_replies(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, max_batch=2, max_length=128, compile=True)
    handles = [
        engine.submit(request(sample, max_new_tokens=new)) for sample, new in zip(samples, [3, 20, 9], strict=False)
    ]
    engine.run()
    for handle, sample, new in zip(handles, samples, [3, 20, 9], strict=False):
        assert handle.result().token_ids == alone(net, sample, new)


# ---------------------------------------------------------------------- connectors and adapters with needs


class _AsksPrompt(Connector):
    """Adds the mean of the prompt's text to every visual token, and changes the text too."""

    needs_prompt = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.linear = torch.nn.Linear(self.vision_width, self.hidden_size)

    def forward(self, features: Any, plans: Any, prompt: Any = None) -> Any:
        text = (prompt.embeds * (prompt.visible & ~prompt.visual).unsqueeze(-1)).sum((0, 1))
        return replace(features, values=self.linear(features.values) + 0.1 * text), prompt.embeds * 1.5


class _OwnCache(LanguageAdapter):
    """Scales the embeddings by how many positions its own cache has seen in prefill."""

    def make_cache(self) -> Any:
        return DynamicCache()

    def forward(self, decoder: Any, *, inputs_embeds: Any, past_key_values: Any, **kwargs: Any) -> Any:
        for name in ("visual", "input_ids", "labels", "segments"):
            kwargs.pop(name)
        if not hasattr(past_key_values, "scale"):
            past_key_values.scale = 1 + inputs_embeds.shape[1] / 100
        scaled = inputs_embeds * past_key_values.scale
        return decoder(inputs_embeds=scaled, past_key_values=past_key_values, **kwargs), None


@pytest.fixture(scope="module", autouse=True)
def test_parts() -> None:
    for registry, name, part in ((CONNECTORS, "test_asks", _AsksPrompt), (ADAPTERS, "test_own_cache", _OwnCache)):
        if name not in registry:
            registry.add(name, part)


def special(**fields: Any) -> Any:
    """A tiny model whose configuration names parts of this file."""
    config = tiny.config()
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    net = LlavakitForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return net


def test_connector_that_reads_the_prompt() -> None:
    net = special(connector={"type": "test_asks"})
    samples = [tiny.prompt(net, layout, 1) for layout in ("tItt", "tIttttt", "tttt", "ttIt")]
    engine = Engine(net)
    replies = engine.generate([request(sample) for sample in samples])
    assert [reply.token_ids for reply in replies] == [alone(net, sample, 12) for sample in samples]
    before = engine.prompts.encoded
    again = engine.generate([request(samples[0])])[0]
    assert engine.prompts.encoded == before, "the encoder's features were remembered"
    assert again.token_ids == replies[0].token_ids


def test_adapter_with_a_cache_of_its_own() -> None:
    net = special(language_adapter={"type": "test_own_cache"})
    samples = [tiny.prompt(net, layout, 1) for layout in ("tItt", "tIttttt", "tttt")]
    engine = Engine(net, max_batch=2)
    replies = engine.generate([request(sample) for sample in samples])
    assert [reply.token_ids for reply in replies] == [alone(net, sample, 12) for sample in samples]
    several = engine.submit(request(samples[0], n=2)).result()
    assert [reply.token_ids for reply in several] == [replies[0].token_ids] * 2


# ---------------------------------------------------------------------- sampling


def _processed(logits: torch.Tensor, ids: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' processors leave, as probabilities."""
    steps = [TemperatureLogitsWarper(params.temperature)]
    if params.repetition_penalty != 1:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    steps += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    for step in steps:
        logits = step(ids, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("vocabulary", [90, 5000])
def test_filters_are_those_of_transformers(vocabulary: int) -> None:
    cases = [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=0.9, top_k=50, top_p=0.5),
        SamplingParams(temperature=2.0, min_p=0.1),
        SamplingParams(temperature=1.5, top_p=0.95, min_p=0.05, repetition_penalty=1.4),
    ]
    logits = torch.randn(len(cases), vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(0, vocabulary, (len(cases), 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(len(cases), vocabulary, dtype=torch.bool).scatter_(1, ids, True)
    groups = [[number] for number in range(len(cases))] + [list(range(len(cases))), [1, 3], [2, 3], [0, 4]]
    for group in groups:
        sampler = TokenSampler([cases[number] for number in group], torch.device("cpu"))
        own = sampler._penalise(logits[group], list(seen[group])) if sampler._penalised else logits[group]
        kept, kept_ids = sampler.candidates(own)
        kept = kept / kept.sum(-1, keepdim=True)
        full = kept if kept_ids is None else torch.zeros(len(group), vocabulary).scatter(1, kept_ids, kept)
        for row, number in enumerate(group):
            expected = _processed(logits[number : number + 1], ids[number : number + 1], cases[number])[0]
            torch.testing.assert_close(full[row], expected, atol=1e-6, rtol=1e-4)


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.0, top_k=4, seed=5)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5, 0.5])
    sampler, source = TokenSampler([params] * 500, torch.device("cpu")), RowRng(5)
    counts = torch.zeros(6)
    for _ in range(20):
        tokens, _, _ = sampler.choose(logits.expand(500, -1), [source] * 500, [None] * 500)
        counts += torch.bincount(torch.tensor(tokens), minlength=6)
    expected = _processed(logits[None], torch.zeros(1, 1, dtype=torch.long), params)[0]
    assert (counts / counts.sum() - expected).abs().max() < 0.02


def test_coldest_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.0, 30.0, -5.0, 29.0]])
    sampler = TokenSampler([SamplingParams(temperature=5e-324)], torch.device("cpu"))
    assert sampler.choose(logits, [RowRng(0)], [None])[:2] == ([1], [True])


def test_seeded_reply_does_not_depend_on_neighbours(net: Any, samples: list[dict[str, Any]]) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_new_tokens": 20}
    single = [Engine(net).submit(request(sample, **sampling)).result().token_ids for sample in samples]
    crowd = Engine(net, max_batch=5)
    handles = [crowd.submit(request(sample, **sampling)) for sample in samples]
    crowd.submit(request(samples[0]))
    crowd.run()
    assert [handle.result().token_ids for handle in handles] == single
    assert single != [alone(net, sample, 20) for sample in samples], "it did sample"
    other = Engine(net).submit(request(samples[0], **(sampling | {"seed": 12}))).result().token_ids
    assert other != single[0]


def test_several_replies_share_one_prefill(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net)
    sampling = {"temperature": 1.2, "seed": 3, "max_new_tokens": 10}
    replies = engine.submit(request(samples[1], n=4, **sampling)).result()
    assert len({tuple(reply.token_ids) for reply in replies}) > 1
    first = Engine(net).submit(request(samples[1], **sampling)).result()
    assert replies[0].token_ids == first.token_ids
    with pytest.raises(UserError, match="this engine holds 16"):
        engine.submit(request(samples[1], n=17))


def test_logprobs_are_the_models(net: Any, samples: list[dict[str, Any]]) -> None:
    reply = Engine(net).submit(request(samples[1], logprobs=3, max_new_tokens=5)).result()
    sample = dict(samples[1])
    sample["input_ids"] = torch.cat([sample["input_ids"], torch.tensor([reply.token_ids])], 1)
    sample.pop("attention_mask"), sample.pop("labels")
    with torch.no_grad():
        logits = net(**sample).logits[0, -6:-1]
    logits[:, net.generation_config.suppress_tokens] = -torch.inf  # what may not be said has no probability
    expected = logits.log_softmax(-1)
    for entry, row in zip(reply.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


def test_repetition_penalty_equals_transformers(net: Any, samples: list[dict[str, Any]]) -> None:
    replies = Engine(net).generate(
        [request(samples[0], repetition_penalty=1.8), request(samples[1]), request(samples[1], repetition_penalty=1.3)]
    )
    assert replies[0].token_ids == alone(net, samples[0], 12, repetition_penalty=1.8)
    assert replies[1].token_ids == alone(net, samples[1], 12)
    assert replies[2].token_ids == alone(net, samples[1], 12, repetition_penalty=1.3)


@pytest.mark.parametrize(("field", "value"), [("temperature", -1), ("top_p", 0), ("n", 0), ("max_new_tokens", 0)])
def test_wrong_sampling_parameters_name_the_field(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field} is {value}"):
        SamplingParams(**{field: value})


# ---------------------------------------------------------------------- trouble stays with its owner


def test_cancelled_row_frees_its_place(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, max_batch=2)
    gone = engine.submit(request(samples[0], max_new_tokens=100))
    stays = engine.submit(request(samples[1], max_new_tokens=20))
    waits = engine.submit(request(samples[2], max_new_tokens=5))
    never = engine.submit(request(samples[3]))
    for _ in range(4):
        engine.step()
    assert engine.active == 2
    assert engine.waiting == 2
    gone.cancel(), never.cancel()
    engine.step()
    assert gone.done
    assert (engine.active, engine.waiting) == (2, 0), "the waiting one has the place already"
    engine.run()
    reply = gone.result()
    assert reply.finish_reason == "cancelled"
    assert 4 <= len(reply.token_ids) <= 5
    assert never.result().token_ids == []
    assert never.result().finish_reason == "cancelled"
    assert stays.result().token_ids == alone(net, samples[1], 20)
    assert waits.result().token_ids == alone(net, samples[2], 5)


def test_poisoned_requests_fail_alone(samples: list[dict[str, Any]]) -> None:
    net = tiny.model()
    good = [samples[0], samples[3], samples[5]]
    expected = [alone(net, sample, 12) for sample in good]
    late = alone(net, samples[1], 12)
    bad_token = next(t for t in late[2:] if t not in late[:2] and all(t not in reply for reply in expected))
    with torch.no_grad():
        net.get_input_embeddings().weight[bad_token] = torch.nan
    clean = [sample for sample in good if bad_token not in sample["input_ids"][0].tolist()]
    expected = [alone(net, sample, 12) for sample in clean]
    engine = Engine(net, max_batch=4)
    at_once = request({"input_ids": torch.tensor([[5, bad_token, 7]])})
    broken = request(samples[1])
    broken.pixel_values = broken.pixel_values[:, :, :8]
    wrong = request(samples[2])
    wrong.input_ids = wrong.input_ids[:-20]
    handles = [engine.submit(one) for one in (at_once, broken, wrong, request(samples[1]))]
    others = [engine.submit(request(sample)) for sample in clean]
    engine.run()
    for handle, text in zip(handles, ["not finite", "positions|size", "visual positions", "not finite"], strict=True):
        with pytest.raises(RequestFailed, match=text):
            handle.result()
        assert handle.replies[0].finish_reason == "error"
    assert len(handles[3].replies[0].token_ids) >= 3, "it failed while decoding"
    assert [handle.result().token_ids for handle in others] == expected
    # whoever gets the poisoned rows next must not inherit the NaN
    assert [reply.token_ids for reply in engine.generate([request(sample) for sample in clean * 2])] == expected * 2


def test_listener_that_breaks_ends_its_own_request(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net)
    handle = engine.submit(request(samples[0], max_new_tokens=50), listener=lambda piece: 1 / 0)
    wrong = request(samples[2])
    wrong.input_ids = wrong.input_ids[:-20]
    failing = engine.submit(wrong, listener=lambda piece: 1 / 0)
    other = engine.submit(request(samples[1]))
    engine.run()
    assert handle.replies[0].finish_reason == "cancelled"
    assert failing.replies[0].finish_reason == "error"
    assert other.result().token_ids == alone(net, samples[1], 12)


def test_threads_share_a_running_engine(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, max_batch=3)
    engine.start()
    results: dict[int, list[int]] = {}

    def client(number: int) -> None:
        handle = engine.submit(request(samples[number % 8], max_new_tokens=6 + number % 3))
        if number % 5 == 4:
            handle.cancel()
        results[number] = handle.result().token_ids

    threads = [threading.Thread(target=client, args=(number,)) for number in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    engine.stop()
    assert not engine.busy
    for number, tokens in results.items():
        if number % 5 != 4:
            assert tokens == alone(net, samples[number % 8], 6 + number % 3)
    assert len(results) == 15


def test_stop_without_drain_cancels(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, max_batch=1)
    handles = [engine.submit(request(sample, max_new_tokens=200)) for sample in (samples[0], samples[3], samples[3])]
    engine.start()
    engine.stop(drain=False)
    assert all(handle.done for handle in handles)
    assert not engine.busy


# ---------------------------------------------------------------------- reuse


def test_next_turn_reuses_states_and_picture(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net)
    first = request(samples[2])
    reply = engine.submit(first).result()
    assert engine.prompts.encoded == 2
    longer = dict(samples[2])
    longer["input_ids"] = torch.cat([longer["input_ids"], torch.tensor([[*reply.token_ids, 7, 8, 9]])], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    handle = engine.submit(request(longer))
    assert handle.result().token_ids == alone(net, longer, 12)
    assert handle.reused_tokens == samples[2]["input_ids"].shape[1] + len(reply.token_ids) - 1
    assert engine.prompts.encoded == 2
    # the same ids with another picture must not be taken for the same prompt
    other = dict(longer) | {"pixel_values": longer["pixel_values"].flip(-1)}
    handle = engine.submit(request(other))
    assert handle.result().token_ids == alone(net, other, 12)
    assert handle.reused_tokens == 0
    assert engine.prompts.encoded == 4


def test_questions_about_one_picture_at_the_same_time(net: Any) -> None:
    base = tiny.prompt(net, "ttIttttttt")
    questions = []
    for number in range(4):
        one = dict(base)
        one["input_ids"] = base["input_ids"].clone()
        one["input_ids"][0, -2] = 20 + number
        questions.append(one)
    engine = Engine(net)
    handles = [engine.submit(request(one)) for one in questions]
    engine.run()
    assert engine.prompts.encoded == 1
    assert [handle.reused_tokens for handle in handles[1:]] == [base["input_ids"].shape[1] - 2] * 3
    assert [handle.result().token_ids for handle in handles] == [alone(net, one, 12) for one in questions]


def test_reuse_can_be_switched_off(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, prefix_bytes=0, feature_bytes=0)
    for _ in range(2):
        handle = engine.submit(request(samples[1]))
        assert handle.result().token_ids == alone(net, samples[1], 12)
        assert handle.reused_tokens == 0
    assert engine.prompts.encoded == 2
    assert engine.prefixes.size == 0
    assert engine.prompts.features.size == 0


def test_forget_after_the_weights_changed(samples: list[dict[str, Any]]) -> None:
    net = tiny.model()
    engine = Engine(net)
    engine.submit(request(samples[1])).result()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3)
    engine.forget()
    handle = engine.submit(request(samples[1]))
    assert handle.result().token_ids == alone(net, samples[1], 12)
    assert handle.reused_tokens == 0
    assert engine.prompts.encoded == 2


def test_memory_is_bounded() -> None:
    held = ByteBounded(100)
    for key in range(10):
        held.put(key, str(key), 30)
        held.get(0)
    assert held.size == 90
    assert set(held) == {0, 8, 9}
    assert held.get(0) == "0"
    assert held.get(1) is None
    held.put("large", "x", 101)
    assert held.get("large") is None
    store = PrefixStore(3 * 4 * 40)
    for number in range(5):
        keys = prompt_keys([number, 2, 3, 9, 9], 9, [(2, bytes([number] * 16))])
        store.put(keys, torch.full((1, 1, 1, 5, 8), float(number)))
    assert store.size <= 3 * 4 * 40
    assert store.find(prompt_keys([0, 2, 3, 9, 9], 9, [(2, bytes(16))]))[0] == 0
    shared, states = store.find(prompt_keys([4, 2, 3, 9, 9, 1], 9, [(2, bytes([5] * 16))]))
    assert shared == 3
    assert float(states.mean()) == 4
    assert states.shape[3] == 3
    store.put(prompt_keys([4, 2, 3, 9, 9, 7], 9, [(2, bytes([4] * 16))]), torch.full((1, 1, 1, 6, 8), 6.0))
    assert store.find(prompt_keys([4, 2, 3, 9, 9, 7, 1], 9, [(2, bytes([4] * 16))]))[0] == 6
    assert len(store._held) == 2, "the entry that was extended is gone"


def test_likelihoods_of_replies_come_in_stretches(
    net: Any, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood.CHUNK, "cpu", 4 * 3 * net.lm_head.out_features)  # three positions at a time
    engine, replies = Engine(net), [[5, 6, 7, 8, 9, 10, 11], [4]]
    found = engine.reply_likelihoods(request(samples[1]), replies)
    logits = engine.reply_logits(request(samples[1]), replies)
    for own, expected, ids in zip(found, logits, replies, strict=True):
        every = expected.log_softmax(-1)
        torch.testing.assert_close(own.logps, every[torch.arange(len(ids)), torch.tensor(ids)])
        assert torch.equal(own.likeliest, every.argmax(-1))


def test_rows_grow_and_keep_their_states() -> None:
    states = torch.randn(2, 2, 3, 5, 4)
    rows = RowCache(states, max_rows=4, max_length=500)
    rows.insert(0, states)
    longer = torch.randn(2, 2, 3, 300, 4)
    rows.insert(1, longer)
    rows.move(1, 2)
    assert torch.equal(rows.read(0), states)
    assert torch.equal(rows.read(2), longer)
    assert rows.capacity >= 301
    assert rows.store.shape[2] == 4
    rows.begin_step(3)
    assert rows.position_ids.tolist() == [[5], [300], [300]]
    assert (rows.mask == 0).sum(-1).flatten().tolist() == [6, 301, 301]


# ---------------------------------------------------------------------- text


def sentencepiece_like() -> PreTrainedTokenizerFast:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁", "▁the", "▁cat", "s", "!", "▁a"]:
        vocabulary[piece] = len(vocabulary)
    vocabulary["<unk>"] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


def wordpiece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "play", "##ing", "##er", "is", ".", ",", "don", "'", "t", "play"]
    core = Tokenizer(models.WordPiece({word: n for n, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    return tokenizer


@pytest.mark.parametrize("make", [bytes_tokenizer, sentencepiece_like, wordpiece])
@pytest.mark.parametrize("skip", [True, False])
def test_streamed_text_is_the_decoded_text(make: Any, skip: bool) -> None:
    tokenizer, generator = make(), random.Random(0)
    for _ in range(60):
        if make is wordpiece:
            ids = [generator.randrange(len(tokenizer)) for _ in range(15)]
        else:
            text = "".join(generator.choice("ab é漢字🙂👩‍👩‍👧 ") for _ in range(8)).encode()
            first = tokenizer.convert_tokens_to_ids("<0x00>") if make is sentencepiece_like else None
            ids = (
                [byte + first for byte in text]
                if first is not None
                else tokenizer.encode(text.decode(), add_special_tokens=False)
            )
            if make is sentencepiece_like:
                ids += [generator.randrange(256, len(tokenizer)) for _ in range(5)]
            # byte fallback spoils a whole run of bytes if one is broken, so only byte-level ids may be cut anywhere
            anywhere = make is bytes_tokenizer
            ids.insert(generator.randrange(3) if anywhere else 0, tokenizer.eos_token_id)
            if anywhere and generator.random() < 0.3:
                ids = ids[:-1]
        stream = TextStream(tokenizer, skip)
        pieces = [stream.push(token) for token in ids]
        expected = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in expected.rstrip("\ufffd")
        assert "".join(pieces) + stream.flush() == expected


def test_stop_strings_are_never_shown_in_part() -> None:
    generator = random.Random(1)
    for _ in range(300):
        stops = ["".join(generator.choice("ab") for _ in range(generator.randrange(1, 5))) for _ in range(2)]
        text = "".join(generator.choice("abc") for _ in range(20))
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
        cut = sum(min(found)) if found else len(text)
        watch, shown = StopStrings(stops), ""
        for start in range(0, len(text), 3):
            piece, met = watch.push(text[start : start + 3])
            shown += piece
            assert text[:cut].startswith(shown)
            if met:
                break
        assert shown + watch.flush() == text[:cut]
        assert (watch.met is not None) == bool(found)


def test_stop_string_in_a_request(net: Any, samples: list[dict[str, Any]]) -> None:
    tokenizer = bytes_tokenizer()
    free = alone(net, samples[1], 30)
    text = tokenizer.decode(free)
    stop = text[5:8]
    engine = Engine(net, tokenizer)
    handle = engine.submit(request(samples[1], max_new_tokens=30, stop=(stop,)))
    shown = ""
    for piece in handle:
        shown += piece.text
        assert text[: text.index(stop)].startswith(shown)
    reply = handle.result()
    assert reply.text == shown == text[: text.index(stop)]
    assert reply.stop == stop
    assert reply.finish_reason == "stop"
    assert reply.token_ids == free[: len(reply.token_ids)]
    quiet = engine.submit(request(samples[1], max_new_tokens=30), stream=False).result()
    assert quiet.text == text
    with pytest.raises(UserError, match="tokenizer"):
        Engine(net).submit(request(samples[1], stop="x"))


def special_chat(net: Any, samples: list[dict[str, Any]], place: int = 3) -> tuple[Any, int, list[int]]:
    """An engine whose tokenizer calls a token that the model will say `<|eot|>`; the token and the whole reply."""
    whole = alone(net, samples[0], 12)
    return Engine(net, bytes_tokenizer({whole[place]: "<|eot|>"})), whole[place], whole


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_as_stop_string_ends_a_reply(
    net: Any, samples: list[dict[str, Any]], stream: bool, skip: bool
) -> None:
    engine, token, whole = special_chat(net, samples)
    stop = {"stop": ["<|eot|>", "never said"], "skip_special_tokens": skip}
    reply = engine.submit(request(samples[0], **stop), stream=stream).result()
    assert reply.token_ids == whole[: whole.index(token) + 1]
    assert (reply.finish_reason, reply.stop) == ("stop", "<|eot|>")
    assert reply.text == engine.tokenizer.decode(reply.token_ids[:-1])
    ended = engine.submit(request(samples[0], **stop, eos_token_ids=(token,)), stream=stream).result()
    assert ended.stop == (None if skip else "<|eot|>")  # an end of sequence is no stop string, unless it is text
    assert ended.token_ids == reply.token_ids


def test_text_held_back_comes_before_a_special_stop(net: Any, samples: list[dict[str, Any]]) -> None:
    engine, token, whole = special_chat(net, samples)
    text = engine.tokenizer.decode(whole[: whole.index(token)])
    reply = engine.submit(request(samples[0], stop=["<|eot|>", text[-1] + "never said"])).result()
    assert (reply.text, reply.stop) == (text, "<|eot|>")


def test_a_stop_string_that_cannot_match_is_refused(net: Any, samples: list[dict[str, Any]]) -> None:
    engine, *_ = special_chat(net, samples)
    with pytest.raises(UserError, match=r"stop '<\|eot\|> now' holds the special token '<\|eot\|>' beside other text"):
        engine.submit(request(samples[0], stop="<|eot|> now"))
    engine.submit(request(samples[0], stop="<|eot|> now", skip_special_tokens=False, max_new_tokens=1)).result()


def test_a_stage_ends_at_a_special_marker(net: Any, samples: list[dict[str, Any]]) -> None:
    engine, _token, whole = special_chat(net, samples)
    markers = ["<|eot|>", engine.tokenizer.decode(whole[9:10])]
    expand = functools.partial(expand_branches, engine)
    root = Branch(request(samples[0]))
    branch = stage_beam_search(expand, root, root.request.sampling, markers, lambda marker, found: found[0])
    assert list(branch.ids) == whole[:10]
    assert branch.text.endswith(markers[1])


QUESTION = [{"role": "user", "content": "What is this?"}]


def test_stop_of_a_chat_may_be_one_string() -> None:
    chat = small_chat()
    whole = chat.chat(QUESTION, max_new_tokens=12)
    assert "rerSS" in whole
    before = whole[: whole.index("SS")]
    for stop in ("SS", ["SS"], ("never said", "SS")):
        assert chat.chat(QUESTION, max_new_tokens=12, stop=stop) == before
        assert "".join(chat.stream(QUESTION, max_new_tokens=12, stop=stop)).strip() == before
        assert chat.generate(QUESTION, max_new_tokens=12, stop=stop, do_sample=False) == before
    assert chat.chat(QUESTION, max_new_tokens=12, stop=None) == whole


@pytest.mark.parametrize("end", ["▁re", " re"])  # a special token, and text
def test_the_stop_of_a_template_ends_every_reply(end: str) -> None:
    chat = small_chat()
    whole = chat.submit(QUESTION, max_new_tokens=12).result()
    if end != " re":
        chat.processor.tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    chat.processor.template = Template("mine", "vicuna", VICUNA_V1.system, stop=(end,), values={"end": "</s>"})
    reply = chat.submit(QUESTION, max_new_tokens=12).result()
    assert reply.token_ids == whole.token_ids[:3]
    assert reply.finish_reason == "stop"
    assert chat.eos_token_ids == ((2,) if end == " re" else (2, whole.token_ids[2]))
    assert chat.generate(QUESTION, max_new_tokens=12, do_sample=False) == reply.text.strip()


# ---------------------------------------------------------------------- search


def test_branches_grow_from_shared_states(net: Any, samples: list[dict[str, Any]]) -> None:
    tokenizer = bytes_tokenizer()
    engine = Engine(net, tokenizer)
    start = request(samples[1], max_new_tokens=6, n=3, temperature=1.0, seed=1)
    (branches,) = expand_branches(engine, [Branch(start)], start.sampling)
    assert len(branches) == 3
    assert engine.prompts.encoded == 1
    step = SamplingParams(max_new_tokens=4, eos_token_ids=())
    grown = expand_branches(engine, branches, step)
    for branch, (longer,) in zip(branches, grown, strict=True):
        sample = dict(samples[1])
        sample["input_ids"] = torch.cat([sample["input_ids"], torch.tensor([branch.ids])], 1)
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
        assert list(longer.ids) == list(branch.ids) + alone(net, sample, 4)
        assert longer.text == tokenizer.decode(longer.ids[:6]) + tokenizer.decode(longer.ids[6:])
    assert engine.prompts.encoded == 1


def test_branches_of_one_expansion_draw_apart(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net)
    root = Branch(request(samples[0]))
    drawn = SamplingParams(max_new_tokens=8, eos_token_ids=(), temperature=2.0, seed=3, n=2)
    (first, second), (third, fourth) = expand_branches(engine, [root, root], drawn)
    assert len({first.ids, second.ids, third.ids, fourth.ids}) == 4
    (alone_,) = expand_branches(engine, [root], replace(drawn, n=1))
    assert alone_[0].ids == first.ids


def test_best_of_n_and_stages(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net, bytes_tokenizer())
    expand = functools.partial(expand_branches, engine)
    sampling = SamplingParams(temperature=1.0, seed=4, max_new_tokens=25, eos_token_ids=(), n=4)
    root = Branch(request(samples[1]))
    wanted = best_of_n(expand, root, sampling, lambda found: [sum(one.ids) for one in found])
    everything = engine.submit(replace(root.request, sampling=sampling)).result()
    assert sum(wanted.ids) == max(sum(reply.token_ids) for reply in everything)
    free = engine.tokenizer.decode(alone(net, samples[1], 25))
    markers = [free[3], free[6]]
    seen: list[tuple[str, int]] = []

    def first(marker: str, candidates: Any) -> Branch:
        seen.append((marker, len(candidates)))
        return candidates[0]

    greedy = SamplingParams(n=2, max_new_tokens=25, eos_token_ids=())
    branch = stage_beam_search(expand, root, greedy, markers, first)
    assert seen == [(markers[0], 2), (markers[1], 2)]
    assert branch.text == free[: len(branch.text)]
    assert branch.text.endswith(markers[1])
    ended = Branch(request(samples[1], stop=[free[5]]))  # as a chat template ends a turn
    branch = stage_beam_search(expand, ended, greedy, [free[3], "never said"], first)
    assert branch.finished
    assert branch.text == free[: free.index(free[5], free.index(free[3]) + 1)]


def test_likelihoods_are_the_models(net: Any, samples: list[dict[str, Any]]) -> None:
    engine = Engine(net)
    replies = [[5], [6, 7, 8], alone(net, samples[1], 6)]
    found = engine.score(request(samples[1]), replies)
    for reply, values in zip(replies, found, strict=True):
        sample = {name: samples[1][name] for name in ("pixel_values", "visual_sizes", "visual_modalities")}
        ids = torch.cat([samples[1]["input_ids"], torch.tensor([reply])], 1)
        with torch.no_grad():
            logprobs = net(input_ids=ids, **sample).logits[0].log_softmax(-1)
        start = samples[1]["input_ids"].shape[1] - 1
        expected = [float(logprobs[start + place, token]) for place, token in enumerate(reply)]
        assert values.tolist() == pytest.approx(expected, abs=1e-3)
    engine.score(request(samples[1]), replies)
    assert engine.prompts.encoded == 1  # states and picture of the context were kept
