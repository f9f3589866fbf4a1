"""LLaVA-Med's golden components of text: templates and labels of both generations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import is_media, split_literals
from llavakit.conversation.template import Template, get_template
from llavakit.data.collate import Collator
from llavakit.errors import UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.proof.entries import BLANK, TINY, prompt_text, text_processor, training_sample, turns_to_messages
from llavakit.proof.golden import Case, Example, Result, take
from llavakit.splice.scatter import IGNORE
from llavakit.systems.llava_med import templates
from llavakit.views.plan import MediaSize

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DESCRIBED = ("version", "offset")  # of a `Conversation`; they do not change its text
VERSIONS = {"v0": "llava_med_simple", "v1": "llava_med_vicuna_v1_1"}
FROM = {"human": "user", "gpt": "assistant"}


def conversation(case: Case) -> Iterator[Example]:
    """Prompts of all templates, and of a style that none of them has."""
    case.informational("config.used_by_released_checkpoint", "config.note")
    case.informational(*(f"config.templates.*.{name}" for name in DESCRIBED))
    made = {
        name: templates.conversation_template(name, take(facts)) for name, facts in case.config["templates"].items()
    }
    unused = templates.bracketed("mistral_style", "SYS", "", tagged=False)
    for name in case.wanted.json:
        template = made.get(name, unused if "MISTRAL" in name else None)
        if template is None:
            raise UserError(f"config.templates: {name!r} is missing")
        for key, turns in case.inputs.items():
            yield Example(f"{name}.{key}", partial(prompt, template, take(turns)), f"{name}.{key}")


def prompt(template: Template, turns: Sequence[Sequence[Any]]) -> str:
    """The text of a dialogue; a last turn of the assistant without text is what it is to say."""
    texts = [(role, text or "") for role, text in turns]
    opened = bool(texts) and texts[-1] == (1, "")
    messages = turns_to_messages(texts[:-1] if opened else texts)
    return prompt_text(template, messages, placement="keep", add_generation_prompt=opened)


# Labels


def label_masking(case: Case) -> Iterator[Example | Result]:
    """Ids and labels of training samples, with visual tokens and their marks in place."""
    config = case.config
    added = {name: int(number) for name, number in config["added_token_ids"].items()}
    marks = ([added["<im_start>"]], [added["<im_end>"]]) if config.get("use_im_start_end", True) else None
    media = media_of_tokens(config["image_token_len"], marks)
    limit = config["model_max_length"]
    case.informational("config.versions.*")
    for version in config["versions"]:
        tokenizer = tokenizer_of(case, added)
        processor = text_processor(tokenizer, VERSIONS[version], media)
        compute = partial(labels, processor, added["<im_patch>"], limit, "rounds" if version == "v1" else None)
        for name, turns in case.inputs.items():
            yield Example(f"{version}.{name}", partial(compute, take(turns)), f"{version}.{name}")
    if refused := {version: {} for version in config["versions"] if case.wanted.json[version] == {}}:
        yield Result(json=refused)  # the original takes none of the conversations


def tokenizer_of(case: Case, added: Mapping[str, int]) -> Any:
    """The case's tokenizer with its added tokens.

    Raises:
        UserError: If they do not get the ids of the case.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(case.sibling("tokenizer.json")), pad_token="[PAD]", **SPECIAL
    )
    for name, number in sorted(added.items(), key=lambda entry: entry[1]):
        tokenizer.add_special_tokens({"additional_special_tokens": [name]}, replace_extra_special_tokens=False)
        if (found := tokenizer.convert_tokens_to_ids(name)) != number:
            raise UserError(f"config.added_token_ids.{name}: is {number}, the tokenizer gives it {found}")
    return tokenizer


def media_of_tokens(count: int, marks: tuple[list[int], list[int]] | None) -> LlavakitConfig:
    """A configuration under which every image is `count` visual tokens, between two marks if there are any."""
    image: dict[str, Any] = {"views": tiled_views(count)}
    if marks is not None:
        image["arrange"] = {"type": "wrapped", "before": marks[0], "after": marks[1], "inner": {"type": "flat"}}
    return LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": 8, **TINY},
        vision_config={"model_type": "clip_vision_model", "image_size": 2, "patch_size": 2, **TINY},
        connector={"type": "mlp", "depth": 1},
        media={"image": image, "multi_image": image},
    )


def tiled_views(count: int) -> dict[str, Any]:
    """A planner of `count` views of two pixels: the whole picture and a row of tiles."""
    if count == 1:
        return {"type": "squash", "size": 2}
    return {"type": "anyres", "size": 2, "pinpoints": [[2 * (count - 1), 2]]}


def labels(
    processor: Any, patch: int, limit: int, policy: str | None, turns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One conversation as the stage's collator gives it, visual tokens under their published id."""
    messages = [message_of(turn, get_template(processor.template).training is not None) for turn in turns]
    media = sum(is_media(part) for message in messages for part in message["content"])
    grown = media * (processor.spec.count("image", MediaSize(1, *BLANK.size)) - 1)
    sample = training_sample(processor, messages, placement="keep", labels=policy, max_length=limit - grown)
    row = Collator(processor.tokenizer.pad_token_id, limit)([sample])
    ids = [patch if token == IMAGE_PLACEHOLDER else token for token in row["input_ids"][0].tolist()]
    return {
        "input_ids": ids,
        "labels": [IGNORE if label < 0 else label for label in row["labels"][0].tolist()],
        "mismatch_warning": sample["fully_masked"],
    }


def message_of(turn: Mapping[str, Any], takes_others: bool) -> dict[str, Any]:
    """A turn as a message; where the template takes other speakers, they have the role of tools.

    Raises:
        UserError: If it does not, and the speaker is neither human nor gpt.
    """
    role = FROM.get(turn["from"], "tool" if takes_others else None)
    if role is None:
        raise UserError(f"from: must be human or gpt, not {turn['from']!r}")
    return {"role": role, "content": split_literals(str(turn["value"]))}


ADAPTERS = {
    "conversation_v1_0": conversation,
    "conversation_v1_5": conversation,
    "label_masking_v1_0": label_masking,
}
