"""A world of coloured squares, its tokenizer, and a tiny recipe: what the tests of training learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
TEXT = "what colour is the square a yes no it here there left right describe this picture ? . : ,"
WORDS = TEXT.split()
SYSTEM = "A chat between curious user and an artificial intelligence assistant gives helpful polite answers to"
SIZE = 24


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with Llama's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *WORDS, *COLOURS, *SYSTEM.split(), "USER", "ASSISTANT"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_records(folder: Path, count: int = 24, seed: int = 0) -> None:
    """Squares with a question each; every fifth record is text alone. Questions differ in length."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for number in range(count):
        colour = list(COLOURS)[rng.integers(4)]
        padding = " ".join(rng.choice(WORDS, int(rng.integers(0, 12))))
        answer = {"from": "gpt", "value": f"the square is {colour}"}
        if number % 5 == 4:
            question = {"from": "human", "value": f"is the square {colour} ? {padding}"}
            records.append({"id": str(number), "conversations": [question, answer]})
            continue
        pixels = np.full((SIZE, SIZE, 3), COLOURS[colour]) + rng.integers(0, 12, (SIZE, SIZE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        question = {"from": "human", "value": f"<image>\nwhat colour is the square ? {padding}"}
        records.append({"id": str(number), "image": f"{number}.png", "conversations": [question, answer]})
    (folder / "records.json").write_text(json.dumps(records))


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two stages of a tiny LLaVA-1.5 on what the two functions above wrote into `folder`."""
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256}
    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": SIZE, "patch_size": 8, "projection_dim": 16}
    align = {"name": "align", "train": ["multi_modal_projector"], "learning_rate": 1e-2, "max_steps": 4}
    align |= {
        "template": "plain",
        "media": {"image": {"views": {"type": "square", "size": SIZE}}},
        "batch_size": 4,
        "log_steps": 1,
    }
    tune = {"name": "tune", "train": ["multi_modal_projector", "language_model", "lm_head"], "learning_rate": 3e-3}
    tune |= {"max_steps": 6, "batch_size": 4, "log_steps": 1}
    parts = {"text_config": text, "vision_config": vision, "tokenizer": str(folder / "tokenizer")}
    parts["media"] = {"image": {"views": {"type": "pad", "size": SIZE}}}
    source = {"name": "squares", "path": str(folder / "records.json"), "images": str(folder / "images")}
    base = {"system": "llava-1.5", "parts": parts, "data": [source], "stages": [align, tune]}
    return base | {"output": str(folder / "run")} | changes


def write_world(folder: Path) -> Path:
    """Everything; returns the folder."""
    write_tokenizer(folder / "tokenizer")
    write_records(folder)
    return folder
