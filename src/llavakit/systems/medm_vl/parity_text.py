"""MedM-VL's golden components of text: templates and the collator."""

from __future__ import annotations

from typing import Any

import torch

from llavakit.conversation.encode import encode
from llavakit.conversation.messages import from_llava
from llavakit.data.collate import Collator
from llavakit.proof.golden import Case, Result
from llavakit.systems.medm_vl.checkpoint import TEMPLATES

IDS = {"image": -200, "volume": -201}
LITERALS = {"image": "<image>", "volume": "<image3d>"}


class ByteTokenizer:
    """The cases' tokenizer: 1 begins a sequence, 2 is the end string, 3 + b is the byte b."""

    is_fast = True
    bos_token_id, eos_token_id = 1, 2

    def __init__(self, end: str, adds_bos: bool) -> None:
        self.end, self.adds_bos = end, adds_bos

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        ids, offsets = ([1], [(0, 0)]) if self.adds_bos else ([], [])
        position = 0
        while position < len(text):
            if text.startswith(self.end, position):
                ids.append(2)
                offsets.append((position, position + len(self.end)))
                position += len(self.end)
                continue
            for byte in text[position].encode():
                ids.append(3 + byte)
                offsets.append((position, position + 1))
            position += 1
        return {"input_ids": ids, "offset_mapping": offsets}


def conversation(case: Case) -> Result:
    """Prompt, ids and labels of every dialogue."""
    case.informational("config.*", "inputs.*")
    results = []
    for dialogue in case.inputs:
        tokenizer = ByteTokenizer(dialogue["eos_string"], dialogue["adds_bos"])
        turns = dialogue["messages"]
        media = {}
        for literal, key in (("<image>", "image"), ("<image3d>", "image3d")):
            count = sum(turn["value"].count(literal) for turn in turns)
            media |= {key: ["medium"] * count} if count else {}
        messages = from_llava({"conversations": turns, **media})
        asked = dialogue["mode"] == "eval"
        encoded = encode(
            messages,
            TEMPLATES[dialogue["template"]],
            tokenizer,
            add_generation_prompt=asked,
        )
        kinds = iter([part["type"] for part in encoded.media])
        ids = [IDS[next(kinds)] if token == -200 else token for token in encoded.ids]
        prompt = encoded.text
        for part in encoded.media:
            prompt = prompt.replace("<image>", "\0" if part["type"] == "image" else LITERALS["volume"], 1)
        results.append(
            {
                "prompt": prompt.replace("\0", LITERALS["image"]),
                "input_ids": ids,
                "labels": None if asked else encoded.labels,
                "mismatch_warning": encoded.fully_masked,
            }
        )
    return Result(json=results)


def batch_collator(case: Case) -> Result:
    """Padded batches; the original pads labels with the padding id, llavakit with -100."""
    config = case.config
    pad, limit = config["pad_token_id"], config["model_max_length"]
    # a token that equals the padding id is masked wherever it stands, unless it is the end of the text as well
    batch = Collator(pad, limit, mask_by_pad_id=pad != config["eos_token_id"])(case.inputs)
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
