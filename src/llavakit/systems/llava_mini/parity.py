"""LLaVA-Mini's golden components."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from llavakit.connectors.base import Features, Prompt
from llavakit.connectors.general import sincos_table
from llavakit.conversation.encode import IMAGE_PLACEHOLDER as PLACEHOLDER
from llavakit.conversation.encode import tokenize
from llavakit.conversation.messages import from_llava, media_first, to_llava
from llavakit.errors import UserError
from llavakit.evaluation import processors
from llavakit.evaluation.metrics import answers as metrics
from llavakit.media import frame_sampling as sampling
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import (
    check_keys,
    fitting,
    greedy,
    loaded,
    picture,
    pope,
    prompt_ids,
    prompt_text,
    published_model,
    text_processor,
    training_sample,
    turns_to_messages,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, component, examples, take
from llavakit.splice.scatter import IGNORE
from llavakit.systems.llava_mini.checkpoint import LlavaMiniLayout, media_of
from llavakit.systems.llava_mini.compressor import Compressor, resized_table
from llavakit.systems.llava_mini.connector import CompressorPrefusion, units_of
from llavakit.systems.llava_mini.views import GridAndWhole, blocks
from llavakit.views.frames import squash_nearest
from llavakit.views.pixels import CLIP_MEAN, CLIP_STD
from llavakit.views.plan import MediaSize, Plan

FRAMES_IN_TRAINING = 8
HEADED = "llava_llama_3_1"


# Arithmetic


def sincos(case: Case) -> Result:
    """Tables by width and side."""
    case.informational("config.pairs")
    return Result(tensors={f"d{d}_g{g}": sincos_table(g, g, d) for d, g in case.inputs["pairs"]})


def interpolation(case: Case) -> Result:
    """Tables by width and side, for so many features."""
    case.informational("config.items")
    tensors = {}
    for width, side, count in case.inputs["items"]:
        length = math.isqrt(count)
        tensors[f"d{width}_g{side}_n{count}"] = resized_table(sincos_table(side, side, width), side, length, length)
    return Result(tensors=tensors)


def compressor(case: Case) -> Result:
    """Compressed features and averaged weights."""
    case.informational("config.num_tokens", "config.batch")
    config, x = case.config, case.tensors["x"]
    net = Compressor(config["embed_dim"], config["grid_size"], config["num_heads"], config.get("kv_dim"))
    net = loaded(net, case.weights())
    length = math.isqrt(x.shape[1])
    with torch.no_grad():
        out, weights = net(fitting(x, net), length, length, weights=True)
    return Result(tensors={"out": out, "attn": weights})


# Views


def split_plan(case: Case) -> Result:
    """Boxes of blocks."""
    plans = []
    for width, height, n in case.inputs["items"]:
        facts: dict[str, Any] = {"size": [width, height], "n": n}
        if min(width, height) < n:  # llavakit refuses blocks without pixels, the original's arithmetic gives them
            boxes = blocks(width, height, n)
            plans.append({**facts, "boxes": boxes, "num_views": len(boxes) + 1, "last_is_full_image": True})
            continue
        planner = GridAndWhole(grid=n, view={"type": "square"})
        plan = planner.plan(MediaSize(1, height, width))
        facts |= {"boxes": planner.boxes(width, height), "num_views": len(plan.views)}
        plans.append(facts | {"last_is_full_image": plan.views[-1].role == "whole"})
    return Result(json={"plans": plans})


def pixel_values(case: Case) -> Result:
    """Views of an image."""
    case.informational("config.resample", "config.order")
    config = case.config
    view = {
        "type": "pad" if config.get("image_aspect_ratio") == "pad" else "square",
        "size": config["shortest_edge"],
        "crop": config.get("crop") or config["shortest_edge"],
        "image_mean": config.get("mean") or CLIP_MEAN,
        "image_std": config.get("std") or CLIP_STD,
    }
    image = picture(case.tensors["image"]).convert("RGB")
    n = config.get("n") or 1
    views = {"type": "grid_and_whole", "grid": n, "view": view} if n > 1 else view
    processor = view_processor({"image": {"views": views}}, {"image_size": view["crop"], "patch_size": view["crop"]})
    return Result(tensors={"pixel_values": torch.stack(views_of(processor, "image", image))})


def frame_sampling(case: Case) -> Result:
    """Numbers of frames: uniform, one a second, eight."""
    inputs = case.inputs
    clips = [(total, fps) for total, fps in inputs.get("fps_items") or []]

    def row(total: int, fps: float, indices: list[int]) -> dict[str, Any]:
        return {"total": total, "fps": fps, "frames": len(indices), "indices": indices}

    return Result(
        json={
            "uniform": [
                {"total": total, "desired": desired, "indices": sampling.midpoints(total, desired)}
                for total, desired in inputs.get("items") or []
            ],
            "inference_1fps": [row(*clip, sampling.midpoints_per_second(*clip)) for clip in clips],
            "training_8": [row(*clip, sampling.midpoints(clip[0], FRAMES_IN_TRAINING)) for clip in clips],
        }
    )


def frame_resize(case: Case) -> Result:
    """Which source row and column every output pixel comes from, modulo 256."""
    side = case.config["target"][0]
    maps = []
    for width, height in case.inputs["sizes"]:
        rows, cols = np.mgrid[:height, :width]
        frame = np.stack([rows % 256, cols % 256, rows * 0], axis=-1).astype(np.uint8)
        out = np.asarray(squash_nearest(Image.fromarray(frame), side))
        maps.append({"size": [width, height], "rows": out[:, 0, 0].tolist(), "cols": out[0, :, 1].tolist()})
    return Result(json={"maps": maps})


# Text


def _tokenizer(inputs: Mapping[str, Any]) -> Any:
    special = take(inputs.get("special_tokens") or {})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(take(inputs["tokenizer_json"]))),
        bos_token=special.get("bos", "<|begin_of_text|>"),
        eos_token=special.get("eos", "<|eot_id|>"),
    )


def prompt_strings(case: Case) -> Iterator[Example]:
    """Prompts and their ids."""
    case.informational("config.chat_template", "inputs.chat_template")
    inputs = case.inputs
    tokenizer = _tokenizer(inputs)
    token = case.config.get("image_token_index", PLACEHOLDER)

    def prompt(dialogue: Mapping[str, Any]) -> dict[str, Any]:
        texts = dialogue["messages"]
        opened = texts[-1] is None
        messages = turns_to_messages((n % 2, text or "") for n, text in enumerate(texts[:-1] if opened else texts))
        # the tokenizer's own template ends every conversation with the assistant's header
        options = {"placement": "keep", "add_generation_prompt": opened or dialogue["template"] == HEADED}
        text = prompt_text(dialogue["template"], messages, **options)
        if opened:
            ids = prompt_ids(text_processor(tokenizer, dialogue["template"]), messages, **options)
        else:  # the whole of a conversation is no prompt; training drops a begin token that the original's string keeps
            ids = tokenize(text, tokenizer)[0]
        ids = [token if number == PLACEHOLDER else number for number in ids]
        return {**take(dialogue), "prompt": text, "input_ids": ids}

    yield from examples(prompt, inputs["conversations"], "prompts")


def supervision_labels(case: Case) -> Iterator[Example]:
    """Ids and labels of training samples, and the turns as the loader rewrites them."""
    case.informational("config.chat_template", "inputs.chat_template")
    inputs, ignore = case.inputs, case.config.get("ignore_index", IGNORE)
    tokenizer = _tokenizer(inputs)

    def sample(turns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        turns = [turn | {"value": turn["value"].replace("<video>", "<image>")} for turn in turns]
        images = sum(turn["value"].count("<image>") for turn in turns)
        messages = from_llava({"conversations": turns} | ({"image": ["-"] * images} if images else {}))
        messages = media_first(messages, collapse=True)
        encoded = training_sample(text_processor(tokenizer, case.config["version"]), messages)
        return {
            "normalised": to_llava(messages)["conversations"],
            "input_ids": encoded["input_ids"],
            "labels": [ignore if label == IGNORE else label for label in encoded["labels"]],
            "warning": "",  # what the original prints when its two ways of counting tokens disagree
        }

    yield from examples(sample, inputs["samples"], "samples")


# Evaluation


@component(echoes=["first_char_as_answer.*.res", "first_char_as_answer.*.n"])
def multiple_choice(case: Case) -> Result:
    """MVBench, MLVU and EgoSchema: checks of answers, questions."""
    inputs, letters = case.inputs, processors.LETTERS
    five = letters[:5]
    return Result(
        json={
            "check_ans": [
                {"pred": pred, "gt": gt, "correct": metrics.bracket_choice_match(pred, gt)}
                for pred, gt in inputs.get("pairs") or []
            ],
            "first_char_as_answer": [
                row | {"letter": processors.first_letter(row["res"], letters[: row["n"]], "A")}
                for row in (
                    {"res": row["res"], "n": row["n"]} for row in case.wanted.json.get("first_char_as_answer") or []
                )
            ],
            "egoschema_first_char": [
                {"res": text, "index": -1 if letter is None else five.index(letter)}
                for text in inputs.get("ego") or []
                for letter in [processors.first_letter(text, five)]
            ],
            "qa_template": [
                dict(
                    zip(
                        ("question", "answer"),
                        processors.bracket_question(row["question"], row["candidates"], row["answer"]),
                        strict=True,
                    )
                )
                for row in inputs.get("qa") or []
            ],
        }
    )


def video_judge(case: Case) -> Result:
    """Accuracy and mean score of judged answers."""
    found = metrics.judged_answers(case.inputs["judgements"])
    names = {"Yes count": "yes", "No count": "no", "Accuracy": "accuracy", "Average score": "score"}
    return Result(json={name: float(found[key]) for name, key in names.items()})


def pope_metrics(case: Case) -> Result:
    """POPE's counts and rates."""
    texts = case.inputs["texts"]
    answers = [processors.pope_answer(text) for text in texts]
    return Result(json={"answers": answers, **pope(texts, case.inputs["labels"])})


# The network


class Batch:
    """A case's batch: one image or video per row.

    Args:
        images: [rows, views, 3, height, width] or [rows, frames, views, 3, height, width].
    """

    def __init__(self, case: Case) -> None:
        inputs = case.tensors
        images = inputs["images"]
        self.is_video = images.dim() == 6
        frames = images if self.is_video else images.unsqueeze(1)
        rows, self.frames, self.views = frames.shape[:3]
        side = images.shape[-1] * max(math.isqrt(self.views - 1), 1)
        size = MediaSize(self.frames, side, side)
        self.original_ids, self.attention_mask = inputs["input_ids"], inputs.get("attention_mask")
        self.token = token = case.config.get("image_token_index", PLACEHOLDER)
        blank = [row for row, ids in enumerate(self.original_ids) if token not in ids.tolist()]
        if any(images[row].any() for row in blank):
            raise UserError("inputs.images: the picture of a prompt without a placeholder must be all zeros")
        self.model = model_of(case, self.views, blank=bool(blank))
        llm = case.config["llm"]
        self.batch = ClassicBatch(
            self.model,
            self.original_ids,
            {token: [Entry("video" if self.is_video else "image", size, list(own.flatten(0, 1))) for own in frames]},
            attention_mask=self.attention_mask,
            labels=inputs.get("labels"),
            max_length=llm.get("tokenizer_model_max_length"),
            padding_side=llm.get("tokenizer_padding_side") or "right",
        )
        self.all_media = {
            "pixel_values": frames.flatten(0, 2),
            "visual_sizes": torch.tensor([size] * rows),
            "visual_modalities": torch.full((rows,), MODALITIES.index("video" if self.is_video else "image")),
        }

    @property
    def connector(self) -> CompressorPrefusion:
        return self.model.model.multi_modal_projector

    def calls(self) -> Result:
        """What the original's fusion routine gave in every call: one per batch of images, or per frame.

        The batch is embedded as in training, where every unit goes through the blocks at once; hooks on the connector
        and its parts look on.
        """
        units: list[tuple[int, int]] = []
        features: list[Tensor] = []
        compressed: list[tuple[Tensor, Tensor]] = []
        fused: list[tuple[Tensor, Tensor]] = []

        def on_batch(_: nn.Module, arguments: tuple[Features, Sequence[Plan], Prompt]) -> None:
            given, plans, prompt = arguments
            for unit in units_of(given, plans):
                row, _segment = prompt.media_segments[prompt.media[unit.item]]
                units.append((row, sum(known == row for known, _ in units)))
                views = given.part(unit.first, unit.first + unit.shape.views)
                features.append(views.view(unit.shape.views, -1, views.shape[-1]))

        def on_compressor(module: nn.Module, arguments: tuple[Any, ...], out: tuple[Tensor, Any]) -> None:
            compressed.extend(zip(out[0], module.forward(*arguments, weights=True)[1], strict=True))

        def on_blocks(_: nn.Module, arguments: tuple[Tensor, ...], out: tuple[Tensor, Tensor]) -> None:
            _, text, visible = arguments
            fused.extend(zip(out[0], torch.where(visible.unsqueeze(-1), out[1], text), strict=True))

        connector = self.connector
        hooks = [
            connector.register_forward_pre_hook(on_batch),
            connector.compressor.register_forward_hook(on_compressor),
            connector.prefusion.register_forward_hook(on_blocks),
        ]
        try:
            with torch.enable_grad():
                self.batch.embeds()
        finally:
            for hook in hooks:
                hook.remove()
        text = self.model.get_input_embeddings()(self.original_ids.clamp(min=0)).detach()
        real = torch.ones_like(self.original_ids) if self.attention_mask is None else self.attention_mask
        real = real.bool()
        places = real & (self.original_ids != self.token)
        found = {}
        for frame in range(self.frames):
            # a prompt without a placeholder is fused with one blank image, whatever the others' number of frames
            own = [units.index((row, frame if (row, frame) in units else 0)) for row in range(len(text))]
            texts = text.clone()
            for row, unit in enumerate(own):
                texts[row, places[row]] = fused[unit][1][: int(places[row].sum())]
            found |= {
                f"call{frame}.vision_features": torch.cat([features[unit] for unit in own]),
                f"call{frame}.compressor_out": torch.stack([compressed[unit][0] for unit in own]),
                f"call{frame}.compressor_attn": torch.stack([compressed[unit][1] for unit in own]),
                f"call{frame}.fused_vision": torch.stack([fused[unit][0][-connector.compressed :] for unit in own]),
                f"call{frame}.fused_text": texts,
            }
        # the original fuses padding too, and drops it afterwards
        masks = {f"call{frame}.fused_text": real.unsqueeze(-1) for frame in range(self.frames)}
        return Result(tensors={name: value.detach() for name, value in found.items()}, mask=masks)


def model_of(case: Case, views: int, *, blank: bool) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a published checkpoint.

    Args:
        views: Views of an image or frame: 1, or r x r + 1.
        blank: Whether prompts without a picture are fused with a blank one, as in the published training.
    """
    case.informational("config.compressor.embed_dim")
    llm, vision = case.config["llm"], case.config["vision"]
    heads = (case.config.get("compressor") or {}).get("num_heads", 8)

    def sized(config: LlavakitConfig) -> None:
        media = media_of(vision["image_size"], math.isqrt(max(views - 1, 1)))
        if views == 2:  # a block and the whole, the same pixels twice
            view = {"type": "grid_and_whole", "grid": 1, "always_whole": True, "view": media["image"]["views"]}
            media = {"image": {"views": view}, "video": {"views": {"type": "frames", "frame": view}}}
        config.media = media
        config.connector |= {"compressor_heads": heads, "text_only": "blank" if blank else "raw"}

    return published_model(
        {"model_type": LlavaMiniLayout.model_types[0], "mm_projector_type": "mlp2x_gelu", **llm},
        case.weights(),
        {"model_type": "clip_vision_model", **check_keys(vision, CLIPVisionConfig().to_dict(), "config.vision")},
        change=sized,
    )


@torch.no_grad()
def end_to_end(case: Case) -> Iterator[Example]:
    """Logits and loss of a tiny model, the spliced prompt and the results of every part."""
    own = Batch(case)
    batch = own.batch

    @torch.no_grad()
    def outputs() -> Result:
        out = batch.forward()
        tensors = {
            "inputs_embeds": batch.embeds() * batch.meaningful(),
            "logits": out.logits,
            "attention_mask_after_splice": batch.attention,
            "labels_after_splice": batch.targets,
        }
        if out.loss is not None:
            tensors["loss"] = out.loss.reshape(1)
        return Result(tensors=tensors, mask={"logits": batch.meaningful()})

    names = ("inputs_embeds", "logits", "loss", "attention_mask_after_splice", "labels_after_splice")
    yield Example("outputs", outputs, tensors=names)
    yield Example("calls of the fusion", own.calls, tensors=("call*",))


def greedy_generation(case: Case) -> Iterator[Example]:
    """Greedy tokens and the logits of every step, without stopping."""
    own = Batch(case)
    new, batch = case.config["max_new_tokens"], own.batch.collated()

    @torch.no_grad()
    def scores() -> dict[str, Tensor]:
        own.model.generation_config.eos_token_id = None
        options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        given = {name: batch[name] for name in ("input_ids", "attention_mask", *own.all_media) if name in batch}
        return {"scores": torch.stack(own.model.generate(**given, max_new_tokens=new, **options).logits, dim=1)}

    @torch.no_grad()
    def prefill() -> dict[str, Tensor]:
        return {"prefill_embeds": own.batch.embeds()}

    def sequences() -> dict[str, Tensor]:
        return {"sequences": torch.tensor(greedy(own.model, own.batch.samples, new))}

    yield Example("sequences", sequences, tensors=("sequences",))
    yield Example("scores", scores, tensors=("scores",))
    yield Example("prefill", prefill, tensors=("prefill_embeds",))


ADAPTERS = {
    "2d_sincos_position_table": sincos,
    "position_table_interpolation": interpolation,
    "query_compressor": compressor,
    "sub_image_split": split_plan,
    "image_to_pixel_values": pixel_values,
    "video_frame_sampling": frame_sampling,
    "video_frame_resize": frame_resize,
    "prompt_strings": prompt_strings,
    "supervision_labels": supervision_labels,
    "multiple_choice_metrics": multiple_choice,
    "video_judge_aggregation": video_judge,
    "pope_metrics": pope_metrics,
    "end_to_end": end_to_end,
    "greedy_generation": greedy_generation,
}
