"""HyperLLaVA: golden figures, experts, segments, decoding together, packing, files, recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tiny_checkpoints import WIDTH, write_classic
from transformers import DynamicCache

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.files import read_folder
from llavakit.checkpoints.opening import build as build_from
from llavakit.checkpoints.opening import load_processor, open_checkpoint
from llavakit.connectors.base import Features
from llavakit.errors import UserError
from llavakit.generation import Engine, Request, SamplingParams
from llavakit.model.prompt import PromptInfo
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.hyper_llava.connector import VisualExpertMLP
from llavakit.systems.hyper_llava.cost import Size, golden_counts
from llavakit.systems.hyper_llava.experts import ExpertShape, GeneratedExpert
from llavakit.systems.hyper_llava.segments import find_segments
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "hyper-llava"
SIZES = {"embed_dim": 6, "hyper_hidden": 5, "bottleneck": 2}
VISUAL = {"type": "visual_expert_mlp", "variant": "first", **SIZES}
LANGUAGE = {"type": "language_experts", "layers": "posterior", **SIZES}


def build(decoder="llama", seed=0, variant="first", trained=True, **options):
    text = tiny.DECODERS[decoder] | {"num_hidden_layers": 4}
    fields = {"text_config": text, "connector": VISUAL | {"variant": variant}, "language_adapter": LANGUAGE | options}
    if trained:
        return tiny.model(seed=seed, decoder=decoder, **fields)
    torch.manual_seed(seed)
    return type(tiny.model())(tiny.config(decoder=decoder, **fields)).eval()


def ask(sample, answers=None, new=8, **sampling):
    params = SamplingParams(max_new_tokens=new, eos_token_ids=(), **sampling)
    media = {name: sample[name] for name in ("pixel_values", "visual_sizes", "visual_modalities") if name in sample}
    return Request(sample["input_ids"][0], **media, answers=answers, sampling=params)


def supervised(sample, answer):
    """Labels at the last `answer` tokens."""
    labels = torch.full_like(sample["input_ids"], -100)
    labels[:, -answer:] = sample["input_ids"][:, -answer:]
    return sample | {"labels": labels}


def longer(sample, tokens):
    ids = torch.cat([sample["input_ids"], torch.tensor([tokens])], dim=1)
    rest = {name: value for name, value in sample.items() if name not in ("labels", "input_ids")}
    return rest | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(engine, request):
    """Log probabilities [steps, vocabulary] of a greedy reply."""
    reply = engine.submit(request).result()
    top = [dict(step.top) for step in reply.logprobs]
    return reply.token_ids, torch.tensor([[step[token] for token in sorted(step)] for step in top])


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# ---------------------------------------------------------------------- experts


@pytest.mark.parametrize("activation", ["swiglu", "silu", "gelu"])
def test_weights_are_affine_in_the_embedding_and_blind_to_the_guidance_scale(activation):
    torch.manual_seed(0)
    expert = GeneratedExpert(ExpertShape(7, 9, 1, activation), guidance_dim=5, embed_dim=3, hyper_hidden=4)
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        one, two = torch.randn(2, 4, 3)
        at = expert.hyper
        torch.testing.assert_close(at(one) + at(two) - at(torch.zeros_like(one)), at(one + two), atol=1e-4, rtol=1e-4)
        guidance, x = torch.randn(4, 5), torch.randn(4, 6, 7)
        torch.testing.assert_close(expert(1000 * guidance, x), expert(guidance, x), atol=1e-4, rtol=1e-4)
        assert (expert(-guidance, x) - expert(guidance, x)).abs().max() > 0.1
        expert.layer.A.zero_()
        torch.testing.assert_close(expert(torch.randn(4, 5), x), expert(guidance, x))


def test_an_untrained_model_is_llava_1_5_bit_by_bit_and_learns():
    net = build(trained=False, variant="both")
    plain = tiny.model(text_config=net.config.text_config.to_dict())
    state = net.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    sample = supervised(tiny.prompt(net, "ttIttttt"), 3)
    with torch.no_grad():
        assert torch.equal(net(**sample).logits, plain(**sample).logits)
    net.train()(**sample).loss.backward()
    experts = [net.model.language_adapter.hyper, net.model.multi_modal_projector.expert_1.hyper]
    for hyper in [*experts, net.model.multi_modal_projector.expert_2.hyper]:
        down = hyper.shape.down_size
        assert hyper.W2.grad[down:].abs().sum() > 0
        assert hyper.W2.grad[:down].abs().sum() == 0


def test_variants_of_the_visual_expert_differ_by_one_expert_exactly():
    torch.manual_seed(0)
    both = VisualExpertMLP(vision_width=6, hidden_size=8, variant="both", **SIZES).double()
    for parameter in both.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = Features(torch.randn(10, 6).double(), [(1, 2, 3), (1, 2, 2)], [0, 1])
    with torch.no_grad():
        whole, parts = both(x, []).split(), x.split()
        first = VisualExpertMLP(vision_width=6, hidden_size=8, **SIZES).double()
        first.load_state_dict({name: both.state_dict()[name] for name in first.state_dict()})
        for view, tokens, out in zip(parts, first(x, []).split(), whole, strict=True):
            inner = both.act(both.linear_1(view))[None]
            torch.testing.assert_close(out - both.expert_2(view.mean(0)[None], inner)[0], tokens, atol=1e-12, rtol=0)
        order = torch.randperm(6)
        moved = both(Features(parts[0][order], [(1, 2, 3)], [0]), []).values
        torch.testing.assert_close(moved, whole[0][order])


# ---------------------------------------------------------------------- segments


@pytest.mark.parametrize(
    ("roles", "numbers", "guides"),
    [
        ("ppppaaa", [0] * 7, [3]),
        ("pppaappaa", [0, 0, 0, 0, 0, 1, 1, 1, 1], [2, 6]),
        ("ppp", [0, 0, 0], [2]),
        ("papapa", [0, 0, 1, 1, 2, 2], [0, 2, 4]),
        ("a", [0], [0]),
        ("aapa", [0, 0, 1, 1], [0, 2]),
        ("", [], []),
    ],
)
def test_segments_of_one_row(roles, numbers, guides):
    found = find_segments(torch.tensor([[letter == "a" for letter in roles]], dtype=torch.bool).view(1, -1))
    assert found.number.tolist() == numbers
    assert found.guide_column.tolist() == guides


def test_segments_of_padded_packed_and_continued_rows():
    answer = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1]], dtype=torch.bool)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    found = find_segments(answer, real)
    assert found.number.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert list(zip(found.guide_row.tolist(), found.guide_column.tolist(), strict=True)) == [
        (0, 2),
        (0, 5),
        (1, 0),
        (1, 3),
    ]
    assert found.last.tolist() == [1, 3]
    assert found.ends_in_prompt.tolist() == [True, False]
    packed = find_segments(answer, samples=torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2]]))
    assert packed.number.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # a sample never begins with an answer
    going_on = find_segments(answer, real, continues=True)
    assert going_on.number.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    rest = find_segments(
        torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool),
        continues=True,
        real=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool),
    )
    assert rest.number.tolist() == [1, 1, 0, 0]
    assert rest.last.tolist() == [0, 2]


# ---------------------------------------------------------------------- training equals generation

PLACES = [
    {"layers": "posterior"},
    {"layers": "anterior"},
    {"layers": "all", "activation": "gelu"},
    {"layers": "posterior", "split": 3, "guidance_layer": 1, "activation": "silu"},
]


@pytest.mark.parametrize("options", PLACES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_cached_steps_equal_teacher_forcing_through_two_turns(decoder, options):
    if decoder == "mistral":
        options = options | {"activation": "swiglu"}
    net = build(decoder, **options)
    sample, first, turn, second = tiny.prompt(net, "ttItttt"), [7, 18, 29], [40, 41, 42], [50, 51]
    whole = longer(sample, [*first, *turn, *second])
    start = sample["input_ids"].shape[1]
    labels = torch.full_like(whole["input_ids"], -100)
    labels[:, start : start + 3] = 1
    labels[:, -2:] = 1
    cache = net.model.language_adapter.make_cache()
    with torch.no_grad():
        forced = net(**whole, labels=labels).logits
        told = net(**whole, prompt_info=PromptInfo(labels != -100), use_cache=False).logits
        steps = [net(**{k: v for k, v in sample.items() if k != "labels"}, past_key_values=cache).logits]
        for tokens in ([first[0]], [first[1]], [first[2]], turn, [second[0]], [second[1]]):
            steps.append(net(input_ids=torch.tensor([tokens]), past_key_values=cache).logits)
        torch.testing.assert_close(told, forced)
        torch.testing.assert_close(torch.cat(steps, dim=1), forced, atol=2e-5, rtol=1e-4)
        trained = net.train()(**whole, labels=labels).logits
    torch.testing.assert_close(trained, forced, atol=1e-6, rtol=1e-5)
    alone = net.eval()(**longer(sample, first), prompt_info=PromptInfo(length=start)).logits
    torch.testing.assert_close(alone, forced[:, : start + 3], atol=2e-5, rtol=1e-4)  # a second turn changes nothing


def test_no_answer_token_reaches_the_weights_that_predict_it():
    net = build()
    sample = supervised(tiny.prompt(net, "ttItttttttt"), 4)
    other = {**sample, "input_ids": sample["input_ids"].clone()}
    other["input_ids"][0, -2:] = torch.tensor([3, 4])
    with torch.no_grad():
        one, two = net(**sample).logits, net(**other).logits
    assert torch.equal(one[:, :-2], two[:, :-2])
    assert (one[:, -1] - two[:, -1]).abs().max() > 0.01


def join(samples, side):
    length = max(sample["input_ids"].shape[1] for sample in samples)

    def pad(row, fill):
        gap = row.new_full((1, length - row.shape[1]), fill)
        return torch.cat([gap, row] if side == "left" else [row, gap], dim=1)

    batch = {
        name: torch.cat([pad(sample[name], fill) for sample in samples])
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    for name in ("pixel_values", "visual_sizes", "visual_modalities"):
        batch[name] = torch.cat([sample[name] for sample in samples if name in sample])
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_nothing(side):
    net = build(variant="both")
    samples = [supervised(tiny.prompt(net, "tttItttt", seed=1), 3), supervised(tiny.prompt(net, "tIttttttttt"), 2)]
    samples.append(supervised(tiny.prompt(net, "ttttttt", seed=5), 4))
    batch = join(samples, side)
    with torch.no_grad():
        together = net(**batch).logits
        for row, sample in enumerate(samples):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real], net(**sample).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_packed_rows_equal_single_samples_in_values_and_gradients(decoder):
    net = build(decoder)
    samples = [
        supervised(tiny.prompt(net, layout, seed=n), 3) for n, layout in enumerate(("ttItttt", "ttttt", "tItttttt"))
    ]
    samples[2]["labels"][0, 1 + 16 + 1] = 5  # an answer, then another turn
    packed = {name: torch.cat([sample[name] for sample in samples], dim=1) for name in ("input_ids", "labels")}
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    for name in ("pixel_values", "visual_sizes", "visual_modalities"):
        packed[name] = torch.cat([sample[name] for sample in samples if name in sample])
    net.train()
    output = net(**packed, use_cache=False)
    singles = [net(**sample).logits[0] for sample in samples]
    torch.testing.assert_close(output.logits[0], torch.cat(singles), atol=1e-4, rtol=0)
    output.logits.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch.cat(singles).square().mean().backward()
    for name, parameter in net.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    net = build()
    sample = supervised(tiny.prompt(net, "ttItttttt"), 3)
    net.train()(**sample).loss.backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    net(**sample).loss.backward()
    assert not any(layer.mlp._forward_hooks for layer in net.model.language_model.layers)
    assert all(layer.gradient_checkpointing for layer in net.model.language_model.layers)
    for name, grad in expected.items():
        torch.testing.assert_close(net.get_parameter(name).grad, grad, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------- requests together


@pytest.mark.parametrize("options", PLACES[:3], ids=lambda options: options["layers"])
def test_requests_decoded_together_equal_single_ones(options):
    net = build(**options)
    layouts = ("ttItt", "tIttttttt", "ttttt", "ttttttItItt")
    samples = [tiny.prompt(net, layout, seed=number) for number, layout in enumerate(layouts)]
    requests = [ask(sample, new=6 + number, logprobs=tiny.VOCAB) for number, sample in enumerate(samples)]
    alone = [logits_of(Engine(net, prefix_bytes=0), request) for request in requests]
    engine = Engine(net, max_batch=3)
    handles = [engine.submit(request) for request in requests[:2]]
    engine.step()
    handles += [engine.submit(request) for request in requests[2:]]  # they join while others decode
    for handle, (ids, expected) in zip(handles, alone, strict=True):
        reply = handle.result()
        assert reply.token_ids == ids
        found = torch.tensor([[dict(step.top)[t] for t in sorted(dict(step.top))] for step in reply.logprobs])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        for sample, (ids, _) in zip(samples, alone, strict=True):
            inputs = {name: value for name, value in sample.items() if name != "labels"}
            out = net.generate(**inputs, max_new_tokens=len(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
            assert out[0, -len(ids) :].tolist() == ids


def test_several_replies_and_beams_expand_the_weights():
    net = build(seed=2)
    sample = tiny.prompt(net, "ttItt")
    sampling = {"temperature": 1.0, "seed": 3, "n": 3}
    replies = Engine(net).generate([ask(sample, **sampling)])[0]
    ids = [reply.token_ids for reply in replies]
    assert len(set(map(tuple, ids))) == 3
    beside = Engine(net).generate([ask(tiny.prompt(net, "tttttt", seed=9)), ask(sample, **sampling)])[1]
    assert [reply.token_ids for reply in beside] == ids
    prompt = sample["input_ids"].shape[1]
    for reply in replies:  # the probabilities of every reply are those of teacher forcing
        whole = longer(sample, reply.token_ids)
        with torch.no_grad():
            forced = net(**whole, prompt_info=PromptInfo(length=prompt), use_cache=False).logits[0, prompt - 1 : -1]
        scores = Engine(net).score(ask(sample), [reply.token_ids])[0]
        expected = forced.log_softmax(-1).gather(-1, torch.tensor(reply.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    batch = join([sample, tiny.prompt(net, "tttItttt", seed=4)], "left")
    batch.pop("labels")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False, "num_beams": 3}
    assert torch.equal(net.generate(**batch, **options), net.generate(**batch, **options, use_cache=False))


def test_a_second_turn_equals_the_whole_conversation_and_reuses_the_first():
    net = build(seed=1)
    sample = tiny.prompt(net, "ttIttttttt")
    engine, first = Engine(net), ask(sample)
    reply = engine.submit(first).result().token_ids
    second = longer(sample, [*reply, 40, 41, 42, 43])
    prompt = sample["input_ids"].shape[1]
    answers = [False] * prompt + [True] * len(reply)
    request = ask(second, answers, logprobs=tiny.VOCAB)
    handle = engine.submit(request)
    ids = handle.result().token_ids
    assert handle.reused_tokens == prompt - 1  # from the guidance on: the end of the reply needs its weights again
    fresh, expected = logits_of(Engine(net, prefix_bytes=0), request)
    assert ids == fresh
    labels = torch.full_like(second["input_ids"], -100)
    labels[:, prompt : prompt + len(reply)] = 1
    with torch.no_grad():
        forced = net(**second, labels=labels).logits[0, -1, :-1].log_softmax(-1)  # without the placeholder
        blind = net(**second).logits[0, -1, :-1].log_softmax(-1)
    torch.testing.assert_close(forced, expected[0, :-1], atol=1e-4, rtol=0)
    assert (blind - forced).abs().max() > 0.01  # as one prompt it would have other weights


def test_a_cached_beginning_is_shared_only_under_the_same_guidance():
    net = build(seed=1)
    base = tiny.prompt(net, "ttIttttttt")
    other = {**base, "input_ids": base["input_ids"].clone()}
    other["input_ids"][0, -1] = 7
    picture = {**base, "pixel_values": base["pixel_values"] + 0.5}
    engine = Engine(net)
    for sample, reused in ((base, 0), (other, 0), (picture, 0), (base, base["input_ids"].shape[1] - 1)):
        request = ask(sample, logprobs=tiny.VOCAB)
        handle = engine.submit(request)
        found = torch.tensor([[dict(step.top)[t] for t in sorted(dict(step.top))] for step in handle.result().logprobs])
        assert handle.reused_tokens == reused
        torch.testing.assert_close(found, logits_of(Engine(net, prefix_bytes=0), request)[1], atol=1e-4, rtol=0)


def test_a_reply_that_was_begun_keeps_the_weights_of_its_prompt():
    net = build(seed=1)
    sample = tiny.prompt(net, "ttIttttttt")
    prompt = sample["input_ids"].shape[1]
    reply = Engine(net).submit(ask(sample, new=8)).result().token_ids
    for engine in (Engine(net), Engine(net, prefix_bytes=0)):
        engine.submit(ask(sample, new=8)).result()
        begun = ask(longer(sample, reply[:4]), new=4)
        begun.generated = 4
        handle = engine.submit(begun)
        assert handle.result().token_ids == reply[4:]
        assert handle.reused_tokens == (prompt - 1 if engine.prefixes.enabled else 0)


def test_assisted_generation_checks_several_tokens_of_an_answer_at_once():
    net = build(seed=1)
    sample = tiny.prompt(net, "ttItttt")
    sample.pop("labels")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = net.generate(**sample, **options)
    assert torch.equal(net.generate(**sample, **options, prompt_lookup_num_tokens=3), plain)


def test_a_prompt_in_pieces_and_other_caches_are_one_line():
    net = build()
    sample = tiny.prompt(net, "ttItttt")
    sample.pop("labels")
    with pytest.raises(UserError, match="needs the whole prompt at once"):
        net.generate(**sample, max_new_tokens=2, prefill_chunk_size=8)
    cache = net.model.language_adapter.make_cache()
    with torch.no_grad():
        net(**sample, past_key_values=cache)
        cache.crop(-4)
        with pytest.raises(UserError, match="lacks the prompt"):
            net(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(UserError, match="cache of its own, not in DynamicCache"):
        net(**sample, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="training needs labels"):
        net.train()(**sample)


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("language_adapter", {"layers": "upper"}, "layers is 'upper', it must be posterior, anterior or all"),
        ("language_adapter", {"split": 4}, "no layer of 4 is posterior"),
        ("language_adapter", {"split": 9}, "split is 9, it must be a whole number from 0 to 4"),
        ("language_adapter", {"guidance_layer": 3}, "guidance_layer is 3, it must be a whole number from 0 to 2"),
        ("language_adapter", {"bottleneck": 0}, "bottleneck is 0, it must be a whole number from 1"),
        ("language_adapter", {"activation": "relu"}, "activation is 'relu', it must be swiglu, silu or gelu"),
        ("language_adapter", {"width": 3}, "has no option 'width'"),
        ("connector", {"variant": "third"}, "variant is 'third', it must be first, second or both"),
        ("connector", {"depth": 3}, "has no option 'depth'"),
    ],
)
def test_wrong_options_are_one_line(part, options, message):
    fields = {"connector": dict(VISUAL), "language_adapter": dict(LANGUAGE)}
    fields[part] |= options
    with pytest.raises(UserError, match=message):
        tiny.model(text_config=tiny.DECODERS["llama"] | {"num_hidden_layers": 4}, **fields)


def test_decoders_and_adapters_that_do_not_fit_are_one_line():
    with pytest.raises(UserError, match="language_experts needs a Llama-shaped decoder; phi has no norm"):
        tiny.model(decoder="phi", language_adapter=LANGUAGE)
    gemma = tiny.DECODERS["llama"] | {"model_type": "gemma2", "head_dim": 8}
    with pytest.raises(UserError, match=r"needs decoder layers of .*; Gemma2DecoderLayer differs in"):
        tiny.model(text_config=gemma, language_adapter=LANGUAGE)
    with pytest.raises(
        UserError, match="'language_experts' and 'dynamic_sparsification' cannot run one decoder together"
    ):
        tiny.model(language_adapter=[LANGUAGE, {"type": "dynamic_sparsification"}])


# ---------------------------------------------------------------------- files, templates, recipe

KEYS = {"hyper_embed_dim": 6, "hyper_hidden": 5, "hyper_bottleneck": 2, "hyper_activation": "silu"}


def expert_tensors(prefix, guidance, d_in, layers=("layer",)):
    size = 2 * d_in + 2 * WIDTH
    shapes = {"hyper.W1": (5, 6), "hyper.B1": (5,), "hyper.W2": (size, 5), "hyper.B2": (size,)}
    for layer in layers:
        shapes |= {f"{layer}.A": (6, guidance), f"{layer}.a": (6,), f"{layer}.b": (size,)}
    generator = torch.Generator().manual_seed(d_in)
    return {f"model.{prefix}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def published(tmp_path):
    """A folder in LLaVA-1.5's layout with experts in both places of the connector and in the upper of two layers."""
    places = {"visual_expert": "both", "language_expert_layers": "posterior"}
    folder, encoder = write_classic(tmp_path, **places, **KEYS)
    own = expert_tensors("visual_expert.first", 16, 16) | expert_tensors("visual_expert.second", 16, WIDTH)
    own |= expert_tensors("language_expert", WIDTH, WIDTH, ("layers.1",))
    torch.save(own, folder / "experts.bin")
    index = folder / "pytorch_model.bin.index.json"
    weights = json.loads(index.read_text())["weight_map"] | dict.fromkeys(own, "experts.bin")
    index.write_text(json.dumps({"weight_map": weights}))
    return folder, encoder, own


def test_files_load_answer_and_go_back(published, tmp_path):
    folder, encoder, own = published
    checkpoint = open_checkpoint(folder, vision_tower=encoder)
    assert (checkpoint.layout, checkpoint.config.system) == ("hyper-llava (original)", "hyper-llava")
    assert checkpoint.config.connector["variant"] == "both"
    assert checkpoint.config.language_adapter["activation"] == "silu"
    build_from(checkpoint)
    convert(folder, tmp_path / "ours", to="llavakit", vision_tower=encoder)
    chat = llavakit.load(tmp_path / "ours")
    picture = Image.new("RGB", (20, 30), (200, 30, 30))
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    reply = chat.chat([{"role": "user", "content": question}], max_new_tokens=4)
    more = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "Why?"},
    ]
    assert chat.generate(more, max_new_tokens=4, do_sample=False) == chat.chat(more, max_new_tokens=4)
    convert(tmp_path / "ours", tmp_path / "back", to="original")
    again = read_folder(tmp_path / "back")
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: raw[key] for key in KEYS} == KEYS
    assert (raw["visual_expert"], raw["language_expert_layers"]) == ("both", "posterior")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visual_expert": "third"}, "visual_expert is 'third'; llavakit reads 'first', 'second', 'both', 'none'"),
        ({"visual_expert": "first", "mm_projector_type": "linear"}, "a visual expert needs mlp2x_gelu"),
        ({"language_expert_layers": "upper"}, "language_expert_layers is 'upper'"),
        ({"visual_expert": "first", "hyper_width": 3}, "'hyper_width': 3 is not understood"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, fields, message):
    folder, encoder = write_classic(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder, vision_tower=encoder)


def test_files_without_experts_are_those_of_llava_1_5(tmp_path):
    folder, encoder = write_classic(tmp_path)
    assert open_checkpoint(folder, vision_tower=encoder).config.system == "llava-1.5"


def test_training_and_asking_agree_on_what_is_an_answer(published):
    chat_folder, encoder, _ = published
    processor = load_processor(open_checkpoint(chat_folder, vision_tower=encoder))
    turns = [("user", "What is it?"), ("assistant", "A red disc."), ("user", "How large?"), ("assistant", "Small.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    learned = [label != -100 for label in processor.encode(messages)["labels"]]
    asked = processor.encode(messages[:3], add_generation_prompt=True)
    known = [label != -100 for label in asked["labels"]]
    assert known == learned[: len(known)]
    assert any(known)
    assert learned[len(known)]  # the reply begins where the prompt ends


def test_published_sizes_and_recipe():
    net = build_meta(load_recipe(get_system("hyper-llava").recipe))
    assert sum(p.numel() for p in net.model.language_adapter.parameters()) == 20_124_736
    assert sum(p.numel() for p in net.model.multi_modal_projector.expert_1.parameters()) == 6_557_824
    assert list(net.model.language_adapter.experts) == [str(number) for number in range(16, 32)]
    layout = get_system("hyper-llava").load("checkpoint")()
    names = dict(layout.write_state(net.config, net.state_dict()))
    assert names["model.language_expert.layers.16.A"].shape == (64, 4096)
    assert names["model.visual_expert.first.hyper.W2"].shape == (98_304, 64)


@pytest.mark.slow
def test_miniature():
    from llavakit.systems.hyper_llava.miniature import run

    verdict = run(seeds=(0,), learn=60, tune=20)
    assert [arm.name.split(",")[0] for c in verdict.comparisons for arm in (c.idea, c.baseline)] == [
        "generated",
        "static",
        "generated",
        "static",
    ]
    assert "4,976 learned" in verdict.comparisons[0].idea.name


def test_counts_of_odd_widths():
    counts = golden_counts(Size(d_vision=10, d_model=7, layers=3, embed_dim=5, hyper_hidden=2, bottleneck=3))
    assert counts["generated_per_sample_per_language_layer"] == 3 * 3 * 7
    assert counts["language_total"] == 201 + 2 * 103
