"""Prompts of an export: tokenizer and chat template for transformers' processor, and inputs to compare both with."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch

from llavakit.checkpoints.preprocessor import TOLERANCE, pictures
from llavakit.conversation.encode import chat_template_for
from llavakit.conversation.template import template_for
from llavakit.conversation.tokens import marks_first_word
from llavakit.errors import CheckpointError, UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MediaSpec
from llavakit.views.plan import MediaSize

VLLM_TEMPLATE = "vllm_chat_template.jinja"
REFUSED = "this model cannot be written as 'hf':"


def export_tokenizer(tokenizer: Any, rows: int, specials: Sequence[str] = ()) -> Any:
    """A copy of the tokenizer that pads on the left, as generation in batches needs, with a token to pad with.

    Args:
        rows: Vocabulary of the exported model.
        specials: Further special tokens, added where they are missing.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # the attribute alone is not saved
    for token in specials:
        if token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        if len(tokenizer) < rows:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        else:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def conversations() -> list[list[dict[str, Any]]]:
    """Conversations on which prompts are compared."""
    lying, standing = ({"type": "image", "image": image} for image in pictures())
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    user = lambda *parts: {"role": "user", "content": list(parts)}  # noqa: E731
    assistant = lambda words: {"role": "assistant", "content": [text(words)]}  # noqa: E731
    return [
        [user(lying, text("What is this?"))],
        [user(text("Name it. "), standing), assistant("A nodule."), user(text("Where?"))],
        [user(lying, text("First,"), standing, text("then second."))],
        [{"role": "system", "content": [text("Be brief.")]}, user(text("Hello"))],
    ]


def export_template(made: Any, processor: LlavakitProcessor) -> str:
    """The chat template with which transformers' processor gives the ids that llavakit gives.

    Where the tokenizer puts a begin token in front of every text, the template is written without one: transformers
    then has one begin token in one step, in two, and for prompts written by hand. A template that needs its own is
    written with it.

    Args:
        made: transformers' processor, with the exported tokenizer.

    Raises:
        UserError: If no form of the template does it.
    """
    own = processor.chat_template
    template = template_for(processor.template, processor.tokenizer)
    candidates = [own]
    if template.jinja is None and own == chat_template_for(template, processor.tokenizer):
        candidates.insert(0, chat_template_for(template, processor.tokenizer, begins=False))
    for candidate in candidates:
        if all(_same_ids(made, processor, messages, candidate) for messages in conversations()):
            return candidate
    raise UserError(
        f"{REFUSED} template: {processor.template!r} gives other ids in transformers' "
        "processor; name another with --template"
    )


def vllm_template(tokenizer: Any, template: str) -> str | None:
    """The chat template for vLLM, which adds no begin token to a rendered chat; None if it can use the same.

    Args:
        template: What transformers' processor uses.
    """
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] != [None]
    text = tokenizer.apply_chat_template(conversations()[-1][1:], chat_template=template, tokenize=False)
    if not begins or text.startswith(tokenizer.bos_token):
        return None
    gap = " " if marks_first_word(tokenizer) else ""
    return f"{{{{- bos_token + {json.dumps(gap)} -}}}}\n{template}"


def encoded(processor: LlavakitProcessor, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any] | None:
    """The sample of a conversation; None if the template does not express it."""
    try:
        return processor.encode(messages, add_generation_prompt=True, **options)
    except UserError:
        return None


def _same_ids(made: Any, processor: LlavakitProcessor, messages: list[dict[str, Any]], template: str) -> bool:
    sample = encoded(processor, messages, pixels=False)
    if sample is None:
        return True
    theirs = made.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(theirs["input_ids"][0]) == list(sample["input_ids"])


def made_up(config: LlavakitConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A picture of noise in a prompt of a few ids."""
    spec, size = MediaSpec(config), MediaSize(1, 64, 64)
    count, (view,) = spec.count("image", size), spec.plan("image", size).views
    ids = torch.tensor([[1, 2, *[config.image_token_id] * count, 0, 3]])
    pixels = torch.randn(1, 3, view.height, view.width, generator=torch.Generator().manual_seed(0))
    shared = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return shared | {"visual_sizes": torch.tensor([size])}, shared


def same_inputs(processor: Any, theirs: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs of the rehearsal's conversations from both processors, compared.

    Raises:
        CheckpointError: If pixels or ids differ.
    """
    pairs = []
    for messages in conversations():
        sample = encoded(processor, messages)
        if sample is None:
            continue
        other = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        if other["input_ids"][0].tolist() != list(sample["input_ids"]):
            raise CheckpointError(f"{REFUSED} transformers' processor gives other ids for the same conversation")
        mine = {"input_ids": other["input_ids"], "attention_mask": torch.ones_like(other["input_ids"])}
        if sample["pixel_values"]:
            views = torch.stack(sample["pixel_values"])
            if views.shape != other["pixel_values"].shape or (views - other["pixel_values"]).abs().max() > TOLERANCE:
                raise CheckpointError(f"{REFUSED} transformers' processor gives other pixels for the same picture")
            mine |= {
                "pixel_values": views,
                "visual_sizes": torch.tensor(sample["visual_sizes"]),
                "visual_modalities": torch.tensor(sample["visual_modalities"]),
            }
        pairs.append((mine, dict(other)))
    return pairs
