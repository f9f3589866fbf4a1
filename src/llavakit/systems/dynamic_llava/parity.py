"""Golden components of Dynamic-LLaVA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llavakit.checkpoints.layouts import rename_with
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.prompt import PromptInfo
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import check_keys, engine_logits, fitting, loaded, published_model
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.systems.dynamic_llava.adapter import Decisions, DynamicSparsification, Sample, Selection
from llavakit.systems.dynamic_llava.attention import EPS, PolicyMask, allowed_pairs, masked_softmax
from llavakit.systems.dynamic_llava.cache import SelectiveCache
from llavakit.systems.dynamic_llava.checkpoint import SPARSE_DEFAULTS, DynamicLlavaLayout
from llavakit.systems.dynamic_llava.cost import paper_flops
from llavakit.systems.dynamic_llava.decisions import rate_penalty, temperature, threshold_keep
from llavakit.systems.dynamic_llava.predictors import ImagePredictor, TextPredictor
from llavakit.systems.dynamic_llava.roles import USER_MARKER, token_roles
from llavakit.views.plan import MediaSize

IMAGE = -1  # stands for visual positions where no embedding is looked up


def image_predictor(case: Case) -> Result:
    """Logits of the image predictor."""
    model = loaded(ImagePredictor(**case.config), case.weights())
    policy = case.tensors.get("policy")
    with torch.no_grad():
        policy = None if policy is None else fitting(policy, model)
        return Result(tensors={"logits": model(fitting(case.tensors["x"], model), policy)})


def text_predictor(case: Case) -> Result:
    """Logits and decisions of a text predictor."""
    model = loaded(TextPredictor(**case.config), case.weights())
    with torch.no_grad():
        logits = model(fitting(case.tensors["x"], model))
    return Result(tensors={"logits": logits, "keep": threshold_keep(logits).to(torch.uint8)})


def softmax(case: Case) -> Result:
    """The masked softmax on given scores."""
    case.informational("config.causal")
    inputs, eps = case.tensors, case.config.get("eps")
    eps = EPS if eps is None else eps
    return Result(tensors={"probs": masked_softmax(inputs["scores"], inputs["policy"], eps)})


def decoder_layer(case: Case) -> Result:
    """One decoder layer with a policy and without."""
    config = LlamaConfig(**case.config, num_hidden_layers=1, attn_implementation="sdpa")
    layer = loaded(LlamaDecoderLayer(config, 0), case.weights()).train()
    inputs = case.tensors
    hidden, policy, positions = fitting(inputs["x"], layer), inputs["policy"], inputs["position_ids"]
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    allowed = allowed_pairs(hidden.shape[1], hidden.device)
    mask = PolicyMask.of(allowed, policy[..., 0])
    with torch.no_grad():
        weighted = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        plain = layer(hidden, attention_mask=allowed, position_ids=positions, position_embeddings=rotary)
    return Result(tensors={"out": weighted, "out_no_policy": plain})


def selective_cache(case: Case) -> Result:
    """One selective layer: what each step attends to, and what stays."""
    case.informational("config.heads", "config.head_dim")
    inputs, lengths = case.tensors, []
    cache = SelectiveCache(layers=1, sparse_layer=0)
    for step, decisions in enumerate(case.inputs["decisions"]):
        keys, values = inputs[f"k{step}"], inputs[f"v{step}"]
        batch, _, columns, _ = keys.shape
        cache.rows.begin([columns] * batch, columns)
        attended, _ = cache.update(keys, values, 0)
        cache.commit(None if decisions is None else torch.tensor(decisions).view(batch, columns))
        lengths.append({"attended_length": attended.shape[2], "stored_length": cache.layers[0].keys.shape[2]})
    layer = cache.layers[0]
    return Result(json={"lengths": lengths}, tensors={"keys": layer.keys, "values": layer.values})


def regulariser(case: Case) -> Result:
    """The keep-rate penalty of given masks."""
    inputs, config = case.inputs, SPARSE_DEFAULTS | check_keys(case.config, SPARSE_DEFAULTS, "config")
    terms = (
        ("image_masks", "vision_keep_rate", 0),
        ("answer_masks", "output_text_keep_rate", config["output_text_len_for_training"]),
        ("instruct_masks", "instruct_keep_rate", config["instruct_len_for_training"]),
    )
    penalty = sum(
        float(rate_penalty([torch.tensor(mask) for mask in inputs[name]], config[rate], shortest))
        for name, rate, shortest in terms
        if inputs.get(name) is not None
    )
    return Result(json={"penalty": config["mask_loss_weight"] * penalty})


def tau(case: Case) -> Result:
    """The Gumbel temperature schedule."""
    return Result(json={"tau": [temperature(*item) for item in case.inputs["items"]]})


def flops(case: Case) -> Result:
    """The paper's own FLOPs convention."""
    case.informational("config.per_layer", "inputs.rows.*")
    keys = ("layers", "hidden", "tokens_before", "tokens_after", "full_layers")
    rows = case.inputs["rows"]
    return Result(json={"flops": [paper_flops(**{key: row[key] for key in keys}) for row in rows]})


# Prompts


def roles(case: Case) -> Iterator[Example]:
    """Role stretches of spliced samples."""
    config = case.config
    side = config.get("tokenizer_padding_side") or "right"
    limit = config.get("tokenizer_model_max_length")
    marker = config.get("user_marker") or USER_MARKER
    image = Entry(vectors=torch.zeros(config["num_image_tokens"], 0))
    anything = SimpleNamespace(config=SimpleNamespace(image_token_id=IMAGE))

    def spans(sample: Mapping[str, Any]) -> dict[str, Any]:
        labels = sample.get("labels")
        batch = ClassicBatch(
            anything,  # type: ignore[arg-type]
            sample["input_ids"],
            {IMAGE_PLACEHOLDER: [image] * sum(map(len, sample["input_ids"]))},
            attention_mask=sample.get("attention_mask"),
            labels=labels,
            max_length=limit,
            padding_side=side,
        )
        longest, indices = batch.ids.shape[1], []
        for whole in batch.samples:
            visual = [token == IMAGE for token in whole["input_ids"]]
            found = token_roles(visual, None if labels is None else whole["labels"], whole["input_ids"], marker)
            kept = len(whole["input_ids"][:limit])
            found = found if limit is None else found.clipped(limit)
            found = found.shifted(longest - kept) if side == "left" else found
            indices.append({name: list(span) for name, span in found._asdict().items()})
        return {
            "indices": indices,
            "spliced_length": longest,
            "labels": None if labels is None else batch.targets.tolist(),
            "attention_mask": batch.attention.tolist(),
        }

    yield from examples(spans, case.inputs["samples"], "samples")


# The whole model


class RecordingAdapter(DynamicSparsification):
    """Uses recorded noise and remembers what was decided."""

    recorded: Mapping[str, Tensor]
    decisions: Decisions
    samples: list[Sample]
    selections: list[Selection]

    def noise(self, role: str, logits: Tensor) -> Tensor:
        names = [name for name in self.recorded if name.startswith("gumbel_noise.") and role in name]
        found = self.recorded[names[0]]
        attribute = {"instruct": "last_instruct"}.get(role, role)
        counts = [len(getattr(sample, attribute)) for sample in self.samples]
        return torch.cat([found[row, :count] for row, count in enumerate(counts)])

    def decide(self, hidden: Tensor, samples: list[Sample]) -> Decisions:
        self.samples = samples
        self.decisions = super().decide(hidden, samples)
        return self.decisions

    def _samples(self, *args: Any) -> list[Sample]:
        self.samples = super()._samples(*args)
        return self.samples

    def select(self, *args: Any) -> Selection:
        self.selections.append(super().select(*args))
        return self.selections[-1]


def recording(model: LlavakitForConditionalGeneration, tensors: Mapping[str, Tensor]) -> RecordingAdapter:
    """The model's adapter, from now on with recorded noise and a memory."""
    adapter = model.model.language_adapter
    adapter.__class__ = RecordingAdapter
    adapter.recorded, adapter.selections = tensors, []
    return adapter


def tiny_model(case: Case) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a published checkpoint."""
    vision = check_keys(case.config["vision"], CLIPVisionConfig().to_dict(), "config.vision")
    known = (*SPARSE_DEFAULTS, "gumbel_tau", "user_marker")
    sparse = check_keys(case.config["sparse_config"], known, "config.sparse_config")
    marker = case.config.get("user_marker") or sparse.pop("user_marker", None) or USER_MARKER

    def marked(config: LlavakitConfig) -> None:
        config.language_adapter["user_marker"] = list(marker)

    raw = {"model_type": DynamicLlavaLayout.model_types[0], **case.config["llm"], "sparse_config": sparse}
    encoder = {"model_type": "clip_vision_model", **vision}
    return published_model(raw, case.weights(), encoder, change=marked)


def spliced_batch(case: Case, model: LlavakitForConditionalGeneration) -> ClassicBatch:
    """The case's batch with its images laid out."""
    inputs, llm = case.tensors, case.config["llm"]
    return ClassicBatch(
        model,
        inputs["input_ids"],
        {IMAGE_PLACEHOLDER: [Entry("image", MediaSize(1, *view.shape[-2:]), [view]) for view in inputs["images"]]},
        attention_mask=inputs.get("attention_mask"),
        labels=inputs.get("labels"),
        max_length=llm.get("tokenizer_model_max_length"),
        padding_side=llm.get("tokenizer_padding_side") or "right",
    )


def train_step(case: Case) -> Result:
    """Loss, logits, decisions and gradients of one training step with recorded noise."""
    inputs = case.tensors
    model = tiny_model(case).train()
    adapter = recording(model, inputs)
    adapter.tau = case.config["gumbel_tau"]
    batch = spliced_batch(case, model)
    output = batch.forward()
    output.loss.backward()
    decisions = adapter.decisions
    tensors = {
        "loss": output.loss[None],
        "ce_loss": (output.loss - output.aux_loss)[None],
        "logits": output.logits,
        "labels_after_splice": batch.targets,
    }
    if decisions.image:
        tensors["image_mask"] = torch.stack(decisions.image)
    tensors |= {f"answer_mask.{number}": mask for number, mask in enumerate(decisions.answer)}
    for name in ("instruct_mask", "last_instruct_mask"):
        tensors |= {f"{name}.{number}": mask for number, mask in enumerate(decisions.instruct)}
    renames = rename_with(DynamicLlavaLayout().renames_out(model.config))
    tensors |= {f"grad.{renames(name)}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(tensors=tensors, mask={"logits": batch.meaningful()})


class Session:
    """Step-by-step inference on one prompt, remembering decisions.

    Args:
        case: A golden case with `images` and `input_ids`.
    """

    def __init__(self, case: Case) -> None:
        self.model = tiny_model(case)
        self.adapter = recording(self.model, case.tensors)
        self.batch = spliced_batch(case, self.model)
        self.prompt = self.batch.collated()
        self.prompt.pop("labels", None)
        self.visual = self.prompt["input_ids"] == self.model.config.image_token_id
        self.cache: SelectiveCache = self.adapter.make_cache()

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits [batch, prompt, vocabulary]."""
        return self.model(**self.prompt, past_key_values=self.cache).logits

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Logits [batch, tokens, vocabulary] of tokens behind the cache."""
        ids = torch.tensor([list(tokens)]).expand(len(self.prompt["input_ids"]), -1)
        return self.model(input_ids=ids, past_key_values=self.cache).logits

    def stored(self) -> list[bool]:
        """Which tokens of the last step the first row keeps."""
        selection = self.adapter.selections[-1]
        return (selection.run if selection.stored is None else selection.stored)[0].tolist()

    def lengths(self) -> list[int]:
        """Entries per layer of the first row."""
        return [rows[0] for rows in self.cache.stored()]


def cached_decoding(case: Case) -> Iterator[Example | Result]:
    """Prefill and single-token steps with a cache, by hand and through the engine."""
    case.informational("config.fed_tokens")
    session = Session(case)
    fed = case.inputs["fed_tokens"]

    def steps() -> Result:
        image_logits: list[Tensor] = []
        if session.adapter.image_predictor is not None:
            remember = lambda module, args, output: image_logits.append(output)  # noqa: E731
            session.adapter.image_predictor.register_forward_hook(remember)
        prefill = session.prefill()
        run = session.adapter.selections[-1].run[0]
        kept = run[session.visual[0]].nonzero().squeeze(-1)
        lengths, logits, decisions = [session.lengths()], [prefill[:, -1]], []
        for token in fed:
            logits.append(session.feed([token])[:, -1])
            lengths.append(session.lengths())
            decisions += session.stored()
        tensors = {"step_logits": torch.stack(logits, dim=1), "prefill_logits": prefill[:, run], "keep_index": kept}
        if image_logits:
            tensors["image_predictor_logits"] = image_logits[0]
        facts = {"decisions": decisions, "cache_lengths_after_each_step": lengths, "keep_index": kept.tolist()}
        return Result(json=facts, tensors=tensors)

    def engine() -> dict[str, Tensor]:
        samples = session.batch.samples
        rows = [engine_logits(session.model, sample, len(sample["input_ids"]), fed) for sample in samples]
        return {"step_logits": torch.stack(rows)}

    yield Example("through the engine", engine, tensors=("step_logits",))
    found = steps()
    yield Example("steps", lambda: Result(tensors=found.tensors), tensors=("*",))
    yield Result(json=found.json)


def cached_turns(case: Case) -> Result:
    """Prefill, single tokens, and a later user turn in one chunk."""
    case.informational("config.chunks")
    session = Session(case)
    prefill = session.prefill()
    lengths, steps, decisions = [session.lengths()], [prefill[0, -1]], []
    ran = int(session.adapter.selections[-1].run[0].sum())
    if session.adapter.prunes_instructions:  # the prompt's last instruction without its last token
        run, sample = session.adapter.selections[-1].run, session.adapter.samples[0]
        decisions.append(run[0, sample.last_instruct[:-1]].tolist())
    for chunk in case.inputs["chunks"]:
        steps.append(session.feed(chunk)[0, -1])
        lengths.append(session.lengths())
        if len(chunk) > 1 and session.adapter.prunes_instructions:
            decisions.append(session.stored())
    return Result(
        json={
            "cache_lengths": lengths,
            "instruct_decisions": decisions,
            "prefill_logits_length": ran,
        },
        tensors={"step_last_logits": torch.stack(steps)},
    )


def uncached_decoding(case: Case) -> Result:
    """Decoding that recomputes everything at every step."""
    case.informational("config.fed_tokens")
    session = Session(case)
    ids, steps = session.prompt["input_ids"], []
    media = {name: value for name, value in session.prompt.items() if name not in ("input_ids", "attention_mask")}
    prompt_length = ids.shape[1]
    fed = case.inputs["fed_tokens"]
    with torch.no_grad():
        for count in range(len(fed) + 1):
            longer = torch.cat([ids, torch.tensor([fed[:count]], dtype=torch.long).expand(len(ids), -1)], dim=1)
            output = session.model(
                input_ids=longer,
                **media,
                use_cache=False,
                prompt_info=PromptInfo(length=prompt_length),
            )
            steps.append(output.logits[:, -1])
    kept = session.adapter.selections[-1].run[0, prompt_length:-1]
    logits = torch.stack(steps, dim=1)
    expected = case.wanted.tensors["step_logits"]
    meaningful = torch.ones(expected.shape[:2], dtype=torch.bool)
    meaningful[:, 0] = False  # the original's duplicated last prompt token; `first_step_logits_corrected` covers it
    return Result(
        json={"kept_answer_indices_last_step": kept.nonzero().squeeze(-1).tolist()},
        tensors={"step_logits": logits, "first_step_logits_corrected": logits[:, 0]},
        mask={"step_logits": meaningful[..., None]},
    )


ADAPTERS = {
    "image_predictor": image_predictor,
    "output_text_predictor": text_predictor,
    "instruct_predictor": text_predictor,
    "text_predictor": text_predictor,
    "masked_softmax": softmax,
    "decoder_layer_with_policy": decoder_layer,
    "selective_kv_cache": selective_cache,
    "keep_rate_regulariser": regulariser,
    "gumbel_temperature_schedule": tau,
    "paper_flops_convention": flops,
    "token_role_indices": roles,
    "train_step": train_step,
    "inference_with_cache": cached_decoding,
    "inference_multi_turn_cache": cached_turns,
    "inference_without_cache": uncached_decoding,
}
