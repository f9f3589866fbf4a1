"""MedM-VL's golden components of text: templates and the collator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llavakit.conversation.messages import from_llava
from llavakit.data.collate import Collator
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MODALITIES
from llavakit.proof.entries import (
    TINY,
    one_token_media,
    text_processor,
    toy_tokenizer,
    training_sample,
    with_blank_media,
)
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.splice.scatter import IGNORE
from llavakit.systems.medm_vl.checkpoint import TEMPLATES

LITERALS = {"image": "<image>", "volume": "<image3d>"}
WRITTEN = {"pretrain": "<image>", "pretrain_image3d": "<image3d>"}


def media_processor(tokenizer: Any, template: str) -> LlavakitProcessor:
    """A processor under which every image and every volume is one token."""
    config = one_token_media()
    config.media["volume"] = {"views": {"type": "volume_slices", "size": 2, "slices": 1}}
    config.vision_config.update(TINY)
    return text_processor(tokenizer, template, config)


def conversation(case: Case) -> Iterator[Example]:
    """Prompt, ids and labels of every dialogue."""
    case.informational("inputs.*pad_token_id")  # no row is padded
    names = {"image": "image_token_id", "volume": "image3d_token_id"}
    placeholders = {kind: case.config.get(name, {"image": -200, "volume": -201}[kind]) for kind, name in names.items()}
    ignore = case.config.get("ignore_index", IGNORE)

    def written(dialogue: Mapping[str, Any]) -> dict[str, Any]:
        processor = media_processor(
            toy_tokenizer(dialogue["eos_string"], dialogue["adds_bos"]), TEMPLATES[dialogue["template"]]
        )
        turns = take(dialogue["messages"])
        if dialogue["template"] in WRITTEN:  # the original leaves the question out and writes the mark itself
            turns = [
                turn | {"value": WRITTEN[dialogue["template"]]} if turn["from"] == "human" else turn for turn in turns
            ]
        media = {}
        for literal, key in (("<image>", "image"), ("<image3d>", "image3d")):
            count = sum(turn["value"].count(literal) for turn in turns)
            media |= {key: ["-"] * count} if count else {}
        messages = from_llava({"conversations": turns, **media})
        asked = dialogue["mode"] == "eval"
        if asked:
            sample = processor.encode(with_blank_media(messages), add_generation_prompt=True)
        else:
            sample = training_sample(processor, messages, labels=None if dialogue["template"] in WRITTEN else "rounds")
        kinds = iter([MODALITIES[kind].replace("multi_", "") for kind in sample["visual_modalities"]])
        ids, prompt, text = [], "", []
        for token in sample["input_ids"]:
            if token in (-200, processor.image_token_id):
                kind = next(kinds)
                prompt += processor.tokenizer.decode(text) + LITERALS[kind]
                text = []
                ids.append(placeholders[kind])
            else:
                ids.append(token)
                text += [token] if token != processor.tokenizer.bos_token_id else []
        return {
            "prompt": prompt + processor.tokenizer.decode(text),
            "input_ids": ids,
            "labels": None if asked else [ignore if label == IGNORE else label for label in sample["labels"]],
            "mismatch_warning": sample["fully_masked"],
        }

    yield from examples(written, case.inputs)


def batch_collator(case: Case) -> Result:
    """Padded batches; the original pads labels with the padding id, llavakit with -100."""
    config = case.config
    pad, limit = config["pad_token_id"], config.get("model_max_length")
    # a token that equals the padding id is masked wherever it stands, unless it is the end of the text as well
    batch = Collator(pad, limit, mask_by_pad_id=pad != config.get("eos_token_id"))(take(case.inputs))
    lengths = torch.tensor([len(sample["input_ids"][:limit]) for sample in case.inputs])
    real = torch.arange(batch["labels"].shape[1]) < lengths[:, None]
    labels = torch.where(real, batch["labels"], pad)
    return Result(
        json={
            "input_ids": batch["input_ids"].tolist(),
            "labels": labels.tolist(),
            "attention_mask": batch["attention_mask"].long().tolist(),
        }
    )
