"""Surgical-LLaVA's golden components; the original code is Video-ChatGPT's and SurgicalGPT's."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llavakit.connectors.base import Features
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import normalise, split_literals
from llavakit.conversation.template import Template, get_template
from llavakit.conversation.turns import TextDelta
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.five_aspects import average_score, item_keys, parse_reply
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.records import as_records
from llavakit.evaluation.score import score
from llavakit.generation.engine import Engine
from llavakit.generation.request import Request
from llavakit.generation.responder import Call, Responder
from llavakit.media import frame_sampling
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MODALITIES
from llavakit.proof.entries import (
    TINY,
    check_keys,
    fitting,
    published_model,
    scored,
    text_processor,
    training_sample,
    view_processor,
    views_of,
    with_blank_media,
)
from llavakit.proof.golden import Case, Example, Result, component, examples, take
from llavakit.registry import CONNECTORS
from llavakit.systems.surgical_llava.answers import published_answer
from llavakit.systems.surgical_llava.checkpoint import MARKS, media_of
from llavakit.systems.surgical_llava.records import training_records
from llavakit.training.dataset import StageCollator

TOWER = "model.vision_tower.vision_tower."
FIRST_BYTE, FIRST_MARK = 3, 259  # ids in the cases' tokenizer
TEMPLATES = {"video-chatgpt_v1": "video_chatgpt_v1", "vicuna_v1_1": "vicuna_v1_1", "default": "video_chatgpt_default"}
SIDE = 224  # a literal of the original loader


# Pixels to tokens


def pooling(case: Case) -> Result:
    """The connector without a projection, on features in float32 and in float16."""
    slots, tensors = case.config["temporal_slots"], {}
    case.informational("config.videos*")
    variants = {"torch_fp16": (slots, "float16", None), "numpy_fp16": (slots, "float16", torch.float16)}
    variants["numpy_fp32_12slots"] = (12, None, None)
    for key, features in case.tensors.items():
        number = key.removeprefix("features.")
        frames, patches, width = features.shape
        for name, (rows, precision, stored) in variants.items():
            options = {"type": "spatio_temporal", "slots": rows, "precision": precision, "depth": 0}
            connector = CONNECTORS.build(options, vision_width=width, hidden_size=width)
            given = features if stored is None else features.to(stored)
            flat = Features(given.flatten(0, 1), [(1, 1, patches)] * frames, [0] * frames)
            tensors[f"{name}.{number}"] = connector(flat, [None]).values
    single = all(features.dtype == torch.float32 for features in case.tensors.values())
    exact = {"numpy_fp32_12slots.*": (1e-5, 0.0)} if single else {}  # the case's notes
    return Result(tensors=tensors, tolerances=exact)


def model_of(
    llama: Mapping[str, Any], clip: Mapping[str, Any], weights: Mapping[str, Tensor], **own: Any
) -> LlavakitForConditionalGeneration:
    """A model opened as a published checkpoint.

    Args:
        weights: Under their published names; an encoder that they lack is random.
        own: Further keys of config.json.
    """
    encoder = {"model_type": "clip_vision_model", **check_keys(clip, CLIPVisionConfig().to_dict(), "config")}
    weights = dict(weights)
    if not any(name.startswith(TOWER) for name in weights):
        tower = CLIPVisionModel(CLIPVisionConfig(**clip)).state_dict()
        prefix = TOWER if all(name.startswith("vision_model.") for name in tower) else f"{TOWER}vision_model."
        own_type = next(iter(weights.values())).dtype
        weights |= {
            f"{prefix}{name}": tensor.to(own_type) for name, tensor in tower.items() if tensor.is_floating_point()
        }
    raw = {"model_type": "VideoChatGPT", **llama, **own}
    return published_model(raw, weights, encoder)


def frames_to_tokens(case: Case) -> Result:
    """Frames to features and pooled tokens; the projection is the identity."""
    clip = dict(case.config)
    slots, pixels = clip.pop("temporal_slots"), case.tensors["pixel_values"]
    case.informational("config.frames")
    clip.pop("frames", None)
    width = clip["hidden_size"]
    weights = {f"{TOWER}{name}": tensor for name, tensor in case.weights().items()}
    own = next(iter(weights.values())).dtype
    weights |= {"model.mm_projector.weight": torch.eye(width), "model.mm_projector.bias": torch.zeros(width)}
    weights |= {"model.norm.weight": torch.ones(width)}
    weights |= {f"{name}.weight": torch.zeros(8, width) for name in ("model.embed_tokens", "lm_head")}
    weights = {name: tensor.to(own) for name, tensor in weights.items()}
    llama = {"vocab_size": 8, "hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = model_of(llama, clip, weights, spatio_temporal_pooling={"temporal_slots": slots})
    sizes = torch.tensor([[len(pixels), *pixels.shape[-2:]]])
    with torch.no_grad():
        found = model.get_image_features(
            pixels, visual_sizes=sizes, visual_modalities=torch.tensor([MODALITIES.index("video")])
        )
    tensors = {"frame_features": found.last_hidden_state, "video_tokens_fp16": found.pooler_output[0]}
    single = {pixels.dtype, *(tensor.dtype for tensor in weights.values())} == {torch.float32}
    exact = {"frame_features": (2e-5, 0.0)} if single else {}  # the case's notes
    return Result(tensors=tensors, tolerances=exact)


def frame_numbers(case: Case) -> Result:
    """Numbers of frames, and the frames that the loader squashes."""
    facts = ("returned", "total_frames", "width", "height")  # of the clips, which are given as tensors
    case.informational(*(f"config.clips.*.{name}" for name in facts))
    places = case.config["sample_rows_and_columns"]
    rows = [
        {"total": total, "wanted": wanted, "indices": frame_sampling.midpoints(total, wanted)}
        for total, wanted in case.inputs["pairs"]
    ]
    tensors = {}
    for number, clip in enumerate(case.config["clips"]):
        views = media_of(SIDE, {"type": "flat"})["video"]["views"]
        views["frame"] = {"type": "squash", "size": SIDE, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        sampling = {"type": "midpoints", "frames": clip["num_frm"]}
        vision = {"image_size": SIDE, "patch_size": SIDE}
        processor = view_processor({"video": {"views": views}}, vision, sampling=sampling)
        frames = torch.stack(views_of(processor, "video", case.tensors[f"video.{number}"].numpy()))
        pixels = (frames * 255).round().to(torch.uint8).movedim(1, -1)
        tensors[f"frames.{number}"] = pixels[:, places][:, :, places]
    return Result(json={"sampling": rows}, tensors=tensors)


def end_to_end(case: Case) -> Iterator[Example]:
    """Projected features, logits and loss; a row of features belongs to every sample, with or without a clip."""
    llama, inputs = dict(case.config), case.tensors
    width, length, wrapped = (llama.pop(key) for key in ("mm_hidden_size", "video_tokens", "use_vid_start_end"))
    ids = {key: llama.pop(key, None) for key in ("vid_patch_token", "vid_start_token", "vid_end_token")}
    clip = {**TINY, "hidden_size": width, "image_size": 2, "patch_size": 2}
    own = {"mm_hidden_size": width, "mm_use_vid_start_end": wrapped}
    model = model_of(llama, clip, case.weights(), **own, **ids)
    features = inputs["video_spatio_temporal_features"]
    samples, vectors = [], []
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    labels = inputs.get("labels")
    with torch.no_grad():
        connector = model.model.multi_modal_projector
        projected = connector.project(fitting(features, connector))
        rows = list(projected)
        for number, row in enumerate(inputs["input_ids"]):
            own = row[seen[number]].tolist()
            samples.append({"input_ids": own, "labels": own, "pixel_values": [], "visual_sizes": []})
            if labels is not None:
                samples[-1]["labels"] = labels[number][seen[number]].tolist()
            samples[-1]["visual_modalities"] = []
            clips = [token for token, _ in itertools.groupby(own) if token == ids["vid_patch_token"]]
            vectors += rows[: len(clips)]
            rows = rows[max(len(clips), 1) :]  # a sample without a clip uses one up too
        side = "right" if bool(seen[:, 0].all()) else "left"
        batch = StageCollator(0, padding_side=side)(samples)
        embeds = model.model.embed(batch["input_ids"], vectors=vectors)[0]
    case.informational("config.video_tokens")
    if any(len(own) != length for own in projected):
        raise UserError(f"inputs: features of {projected.shape[1]} tokens for a run of {length}")

    def spread(found: Tensor) -> Tensor:
        """Rows as the collator pads them, in the places of the case."""
        places = found.new_zeros(*seen.shape, *found.shape[2:])
        places[seen] = found[batch["attention_mask"].bool()]
        return places

    def forward() -> Result:
        targets = None if labels is None else batch["labels"]
        with torch.no_grad():
            out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=targets)
        tensors = {"logits": spread(out.logits), "projected": projected}
        if out.loss is not None:
            tensors["loss"] = out.loss.reshape(1)
        return Result(tensors=tensors, mask={"logits": seen.unsqueeze(-1)})

    def engine() -> Result:
        """Logits from the last visual position on: what comes before it is the prompt, what follows the answer."""
        logits, known = torch.zeros(*seen.shape, model.config.text_config.vocab_size), torch.zeros_like(seen)
        for number, sample in enumerate(samples):
            own = sample["input_ids"]
            visual = [place for place, token in enumerate(own) if token == ids["vid_patch_token"]]
            begin = visual[-1] + 1 if visual else 1
            prompt = Request(inputs_embeds=spread(embeds)[number][seen[number]][:begin])
            found = Engine(model).reply_logits(prompt, [[*own[begin:], 0]])[0]
            places = seen[number].nonzero().flatten()[begin - 1 :]
            logits[number, places], known[number, places] = found.to(logits.dtype), True
        return Result(tensors={"logits": logits}, mask={"logits": known.unsqueeze(-1)})

    yield Example("forward pass", forward, tensors=("*",))
    yield Example("through the engine", engine, tensors=("logits",))


# Text


def toy_tokenizer() -> Any:
    """The cases' tokenizer: bytes, a begin token in front of every text, and the tokens of clips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: FIRST_BYTE + byte for byte, letter in bytes_to_unicode().items()}
    vocabulary |= {"<pad>": 0, "<s>": 1, "</s>": 2} | {mark: FIRST_MARK + n for n, mark in enumerate(MARKS)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(MARKS),
    )


def clip_processor(template: Template | str, length: int, wrapped: bool) -> LlavakitProcessor:
    """A processor under which every clip is a run of so many tokens."""
    arrange: dict[str, Any] = {"type": "flat"}
    if wrapped:
        arrange = {"type": "wrapped", "before": [FIRST_MARK + 1], "after": [FIRST_MARK + 2]}
    config = LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": FIRST_MARK + len(MARKS), **TINY},
        vision_config={"model_type": "clip_vision_model", "image_size": 2, "patch_size": 2, **TINY},
        connector={"type": "spatio_temporal", "slots": length - 1} if length > 1 else {"type": "mlp"},  # and one patch
        media=media_of(2, arrange),
    )
    return text_processor(toy_tokenizer(), template, config)


def tokens_of(processor: LlavakitProcessor, ids: Sequence[int]) -> list[int]:
    """Ids as the original has them, with its patch token at clips."""
    clip = (processor.image_token_id, IMAGE_PLACEHOLDER)
    return [FIRST_MARK if token in clip else int(token) for token in ids]


def messages_of(turns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Messages of a published record."""
    roles = {"human": "user", "gpt": "assistant"}
    parts = [split_literals(turn["value"], {"<video>": "video"}) for turn in turns]
    return normalise([{"role": roles[turn["from"]], "content": own} for turn, own in zip(turns, parts, strict=True)])


def training_prompt(case: Case) -> Iterator[Example]:
    """Sentences with their clips, ids and labels."""
    case.informational("config.tokenizer")
    config = case.config
    length, wrapped, front = config["video_token_len"], config["use_vid_start_end"], config.get("sep_video_conv_front")
    template = get_template("vicuna_v1_1_front" if front else "vicuna_v1_1")
    processor = clip_processor(template, length, wrapped)
    bare = replace(template, file="plain", system="", values={**template.values, "end": ""}, training=None)
    sentences = clip_processor(bare, length, wrapped)

    def expanded(message: Mapping[str, Any]) -> str:
        alone = with_blank_media([{**message, "role": "user"}])
        placement = None if front else "keep"
        ids = sentences.encode(alone, pixels=False, add_generation_prompt=True, placement=placement)["input_ids"]
        return sentences.tokenizer.decode(tokens_of(sentences, ids)[1:], clean_up_tokenization_spaces=False)

    def sample(turns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        messages = messages_of(turns)
        found = training_sample(processor, messages, labels="rounds")
        return {
            "expanded": [expanded(message) for message in messages],
            "input_ids": tokens_of(processor, found["input_ids"]),
            "labels": found["labels"],
        }

    yield from examples(sample, case.inputs)


def inference_prompt(case: Case) -> Iterator[Example]:
    """Prompts, and answers without the template's end mark."""
    case.informational("config.tokenizer", "inputs.*.frames")
    length, wrapped = (case.config[key] for key in ("video_token_len", "use_vid_start_end"))

    def prompt(item: Mapping[str, Any]) -> Result:
        template = get_template(TEMPLATES[item["template"]])
        processor = clip_processor(template, length, wrapped)
        content = [{"type": "video"}, {"type": "text", "text": item["question"]}]
        messages = with_blank_media([{"role": "user", "content": content}])
        ids = processor.encode(messages, add_generation_prompt=True)["input_ids"]
        found = {"input_ids": tokens_of(processor, ids), "answer": published_answer(item["raw_output"], template.stop)}
        return Result(
            json=found, ignored={"*.generation": "what the original's script asks of its sampler, word for word"}
        )

    yield from examples(prompt, case.inputs)


# Records and scores


@component(ordered=True)
def training_records_of(case: Case) -> Result:
    """Instructions as training records."""
    found = training_records(as_records("inputs.json", case.inputs["records"]), case.inputs["available_features"])
    return Result(json=list(found))


def vqa_metrics(case: Case) -> Result:
    """Scores over classes, from labels that are written out."""
    average, zero = case.config["average"], case.config["zero_division"]
    if average != "macro":
        raise UserError(f"config.average: is {average!r}, llavakit averages over classes (macro)")
    truth, guesses = case.inputs["label_true"], case.inputs["label_pred"]
    names = {label: f"class {number}" for number, label in enumerate(dict.fromkeys([*truth, *guesses]))}
    gold = [{"text": "-", "answer": names[label]} for label in truth]
    options = {"labels": list(names.values()), "zero_division": float(zero)}
    found = scored("classes", [names[label] for label in guesses], gold, **options)
    return Result(json={name: found[name] / 100 for name in ("accuracy", "precision", "recall", "fscore")})


class Canned(Responder):
    """A judge whose replies are given; remembers what it is told."""

    def __init__(self, reply: str) -> None:
        super().__init__(name="canned")
        self.reply, self.told = reply, []

    def run(self, call: Call) -> Iterator[TextDelta]:
        self.told.append([dict(message) for message in call.messages])
        yield TextDelta(text=self.reply)


ASPECT_NAMES = {
    "1_correctness": "correctness",
    "2_detailed_orientation": "detail",
    "3_context": "context",
    "4_temporal": "temporal",
    "5_consistency": "consistency",
}


def five_aspects(case: Case) -> Iterator[Example]:
    """What a judge is told, what its replies say, and their mean."""
    case.informational("config.judge_model")  # asked through an API there; here its replies are given
    items, replies = take(case.inputs["items"]), case.inputs["judge_replies"]  # an aspect asks for some of the fields
    recorded = case.config["messages_recorded"]

    def told(aspect: str, item: Mapping[str, str], reply: str) -> list[dict[str, str]]:
        fields = ("Q1", "Q2", "A", "pred1", "pred2") if aspect == "consistency" else ("Q", "A", "pred")
        judge = Canned(reply)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "answers.json"
            file.write_text(json.dumps([{name: item[name] for name in ("video_name", *fields)}]), encoding="utf-8")
            score("five_aspects", file, aspects=aspect, judge=Judge(judge), attempts=1)
        return judge.told[0]

    def judged(published: str) -> dict[str, Any]:
        aspect = ASPECT_NAMES[published]
        messages = [told(aspect, item, reply) for item, reply in zip(items, replies, strict=True)]
        parsed, average, error = [parse_reply(reply) for reply in replies], None, None
        try:
            average = average_score([one for one in parsed if one is not None])
        except (TypeError, KeyError, ValueError, OverflowError, ZeroDivisionError) as problem:
            error = type(problem).__name__
        return {
            "messages": messages[:recorded],
            "parsed": parsed,
            "average_over_parsed": average,
            "error": error,
            "keys": item_keys([item["video_name"] for item in items]),
        }

    yield from examples(judged, {name: name for name in case.config["aspects"]})


ADAPTERS = {
    "spatio_temporal_pooling": pooling,
    "frames_to_tokens": frames_to_tokens,
    "frame_sampling": frame_numbers,
    "end_to_end": end_to_end,
    "training_prompt": training_prompt,
    "inference_prompt": inference_prompt,
    "training_record": training_records_of,
    "vqa_metrics": vqa_metrics,
    "five_aspect_judge": five_aspects,
}
