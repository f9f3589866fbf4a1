"""Dynamic-LLaVA: golden figures, the properties of its spec, batching, packing, decoding modes, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import parity_variations
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from llavakit.errors import UserError
from llavakit.generation.engine import Engine
from llavakit.generation.request import Request
from llavakit.model.prompt import PromptInfo
from llavakit.proof.golden import results, run_case
from llavakit.system import get_system
from llavakit.systems.dynamic_llava.adapter import DynamicSparsification
from llavakit.systems.dynamic_llava.attention import masked_softmax
from llavakit.systems.dynamic_llava.cache import SelectiveCache
from llavakit.systems.dynamic_llava.decisions import gumbel_keep, rate_penalty, temperature, top_keep
from llavakit.systems.dynamic_llava.predictors import ImagePredictor
from llavakit.systems.dynamic_llava.roles import token_roles
from llavakit.views.plan import MediaSize

GOLDEN = sorted((Path(__file__).parent / "golden" / "dynamic-llava").iterdir())
OPTIONS = {
    "type": "dynamic_sparsification",
    "vision_keep_rate": 0.3,
    "output_text_len_for_training": 4,
    "sparse_layer": 1,
    "d_model": 16,
    "nhead": 4,
    "dim_feedforward": 32,
    "num_layers": 1,
}
KEPT = int(16 * 0.3)
MAX_LENGTH = ("llm", "tokenizer_model_max_length")


def build(decoder: str = "llama", seed: int = 0, **options):
    text = tiny.DECODERS[decoder] | {"num_hidden_layers": 4}
    net = tiny.model(seed=seed, decoder=decoder, text_config=text, language_adapter=OPTIONS | options)
    adapter = net.model.language_adapter
    if decoder in ("llama", "qwen2", "mistral"):
        for predictor in (adapter.text_predictor, adapter.instruct_predictor):
            balance(net, predictor)
    return net, adapter


@torch.no_grad()
def balance(net, predictor):
    """Shift a text predictor so that it keeps about half of random tokens."""
    if predictor is None:
        return
    ids, seen = torch.arange(3, 83)[None], []
    layer = net.model.language_model.layers[OPTIONS["sparse_layer"]]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(input_ids=ids, use_cache=False)
    hook.remove()
    logits = predictor(seen[0])
    predictor.output_mlp[-1].bias[0] -= (logits[..., 0] - logits[..., 1]).median()


@torch.no_grad()
def stepwise(net, sample, tokens):
    """Logits after the prompt and after each token, with a cache; and the cache."""
    cache = net.model.language_adapter.make_cache()
    inputs = {name: value for name, value in sample.items() if name != "labels"}
    logits = [net(**inputs, past_key_values=cache).logits[:, -1]]
    for token in tokens:
        logits.append(net(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[:, -1])
    return torch.stack(logits, dim=1), cache


def join(samples, side="left"):
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


def with_answer(sample, count):
    """Labels on the last `count` tokens only."""
    labels = torch.full_like(sample["input_ids"], -100)
    labels[:, -count:] = sample["input_ids"][:, -count:]
    return sample | {"labels": labels}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.mark.parametrize(("marker", "undecided"), [([8, 9], 1), (None, 0)])
def test_a_case_with_another_marker_of_user_turns_and_decisions_about_instructions(marker, undecided):
    given = parity_variations.Given(next(path for path in GOLDEN if path.name == "cached_two_turns"))
    text, instruct = "output_text_score_predictor", "instruct_score_predictor"
    weights = given.tensors("weights")
    weights |= {name.replace(text, instruct): tensor for name, tensor in weights.items() if text in name}
    sparse = given.meta["config"]["sparse_config"] | {"use_instruct_predictor": True}
    config = given.meta["config"] | {"sparse_config": sparse, "user_marker": marker}
    files = {"weights.safetensors": weights, "case.json": given.meta | {"config": config}}
    with parity_variations.varied(given, files) as folder:
        found = results(folder)[""].json
    first, chunk = found[
        "instruct_decisions"
    ]  # the prompt is [1, 5, 6, image, 7, 8, 9, 10], the later turn has 4 tokens
    assert len(first) == 3 - undecided
    assert len(chunk) == 4
    assert chunk[-1] is True
    upper = [lengths[-1] for lengths in found["cache_lengths"]]
    image = int(16 * sparse["vision_keep_rate"])
    assert upper[0] == found["prefill_logits_length"] == 3 + image + undecided + sum(first) + 1
    assert upper[5] - upper[4] == sum(chunk)


# Properties of the parts


def test_masked_softmax_is_a_softmax_with_full_policy_and_the_identity_with_none():
    scores = torch.randn(1, 2, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    full = masked_softmax(scores, torch.ones(1, 5))
    torch.testing.assert_close(full, scores.softmax(-1), atol=2e-6, rtol=0)
    alone = masked_softmax(scores, torch.zeros(1, 5))
    torch.testing.assert_close(alone, torch.eye(5).expand_as(alone), atol=1e-4, rtol=0)


def test_permuting_image_tokens_permutes_their_logits():
    predictor, x, order = ImagePredictor(12, 16, 4, 32, 2), torch.randn(2, 7, 12), torch.randperm(7)
    torch.testing.assert_close(predictor(x[:, order]), predictor(x)[:, order], atol=1e-6, rtol=1e-5)


def test_ties_of_the_log_probability_are_ranked_by_the_difference_of_the_logits():
    logits = torch.tensor([[[200.0, 0], [300.0, 0], [100.0, 0], [0.0, 1]]])  # log softmax is 0 for the first three
    assert top_keep(logits, 0.5).tolist() == [[0, 1]]


def test_penalty_is_zero_at_exact_rates_and_short_answers_count_as_zero():
    half = torch.tensor([1.0, 0, 1, 0])
    assert rate_penalty([half], 0.5) == 0
    assert float(rate_penalty([half, torch.ones(2)], 0.0, shortest=3)) == pytest.approx(0.125)


def test_decisions_are_hard_and_differentiable():
    logits = torch.randn(6, 2, requires_grad=True)
    keep = gumbel_keep(logits, 0.5)
    torch.testing.assert_close(keep, keep.round())
    keep.sum().backward()
    assert logits.grad.abs().sum() > 0
    assert temperature(1.0, 0.1, 50, 100) == pytest.approx(0.1**0.5)


def test_roles_of_a_text_only_sample_and_of_several_turns():
    labels = [-100, -100, 5, 6, -100, 7, 8]
    roles = token_roles([False] * 7, labels)
    assert roles.image == (0, 0)
    assert roles.answer == (5, 7)
    assert roles.instruct == (0, 5)


# Decoding


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_cached_uncached_and_teacher_forced_agree(decoder):
    net, _ = build(decoder)
    sample = tiny.prompt(net, "ttItt")
    tokens = [7, 18, 29, 40, 51, 62, 73, 84, 9, 20, 31, 42]
    cached, cache = stepwise(net, sample, tokens)
    stored = [rows[0] for rows in cache.stored()]
    prompt = sample["input_ids"].shape[1]
    assert stored[0] == prompt + len(tokens)
    assert prompt - 16 + KEPT < stored[1] < prompt - 16 + KEPT + len(tokens)  # some tokens stay, some go
    assert stored[1:] == [stored[1]] * 3
    assert cache.get_seq_length() == prompt + len(tokens)

    ids = torch.cat([sample["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        for step in range(len(tokens) + 1):
            inputs = {"input_ids": ids[:, : prompt + step], "pixel_values": sample["pixel_values"], "use_cache": False}
            logits = net(**inputs, prompt_info=PromptInfo(length=prompt)).logits[:, -1]
            torch.testing.assert_close(logits, cached[:, step], atol=2e-5, rtol=1e-4)
        labels = torch.full_like(ids, -100)
        labels[:, prompt:] = ids[:, prompt:]
        forced = net(input_ids=ids, pixel_values=sample["pixel_values"], labels=labels).logits[:, prompt - 1 :]
    torch.testing.assert_close(forced, cached, atol=2e-5, rtol=1e-4)


def test_training_forward_with_the_same_decisions_equals_inference():
    net, adapter = build(softmax_eps=1e-9)
    sample = with_answer(tiny.prompt(net, "ttItttttttt"), 6)
    with torch.no_grad():
        expected = net(**sample).logits
    kept = expected.abs().sum(-1) > 0

    class Plugged(DynamicSparsification):
        def _sampled(self, role, logits, places, shortest):
            if role == "image":
                keep = torch.zeros(len(logits))
                keep[top_keep(logits[None], self.vision_keep_rate)[0]] = 1
            else:
                keep = (logits[:, 0] > logits[:, 1]).float()
            return list(keep.split([len(columns) for _, columns in places]))

    adapter.__class__ = Plugged
    with torch.no_grad():
        trained = net.train()(**sample).logits
    torch.testing.assert_close(trained[kept], expected[kept], atol=5e-5, rtol=1e-3)


def test_eager_equals_sdpa():
    net, _ = build()
    sample = with_answer(tiny.prompt(net, "ttItttttt"), 4)
    cached = stepwise(net, sample, [5, 6, 7])[0]
    torch.manual_seed(1)
    trained = net.train()(**sample).loss
    net.eval().model.language_model.set_attn_implementation("eager")
    torch.testing.assert_close(stepwise(net, sample, [5, 6, 7])[0], cached, atol=1e-5, rtol=1e-4)
    torch.manual_seed(1)
    torch.testing.assert_close(net.train()(**sample).loss, trained)


def test_keeping_everything_is_the_plain_model():
    net, adapter = build(vision_keep_rate=1.0)
    with torch.no_grad():
        adapter.text_predictor.output_mlp[-1].bias.copy_(torch.tensor([100.0, -100.0]))
    plain = tiny.model(text_config=tiny.DECODERS["llama"] | {"num_hidden_layers": 4})
    state = net.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    samples = [tiny.prompt(net, "ttItt"), tiny.prompt(net, "tItttttt", seed=3), tiny.prompt(net, "ttt", seed=4)]
    batch = join(samples)
    batch.pop("labels")
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(net.generate(**batch, **greedy), plain.generate(**batch, **greedy))
    with torch.no_grad():
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(net(**batch).logits[mask], plain(**batch).logits[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_decodes_like_its_samples(use_cache):
    net, _ = build(seed=2)
    layouts = ("ttItt", "tIttttttt", "ttttt", "ttttttItItt")
    samples = [tiny.prompt(net, layout, seed=number) for number, layout in enumerate(layouts)]
    for sample in samples:
        sample.pop("labels")
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    single = [net.generate(**sample, **greedy)[0, -12:] for sample in samples]
    batch = join([sample | {"labels": sample["input_ids"]} for sample in samples])
    batch.pop("labels")
    together = net.generate(**batch, **greedy)[:, -12:]
    assert torch.equal(together, torch.stack(single))


def test_rows_of_a_batch_store_different_numbers_of_tokens():
    net, adapter = build(seed=2)
    samples = [tiny.prompt(net, layout, seed=number) for number, layout in enumerate(("ttItt", "tIttttttt"))]
    batch = join(samples)
    batch.pop("labels")
    cache = adapter.make_cache()
    net.generate(**batch, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, do_sample=False)
    upper = cache.stored()[1]
    assert upper[0] != upper[1]
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32
    assert cache.bytes() == per_token * (2 * cache.get_seq_length() + 3 * sum(upper))


def test_the_engine_scores_replies_as_it_would_have_generated_them():
    net, _ = build(use_instruct_predictor=True)
    sample = tiny.prompt(net, "ttItttt", seed=3)
    media = {name: sample[name] for name in ("pixel_values", "visual_sizes", "visual_modalities")}
    prompt = Request(input_ids=sample["input_ids"][0], **media)
    replies = [[11, 12, 13, 14, 15, 16], [20], [21, 22, 23]]
    for reply, found in zip(replies, Engine(net, max_batch=2).score(prompt, replies), strict=True):
        logits, _ = stepwise(net, sample, reply[:-1])
        wanted = logits[0].log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_scores_beyond_the_last_position_are_refused_in_one_line():
    net, _ = build()
    engine = Engine(net, max_length=24)
    prompt = Request(input_ids=torch.arange(5, 25))
    assert len(engine.reply_logits(prompt, [[7] * 5])[0]) == 5
    for ids, reply in ((prompt.input_ids, [7] * 6), (torch.arange(5, 35), [7])):
        with pytest.raises(UserError, match=r"prompt and reply have \d+ positions, this model takes 24"):
            engine.reply_logits(Request(input_ids=ids), [reply])


def test_beams_and_several_replies():
    net, _ = build(seed=2)
    sample = tiny.prompt(net, "ttItt")
    sample.pop("labels")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    beams = net.generate(**sample, **options, num_beams=3)
    slow = net.generate(**sample, **options, num_beams=3, use_cache=False)
    assert torch.equal(beams, slow)
    torch.manual_seed(0)
    assert net.generate(**sample, **options | {"do_sample": True}, num_return_sequences=2).shape[0] == 2


def test_a_later_turn_is_stored_whole_and_with_the_instruction_predictor_in_part():
    for options, whole in (({}, True), ({"use_instruct_predictor": True}, False)):
        net, _ = build(**options)
        sample = tiny.prompt(net, "ttItttttttt")
        _, cache = stepwise(net, sample, [7, 8])
        before = cache.stored()[1][0]
        with torch.no_grad():
            net(input_ids=torch.tensor([[20, 21, 22, 23, 24, 25]]), past_key_values=cache)
        grown = cache.stored()[1][0] - before
        assert grown == 6 if whole else 0 < grown < 6


def test_a_later_turn_in_a_ragged_batch_equals_single_rows():
    net, adapter = build(seed=2)
    samples = [tiny.prompt(net, layout, seed=number) for number, layout in enumerate(("ttItt", "tIttttttt"))]
    turn, after = torch.tensor([[20, 21, 22, 23], [0, 0, 30, 31]]), torch.tensor([[40], [41]])
    batch = join(samples)
    batch.pop("labels")
    cache, mask = adapter.make_cache(), batch["attention_mask"]
    with torch.no_grad():
        net(**batch, past_key_values=cache)
        for ids in (torch.tensor([[7], [8]]), turn, after):
            mask = torch.cat([mask, (ids != 0).long()], dim=1)
            logits = net(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        for row, sample in enumerate(samples):
            _, alone = stepwise(net, sample, [7 + row])
            net(input_ids=turn[row][turn[row] != 0][None], past_key_values=alone)
            expected = net(input_ids=after[row : row + 1], past_key_values=alone).logits[:, -1]
            torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-5, rtol=1e-4)
            assert [rows[row] for rows in cache.stored()][1:] == [rows[0] for rows in alone.stored()][1:]


def test_an_image_in_a_later_turn_is_pruned_where_it_arrives():
    net, _ = build()
    first, second = tiny.prompt(net, "ttItt"), tiny.prompt(net, "tItt", seed=5)
    _, cache = stepwise(net, first, [])
    before = cache.stored()[2][0]
    with torch.no_grad():
        net(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache)
    assert cache.stored()[2][0] - before == KEPT + 3


def test_dropping_a_token_leaves_its_own_step_alone():
    net, adapter = build()
    sample = tiny.prompt(net, "ttItt")
    results = []
    for keep in (100.0, -100.0):
        with torch.no_grad():
            adapter.text_predictor.output_mlp[-1].bias.copy_(torch.tensor([keep, -keep]))
        results.append(stepwise(net, sample, [9, 10, 11]))
    (kept, _), (dropped, cache) = results
    torch.testing.assert_close(kept[:, :2], dropped[:, :2])
    assert not torch.allclose(kept[:, 2:], dropped[:, 2:], atol=1e-4)
    assert cache.stored()[1][0] == sample["input_ids"].shape[1] - 16 + KEPT


def test_switches_after_loading():
    net, adapter = build()
    sample = tiny.prompt(net, "ttItt")
    adapter.use_text_predictor = False
    _, cache = stepwise(net, sample, [9, 10, 11])
    assert cache.stored()[1][0] == cache.stored()[0][0] - 16 + KEPT
    adapter.use_vision_predictor = False
    _, cache = stepwise(net, sample, [9])
    assert cache.stored()[1] == cache.stored()[0]


def test_the_cache_forks_and_refuses_to_be_cropped():
    net, _ = build()
    sample = tiny.prompt(net, "ttItt")
    _, cache = stepwise(net, sample, [9, 10])
    fork = copy.deepcopy(cache)
    with torch.no_grad():
        one = net(input_ids=torch.tensor([[11]]), past_key_values=cache).logits
        two = net(input_ids=torch.tensor([[11]]), past_key_values=fork).logits
    assert torch.equal(one, two)
    with pytest.raises(NotImplementedError, match="shortened"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(stepwise(net, sample, [9])[0][:, 0], first_logits(net, sample, cache))


def first_logits(net, sample, cache):
    inputs = {name: value for name, value in sample.items() if name != "labels"}
    with torch.no_grad():
        return net(**inputs, past_key_values=cache).logits[:, -1]


# Training


def gradients(net, sample):
    net.zero_grad()
    output = net.train()(**sample)
    output.loss.backward()
    adapter = net.model.language_adapter
    sums = {
        name: sum(float(p.grad.abs().sum()) for p in getattr(adapter, name).parameters())
        for name in ("image_predictor", "text_predictor")
    }
    return output, sums


def test_gradients_reach_the_predictors_that_decide():
    net, _ = build()
    output, sums = gradients(net, with_answer(tiny.prompt(net, "ttItttttttt"), 6))
    assert sums["image_predictor"] > 0
    assert sums["text_predictor"] > 0
    assert output.aux_loss > 0
    _, sums = gradients(net, with_answer(tiny.prompt(net, "ttItttttttt"), 3))
    assert sums["image_predictor"] > 0
    assert sums["text_predictor"] == 0


def test_text_only_samples_train():
    net, _ = build()
    output, sums = gradients(net, with_answer(tiny.prompt(net, "ttttttttt"), 5))
    assert torch.isfinite(output.loss)
    assert sums["image_predictor"] == 0
    assert sums["text_predictor"] > 0


class NoNoise(DynamicSparsification):
    """Decides without chance, so that two forwards decide alike."""

    def noise(self, role, logits):
        return torch.zeros_like(logits, dtype=torch.float32)


def test_packed_rows_train_and_prune_like_separate_samples():
    net, adapter = build(softmax_eps=1e-12, seed=3)
    adapter.__class__ = NoNoise
    samples = [
        with_answer(tiny.prompt(net, "ttItttttttt"), 6),
        with_answer(tiny.prompt(net, "tttttttt", seed=1), 5),
        with_answer(tiny.prompt(net, "tIttttt", seed=2), 2),
    ]
    packed = {name: torch.cat([s[name] for s in samples], dim=1) for name in ("input_ids", "labels")}
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    for name in ("pixel_values", "visual_sizes", "visual_modalities"):
        packed[name] = torch.cat([s[name] for s in samples if name in s])
    filling = torch.zeros(1, 5, dtype=torch.long)  # the unused tail of a packed row
    for name, value in (("input_ids", filling), ("labels", filling - 100), ("position_ids", torch.arange(5)[None])):
        packed[name] = torch.cat([packed[name], value], dim=1)
    padded = join(samples, side="right")
    for training in (True, False):
        net.train(training)
        one, other = net(**packed), net(**padded)
        for row, length in enumerate(lengths):
            start = sum(lengths[:row])
            torch.testing.assert_close(
                one.logits[0, start : start + length], other.logits[row, :length], atol=2e-5, rtol=1e-4
            )
        if training:
            torch.testing.assert_close(one.aux_loss, other.aux_loss)
            torch.testing.assert_close(one.loss, other.loss)


def test_left_and_right_padding_train_alike():
    net, adapter = build(softmax_eps=1e-12)
    adapter.__class__ = NoNoise
    net.train()
    samples = [with_answer(tiny.prompt(net, "ttItttttttt"), 6), with_answer(tiny.prompt(net, "tItttttt", seed=2), 4)]
    torch.testing.assert_close(net(**join(samples, "left")).loss, net(**join(samples, "right")).loss)


def test_a_templates_closing_tokens_do_not_hide_the_answer():
    net, _ = build()
    sample = with_answer(tiny.prompt(net, "ttItttttttttt"), 8)
    sample["labels"][:, -2:] = -100  # "<|im_end|>\n" of some templates
    _, sums = gradients(net, sample)
    assert sums["text_predictor"] > 0


def test_gradient_checkpointing_changes_nothing():
    net, adapter = build()
    adapter.__class__ = NoNoise
    sample = with_answer(tiny.prompt(net, "ttItttttttt"), 6)
    _, plain = gradients(net, sample)
    net.gradient_checkpointing_enable({"use_reentrant": False})
    _, checkpointed = gradients(net, sample)
    assert checkpointed == pytest.approx(plain, rel=1e-4)


def test_a_lora_step_with_packing_moves_adapters_and_predictors():
    peft = pytest.importorskip("peft")
    net, _ = build()
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["image_predictor", "text_predictor"],
    )
    wrapped = peft.get_peft_model(net, config).train()
    samples = [with_answer(tiny.prompt(net, "ttItttttttt"), 6), with_answer(tiny.prompt(net, "tItttttt", seed=2), 5)]
    batch = {name: torch.cat([s[name] for s in samples], dim=1) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(s["input_ids"].shape[1]) for s in samples])[None]
    batch["pixel_values"] = torch.cat([s["pixel_values"] for s in samples])
    trainable = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trainable)
    optimiser = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(**batch).loss.backward()
    optimiser.step()
    after = dict(wrapped.named_parameters())
    for part in ("lora_B", "image_predictor", "text_predictor"):
        assert any(part in name and not torch.equal(before, after[name]) for name, before in trainable.items())


@pytest.mark.parametrize("size", [(1, 32, 32), (1, 40, 90)])
def test_under_slices_of_another_system(tmp_path, monkeypatch, size):
    """Sparsification under UHD's slices and separators: forward, backward, cached as uncached, save, load."""
    views = {"type": "native_slices", "size": tiny.SIZE, "patch": 8, "max_slices": 4}
    monkeypatch.setitem(tiny.CONNECTORS, "slices", {"type": "spatial_resampler", "queries": 4, "heads": 2})
    schema = {"type": "spatial_schema", "column_separator": 5, "row_separator": 6}
    net = tiny.model(
        text_config=tiny.DECODERS["llama"] | {"num_hidden_layers": 4},
        connector="slices",
        media={"image": {"views": views, "arrange": schema}},
        language_adapter=OPTIONS | {"vision_keep_rate": 0.5},
    )
    item = MediaSize(*size)
    plan = net.model.media.plan("image", item)
    layout = [[[tiny.TOKEN] * run.visual, list(run.ids)] for run in net.model.media.layout("image", item)]
    image = [token for run in layout for ids in run for token in ids]
    ids = torch.tensor([[7, 8, *image, 9, 10, 11, 12, 13, 14, 15]])
    sample = {
        "input_ids": ids,
        "pixel_values": [torch.randn(3, view.height, view.width) for view in plan.views],
        "visual_sizes": torch.tensor([size]),
    }
    output, sums = gradients(net, with_answer(sample, 5))
    assert torch.isfinite(output.loss)
    assert min(sums.values()) > 0
    net.eval()
    balance(net, net.model.language_adapter.text_predictor)
    cache = net.model.language_adapter.make_cache()
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = net.generate(**sample, **greedy, past_key_values=cache)
    assert torch.equal(cached, net.generate(**sample, **greedy, use_cache=False))
    dropped = image.count(tiny.TOKEN) - int(image.count(tiny.TOKEN) * 0.5)
    assert 0 < dropped <= cache.stored()[0][0] - cache.stored()[1][0] < dropped + 8
    net.save_pretrained(tmp_path)
    assert torch.equal(type(net).from_pretrained(tmp_path).generate(**sample, **greedy), cached)


# Files and errors


def test_save_and_load(tmp_path):
    net, _ = build()
    sample = tiny.prompt(net, "ttItt")
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert again.config.language_adapter == net.config.language_adapter
    assert torch.equal(stepwise(again, sample, [7, 8])[0], stepwise(net, sample, [7, 8])[0])


def test_the_published_layout_goes_there_and_back(tmp_path):
    from llavakit.checkpoints.layouts import detect
    from llavakit.checkpoints.opening import build as build_from
    from llavakit.checkpoints.opening import open_checkpoint

    net, _ = build(use_instruct_predictor=True)
    net.config.system = "dynamic-llava"
    layout = get_system("dynamic-llava").load("checkpoint")()
    net.config.media["image"]["views"] = {"type": "pad", "size": tiny.SIZE}
    assert layout.expresses(net.config)
    raw, state = layout.write_config(net.config), dict(layout.write_state(net.config, net.state_dict()))
    assert "model.image_score_predictor.transformer.0.attn.qkv.weight" in state
    assert "model.output_text_score_predictor.output_mlp.7.bias" in state
    raw["mm_vision_tower"] = str(tmp_path / "encoder")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(net.config.vision_config.to_dict()))
    raw["sparse_config"]["use_text_predictor"] = False  # image-only use of a full checkpoint
    for model_type in ("dynamic_llava_llama", "llava_llama"):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": model_type}))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
        assert detect(tmp_path, raw | {"model_type": model_type}).system == "dynamic-llava"
    opened = open_checkpoint(tmp_path)
    assert opened.config.language_adapter["vision_keep_rate"] == 0.3
    again = build_from(opened)
    assert again.model.language_adapter.text_predictor is None
    net.model.language_adapter.use_text_predictor = False
    sample = tiny.prompt(net, "ttItt")
    again.config.image_token_id = tiny.TOKEN
    torch.testing.assert_close(stepwise(again, sample, [7])[0], stepwise(net, sample, [7])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_keep_rate": 1.5}, "vision_keep_rate is 1.5"),
        ({"sparse_layer": 9}, "sparse_layer is 9"),
        ({"d_model": 18}, "d_model is 18"),
        ({"keep": 1}, "keep"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_what_cannot_work_is_refused():
    net, _ = build()
    sample = tiny.prompt(net, "ttItt")
    with pytest.raises(UserError, match="its own cache"):
        net(**sample, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="output_attentions"):
        net(**sample, output_attentions=True)
    phi, _ = build("phi")
    with pytest.raises(UserError, match="phi"):
        phi(**tiny.prompt(phi, "ttItt"))
    windowed = tiny.DECODERS["mistral"] | {"sliding_window": 8}
    net = tiny.model(text_config=windowed, language_adapter=OPTIONS)
    with pytest.raises(UserError, match="sliding window"):
        net(**tiny.prompt(net, "ttItt"))


def test_an_empty_selective_cache_has_nothing():
    cache = SelectiveCache(layers=3, sparse_layer=1)
    assert cache.get_seq_length() == 0
    assert cache.bytes() == 0
    assert not cache.is_croppable


def test_cost_is_what_the_spec_says():
    report = get_system("dynamic-llava").load("cost")()
    rows = {(row.group.partition(":")[0], row.unit, row.name): row.value for row in report.rows}
    expected = {
        ("7B", "FLOPs", "576 image tokens in every layer (LLaVA-1.5)"): 7.6343e12,
        ("13B", "FLOPs", "115 image tokens from layer 2 on"): 3.5270e12,
        ("7B", "%", "saved, predictor included"): 75.23,
        ("13B", "%", "saved with 60 text tokens"): 69.17,
        ("7B", "FLOPs", "text predictor, one generated token"): 4.52e6,
        ("7B", "FLOPs", "prompt 51, outputs 1555: 784 outputs kept too"): 13.901e12,
        ("13B", "FLOPs", "prompt 205, outputs 351: image tokens dropped"): 18.015e12,
        ("7B", "MiB", "outputs 351: 182 outputs kept too"): 270.7,
        ("13B", "MiB", "outputs 1555: full"): 1704.7,
        ("7B", "FLOPs", "115 from layer 2 on"): 2.488e12,
        ("7B", "parameters", "image predictor"): 8572034,
        ("13B", "parameters", "text predictor"): 2796674,
    }
    for key, value in expected.items():
        assert rows[key] == pytest.approx(value, rel=1e-3), key


# As a user meets it


def test_the_engine_answers_like_generate():
    from llavakit.generation import Engine, Request, SamplingParams

    net, _ = build(seed=2)
    samples = [tiny.prompt(net, layout, seed=number) for number, layout in enumerate(("ttItt", "tttt", "tIttttItt"))]
    media = ("pixel_values", "visual_sizes", "visual_modalities")
    requests = [
        Request(
            sample["input_ids"][0],
            **{name: sample[name] for name in media if name in sample},
            sampling=SamplingParams(max_new_tokens=8, eos_token_ids=()),
        )
        for sample in samples
    ]
    replies = Engine(net).generate(requests)
    net.generation_config.eos_token_id = None
    for sample, reply in zip(samples, replies, strict=True):
        sample.pop("labels")
        expected = net.generate(**sample, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert reply.token_ids == expected[0, -8:].tolist()


@pytest.mark.parametrize("sparse_layer", [0, 1, 4])
def test_rows_of_unequal_caches_decode_together(sparse_layer):
    from llavakit.generation import Engine, Request, SamplingParams

    net, _ = build(seed=3, sparse_layer=sparse_layer)
    samples = [tiny.prompt(net, layout, seed=number) for number, layout in enumerate(("ttItt", "tttt", "tI", "tIttIt"))]

    def request(number, new):
        media = {name: value for name, value in samples[number].items() if name.startswith(("pixel", "visual"))}
        sampling = SamplingParams(max_new_tokens=new, eos_token_ids=(), n=2, temperature=0.7, seed=number)
        return Request(samples[number]["input_ids"][0], **media, sampling=sampling)

    lengths = (9, 6, 12, 5)
    alone = [Engine(net).generate([request(number, new)])[0] for number, new in enumerate(lengths)]
    calls = []
    hook = net.model.language_model.layers[2].register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    engine = Engine(net)
    handles = [engine.submit(request(number, new)) for number, new in enumerate(lengths[:3])]
    for _ in range(2):
        engine.step()
    handles.append(engine.submit(request(3, lengths[3])))  # joins while the others decode
    engine.run()
    hook.remove()
    assert max(calls) == 8  # two replies to each of four requests in one forward pass
    for one, handle in zip(alone, handles, strict=True):
        assert [reply.token_ids for reply in one] == [reply.token_ids for reply in handle.result()]


def test_a_recipe_continues_a_plain_model_in_packed_rows(tmp_path):
    import tiny_training
    from rich.console import Console

    from llavakit.training.build import build_model
    from llavakit.training.recipe import parse_recipe
    from llavakit.training.run import train

    quiet = Console(quiet=True)
    tiny_training.write_world(tmp_path)
    raw = tiny_training.recipe(tmp_path, output=str(tmp_path / "plain"))
    raw["stages"] = [raw["stages"][1] | {"max_steps": 1}]
    plain = str(train(parse_recipe(raw), console=quiet).final)

    raw = tiny_training.recipe(tmp_path, system="dynamic-llava")
    options = {"d_model": 8, "nhead": 2, "sparse_layer": 1, "output_text_len_for_training": 3}
    raw["parts"] |= {"language_adapter": OPTIONS | options, "tokenizer": plain}
    raw["parts"]["init"] = dict.fromkeys(("vision_tower", "multi_modal_projector", "language_model"), plain)
    tune = raw["stages"][1] | {"packing": True, "max_length": 128, "max_steps": 3}
    raw["stages"] = [tune | {"train": {"language_model": 1e-3, "lm_head": 1e-3, "language_adapter": 1e-2}}]
    recipe = parse_recipe(raw)
    started = build_model(recipe)[0].state_dict()
    for name, tensor in load_file(f"{plain}/model.safetensors").items():
        assert torch.equal(started[name], tensor), name
    result = train(recipe, console=quiet)
    assert result.stages[0].metrics["log"][-1]["auxiliary"] > 0


def test_the_published_recipe_is_valid_and_builds_the_published_sizes():
    from llavakit.training.build import build_meta
    from llavakit.training.parameter_groups import part_of, public_name
    from llavakit.training.recipe import load_recipe

    recipe = load_recipe(get_system("dynamic-llava").recipe)
    model = build_meta(recipe)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert sizes["language_adapter"] == 8572034 + 2270338
    rates = recipe.stages[0].train
    trained = {part_of(public_name(name), rates) for name, _ in model.named_parameters()}
    assert trained == {None, "language_model", "lm_head", "language_adapter"}


@pytest.mark.slow
def test_the_miniature_tells_learned_from_random_dropping():
    from llavakit.systems.dynamic_llava.miniature import one_seed

    measured = one_seed(0)
    assert measured["learned"] >= measured["full"] - 0.03
    assert measured["random"] <= 0.4
    assert measured["marks kept"] > 0.95


def test_a_batch_cut_behind_its_images_trains_as_if_its_rows_were_that_short():
    given = parity_variations.Given(next(path for path in GOLDEN if path.name == "train_step_a"))
    inputs = given.tensors("inputs")
    limit = inputs["input_ids"].shape[1] - 2  # two tokens less; an image takes 16 places of which the row has one
    by_setting = {"case.json": parity_variations.with_setting(given.meta, MAX_LENGTH, limit + 15)}
    cut = ("input_ids", "labels", "attention_mask")
    rows = {name: tensor[:, :limit] if name in cut else tensor for name, tensor in inputs.items()}
    assert not parity_variations.against_another_run(given, by_setting, {"inputs.safetensors": rows}, 1e-6, 1e-5)
