"""MG-LLaVA's golden components of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llavakit.conversation.messages import from_llava
from llavakit.proof.entries import original_ids, text_processor, with_blank_media
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.systems.mg_llava.checkpoint import TEMPLATES
from llavakit.training.dataset import StageCollator

SPECIAL = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>")
SPECIAL += ("<|end|>", "<|im_start|>", "<|im_end|>", "<|system|>")
FIRST_SPECIAL = 300  # id of the first of them in the cases' tokenizer


def toy_tokenizer() -> Any:
    """The cases' tokenizer: bytes and the special tokens of all four templates, no begin token by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary |= {token: FIRST_SPECIAL + number for number, token in enumerate(SPECIAL)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
    )


def dialog_encoding(case: Case) -> Iterator[Example]:
    """Ids and labels of conversations, cut at the right."""
    tokenizer = toy_tokenizer()

    def run(sample: Mapping[str, Any]) -> Result:
        sample = dict(sample)
        images = sum(turn["value"].count("<image>") for turn in sample["conversations"])
        record = {"conversations": sample["conversations"], **({"image": ["-"] * images} if images else {})}
        processor = text_processor(tokenizer, TEMPLATES[sample["template"]])
        encoded = processor.encode(with_blank_media(from_llava(record)))
        batch = StageCollator(0, sample["max_length"])([encoded])
        ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
        ignored = {"samples.*.turns": "strings before they are tokenised; the ids show them"}
        return Result(json={"input_ids": original_ids(processor, ids), "labels": labels}, ignored=ignored)

    yield from examples(run, case.inputs["samples"], "samples")


ADAPTERS = {"dialog_encoding": dialog_encoding}
