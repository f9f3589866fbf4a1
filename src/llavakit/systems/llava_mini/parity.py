"""LLaVA-Mini's golden components."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.general import sincos_table
from llavakit.conversation.encode import encode, tokenize
from llavakit.conversation.messages import from_llava, media_first, split_literals, to_llava
from llavakit.conversation.template import get_template
from llavakit.evaluation import processors
from llavakit.evaluation.metrics import answers as metrics
from llavakit.media import frame_sampling as sampling
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.model.visuals import Visuals
from llavakit.proof.golden import Case, Result, component
from llavakit.splice.layout import Run
from llavakit.splice.scatter import IGNORE, expand, scatter
from llavakit.systems.llava_mini.checkpoint import Classic, media_of
from llavakit.systems.llava_mini.compressor import Compressor, resized_table
from llavakit.systems.llava_mini.connector import CompressorPrefusion, units_of
from llavakit.systems.llava_mini.views import GridAndWhole, blocks
from llavakit.views.frames import squash_nearest
from llavakit.views.plan import MediaSize

PLACEHOLDER = -200
FRAMES_IN_TRAINING = 8


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
    net.load_state_dict(case.weights())
    length = math.isqrt(x.shape[1])
    with torch.no_grad():
        out, weights = net.eval()(x, length, length, weights=True)
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
        "type": "pad" if config["image_aspect_ratio"] == "pad" else "square",
        "size": config["shortest_edge"],
        "crop": config["crop"],
        "image_mean": config["mean"],
        "image_std": config["std"],
    }
    planner = GridAndWhole(grid=config["n"], view=view)
    image = Image.fromarray(case.tensors["image"].numpy())
    views = planner.cut(image, planner.plan(MediaSize(1, image.height, image.width)))
    return Result(tensors={"pixel_values": torch.from_numpy(np.stack(views))})


def frame_sampling(case: Case) -> Result:
    """Numbers of frames: uniform, one a second, eight."""
    inputs = case.inputs
    clips = [(total, fps) for total, fps in inputs["fps_items"]]

    def row(total: int, fps: float, indices: list[int]) -> dict[str, Any]:
        return {"total": total, "fps": fps, "frames": len(indices), "indices": indices}

    return Result(
        json={
            "uniform": [
                {"total": total, "desired": desired, "indices": sampling.midpoints(total, desired)}
                for total, desired in inputs["items"]
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
    special = inputs.get("special_tokens", {})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inputs["tokenizer_json"])),
        bos_token=special.get("bos", "<|begin_of_text|>"),
        eos_token=special.get("eos", "<|eot_id|>"),
    )


def prompt_strings(case: Case) -> Result:
    """Prompts and their ids."""
    case.informational("config.*", "inputs.chat_template", "inputs.special_tokens.*")
    inputs = case.inputs
    tokenizer = _tokenizer(inputs)
    prompts = []
    for dialogue in inputs["conversations"]:
        texts = dialogue["messages"]
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": split_literals(text)}
            for number, text in enumerate(texts)
            if text is not None
        ]
        is_open = texts[-1] is None
        template = get_template(dialogue["template"])
        text, _ = template.render(messages, add_generation_prompt=is_open, placement="keep")
        prompts.append({**dialogue, "prompt": text, "input_ids": tokenize(text, tokenizer)[0]})
    return Result(json={"prompts": prompts})


def supervision_labels(case: Case) -> Result:
    """Ids and labels of training samples, and the turns as the loader rewrites them."""
    case.informational("config.chat_template", "inputs.chat_template")
    inputs = case.inputs
    tokenizer = _tokenizer(inputs)
    samples = []
    for turns in inputs["samples"]:
        turns = [turn | {"value": turn["value"].replace("<video>", "<image>")} for turn in turns]
        images = sum(turn["value"].count("<image>") for turn in turns)
        messages = from_llava({"conversations": turns} | ({"image": ["-"] * images} if images else {}))
        encoded = encode(messages, case.config["version"], tokenizer)
        samples.append(
            {
                "normalised": to_llava(media_first(messages, collapse=True))["conversations"],
                "input_ids": encoded.ids,
                "labels": [label if label >= 0 else case.config["ignore_index"] for label in encoded.labels],
                "warning": "",  # what the original prints when its two ways of counting tokens disagree
            }
        )
    return Result(json={"samples": samples})


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
                for pred, gt in inputs["pairs"]
            ],
            "first_char_as_answer": [
                row | {"letter": processors.first_letter(row["res"], letters[: row["n"]], "A")}
                for row in ({"res": row["res"], "n": row["n"]} for row in case.wanted.json["first_char_as_answer"])
            ],
            "egoschema_first_char": [
                {"res": text, "index": -1 if letter is None else five.index(letter)}
                for text in inputs["ego"]
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
                for row in inputs["qa"]
            ],
        }
    )


def video_judge(case: Case) -> Result:
    """Accuracy and mean score of judged answers."""
    found = metrics.judged_answers(case.inputs["judgements"])
    names = {"Yes count": "yes", "No count": "no", "Accuracy": "accuracy", "Average score": "score"}
    return Result(json={name: float(found[key]) for name, key in names.items()})


def pope(case: Case) -> Result:
    """POPE's counts and rates."""
    inputs = case.inputs
    answers = [processors.pope_answer(text) for text in inputs["texts"]]
    found = metrics.binary_metrics(answers, inputs["labels"])
    names = {
        **{name: name.lower() for name in ("TP", "FP", "TN", "FN")},
        "Accuracy": "accuracy",
        "Precision": "precision",
        "Recall": "recall",
        "F1 score": "f1",
        "Yes ratio": "yes_ratio",
    }
    return Result(json={"answers": answers} | {name: found[key] for name, key in names.items()})


# The network


class Batch:
    """A case's batch in llavakit's form: one image or video per row.

    Args:
        images: [rows, views, 3, height, width] or [rows, frames, views, 3, height, width].
    """

    def __init__(self, case: Case) -> None:
        inputs = case.tensors
        images = inputs["images"]
        self.is_video = images.dim() == 6
        frames = images if self.is_video else images.unsqueeze(1)
        rows, self.frames, self.views = frames.shape[:3]
        self.model = build(case, self.views)
        side = images.shape[-1] * max(math.isqrt(self.views - 1), 1)
        self.media = {
            "pixel_values": frames.flatten(0, 2),
            "visual_sizes": torch.tensor([MediaSize(self.frames, side, side)] * rows),
            "visual_modalities": torch.full((rows,), MODALITIES.index("video" if self.is_video else "image")),
        }
        self.original_ids = inputs["input_ids"]
        self.original_labels = inputs.get("labels")
        keep = inputs.get("attention_mask", torch.ones_like(self.original_ids)).bool()
        token, count = self.model.config.image_token_id, self.frames * self.connector.compressed
        ids, labels = [], []
        for row in range(rows):
            own = self.original_ids[row][keep[row]].tolist()
            spliced = expand(
                own,
                None if self.original_labels is None else self.original_labels[row][keep[row]].tolist(),
                [[Run(visual=count)]] * own.count(PLACEHOLDER),
                placeholder=PLACEHOLDER,
                image_token_id=token,
            )
            ids.append(torch.tensor(spliced.ids))
            labels.append(torch.tensor(spliced.labels))
        pad = torch.nn.utils.rnn.pad_sequence
        self.input_ids = pad(ids, batch_first=True)
        self.labels = pad(labels, batch_first=True, padding_value=IGNORE)
        self.attention_mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        self.has_place = [bool((row == token).any()) for row in ids]

    @property
    def connector(self) -> CompressorPrefusion:
        return self.model.model.multi_modal_projector

    @property
    def supervised(self) -> Tensor | None:
        """Labels, if the case has any."""
        return None if self.original_labels is None else self.labels

    def embeds(self, visuals: Visuals) -> Tensor:
        """The spliced prompt; a row without a placeholder is fused with its image all the same."""
        core = self.model.model
        prompt = core.read_prompt(self.input_ids, attention_mask=self.attention_mask, labels=self.supervised)
        prompt.media_segments = [(row, 0) for row in range(len(self.input_ids))]
        vectors, embeds = core.connect(visuals, prompt)
        placed = [vector for vector, has_place in zip(vectors, self.has_place, strict=True) if has_place]
        flat = torch.cat([embeds[0, :0], *placed])
        return scatter(embeds, prompt.visual, flat) * self.attention_mask.unsqueeze(-1)

    def calls(self, visuals: Visuals) -> dict[str, Tensor]:
        """What the original's fusion routine gave in every call: one per batch of images, or per frame."""
        features = visuals.features["multi_modal_projector"][0]
        shape = units_of(features, visuals.plans)[0].shape
        values = features.values.unflatten(0, (len(self.input_ids), self.frames, self.views, -1))
        text = self.model.get_input_embeddings()(self.original_ids.clamp(min=0))
        visible = self.original_ids > 0
        if self.original_labels is not None:
            visible &= self.original_labels == IGNORE
        found = {}
        for number, views in enumerate(values.unbind(1)):
            compressed, weights = self.connector.compress(views, shape, weights=True)
            vision, fused = self.connector.prefusion(self.connector.vision_tokens(views, shape), text, visible)
            found |= {
                f"call{number}.vision_features": views.flatten(0, 1),
                f"call{number}.compressor_out": compressed,
                f"call{number}.compressor_attn": weights,
                f"call{number}.fused_vision": vision[:, -self.connector.compressed :],
                f"call{number}.fused_text": torch.where(visible.unsqueeze(-1), fused, text),
            }
        return found


def build(case: Case, views: int) -> LlavakitForConditionalGeneration:
    """The case's tiny model with the original's weights.

    Args:
        views: Views of an image or frame: 1, or r x r + 1.
    """
    llm, vision = case.config["llm"], case.config["vision"]
    layout = Classic()
    media = media_of(vision["image_size"], math.isqrt(max(views - 1, 1)))
    if views == 2:  # a block and the whole, the same pixels twice
        view = {"type": "grid_and_whole", "grid": 1, "always_whole": True, "view": media["image"]["views"]}
        media = {"image": {"views": view}, "video": {"views": {"type": "frames", "frame": view}}}
    heads = case.config.get("compressor", {}).get("num_heads", 8)
    select = llm.get("mm_vision_select_feature", "patch")
    config = LlavakitConfig(
        text_config=layout.text_config({**llm, "model_type": layout.model_types[0]}),
        vision_config={"model_type": "clip_vision_model", **vision},
        connector={**layout.connector(llm), "compressor_heads": heads},
        media=media,
        vision_feature_layer=llm.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if select == "cls_patch" else "default",
        image_token_id=llm["vocab_size"],
    )
    model = LlavakitForConditionalGeneration(config).eval()
    rename = rename_with(layout.renames_in())
    missing, extra = model.load_state_dict({rename(name): t for name, t in case.weights().items()}, strict=False)
    if missing or extra:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unknown {extra[:3]}")
    return model


@torch.no_grad()
def end_to_end(case: Case) -> Result:
    """Logits and loss of a tiny model, the spliced prompt and the results of every part."""
    case.informational("config.compressor.embed_dim")
    batch = Batch(case)
    visuals = batch.model.model.encode_media(**batch.media)
    # rows are cut after media were laid out, perhaps in the middle of one
    limit = case.config["llm"].get("tokenizer_model_max_length")
    embeds, mask, labels = (x[:, :limit] for x in (batch.embeds(visuals), batch.attention_mask, batch.labels))
    supervised = None if batch.supervised is None else labels
    out = batch.model(inputs_embeds=embeds, attention_mask=mask, labels=supervised)
    tensors = {
        "inputs_embeds": embeds,
        "logits": out.logits,
        "attention_mask_after_splice": mask,
        "labels_after_splice": labels,
        **batch.calls(visuals),
    }
    if out.loss is not None:
        tensors["loss"] = out.loss.reshape(1)
    return Result(tensors=tensors, mask={"logits": mask.bool().unsqueeze(-1)})


@torch.no_grad()
def greedy_generation(case: Case) -> Result:
    """Greedy tokens and the logits of every step, without stopping."""
    case.informational("config.compressor.embed_dim")
    batch = Batch(case)
    batch.model.generation_config.eos_token_id = None
    prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.media}
    out = batch.model.generate(
        **prompt,
        max_new_tokens=case.config["max_new_tokens"],
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    embeds, _, _ = batch.model.model.embed(batch.input_ids, attention_mask=batch.attention_mask, **batch.media)
    return Result(
        tensors={
            "sequences": out.sequences[:, batch.input_ids.shape[1] :],
            "scores": torch.stack(out.logits, dim=1),
            "prefill_embeds": embeds,
        }
    )


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
    "pope_metrics": pope,
    "end_to_end": end_to_end,
    "greedy_generation": greedy_generation,
}
