"""Malformed conversations: messages, LLaVA records, label options, and what templates make of those that are read."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from harness import Faults
from mutations import ODD, twist
from transformers import PreTrainedTokenizerFast

from llavakit.conversation.encode import encode, escape_special_tokens
from llavakit.conversation.messages import from_llava, normalise, to_llava

GOLDEN = Path(__file__).parents[1] / "golden" / "llava-1.5" / "tokenizer-sp" / "tokenizer_nonlegacy.json"
TEMPLATES = ("v1", "llava_llama_2", "mpt", "qwen_1_5", "llama_3", "gemma_instruct", "plain", "llava_v0")
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Left "},
            {"type": "image", "image": "a.png"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "; right?"},
        ],
    },
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Sure?"},
]
RECORD = {
    "image": ["a.png", "b.png"],
    "video": "c.mp4",
    "conversations": [
        {"from": "human", "value": "First <image>, then <image> and <video>"},
        {"from": "gpt", "value": "Yes."},
    ],
}


def tokenizer_of_goldens() -> Any:
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN), **marks)


def test_messages_and_records(faults: Faults) -> None:
    tokenizer = tokenizer_of_goldens()
    for number in range(400):
        rng = random.Random(number)
        messages, record = twist(MESSAGES, rng), twist(RECORD, rng)
        faults.attempt("messages", f"seed {number}", partial(_read, messages, tokenizer, rng))
        faults.attempt("LLaVA records", f"seed {number}", partial(_read_record, record))


def _read(messages: Any, tokenizer: Any, rng: random.Random) -> None:
    messages = normalise(escape_special_tokens(messages, tokenizer))
    assert normalise(messages) == messages
    encode(messages, rng.choice(TEMPLATES), tokenizer, **rng.choice(({}, {"add_generation_prompt": True})))


def _read_record(record: Any) -> None:
    to_llava(from_llava(record))


def test_options_of_labels(faults: Faults) -> None:
    tokenizer = tokenizer_of_goldens()
    options = {"type": "spans", "ignore": [["<p>", "</p>"]], "weights": {"yes": 5}}
    for number in range(200):
        rng = random.Random(number)
        labels = rng.choice(ODD) if rng.random() < 0.2 else twist(options, rng)
        faults.attempt("label options", f"seed {number}", partial(encode, MESSAGES[:3], "v1", tokenizer, labels=labels))
