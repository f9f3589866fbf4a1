"""What a model folder says about text: its tokenizer, and the ids at which replies end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.files import read_json
from llavakit.conversation.encode import chat_template_for
from llavakit.conversation.template import get_template, template_for
from llavakit.conversation.tokens import stop_token_ids
from llavakit.errors import CheckpointError, quoted
from llavakit.registry import TEMPLATES
from llavakit.system import systems

GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBES = ("A tabby cat's <x> 12,345\n\n  naïve, 猫 と\t- end.", " leading", "ÉCOLE (x)")


def tokenizer_folder(*folders: Path | None) -> Path | None:
    """The first of these folders that holds a tokenizer."""
    return next((f for f in folders if f is not None and any((f / name).is_file() for name in _TOKENIZERS)), None)


def read_tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer in a folder; its ids are those of tokenizer.json.

    transformers picks a class by the decoder's type, and several classes build a tokenizer of their own kind around
    the vocabulary of tokenizer.json, whatever its other sections say. The general class takes the file as it is. Where
    there is a SentencePiece model beside it, transformers' class is kept: the authors' code read that model.

    Args:
        folder: Holds tokenizer.json, tokenizer.model or vocab.json.
        config: The decoder's configuration, for folders that do not name a class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    exact = (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file()
    if exact and (folder / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    if exact and not _agrees(tokenizer, folder / "tokenizer.json"):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _agrees(tokenizer: Any, file: Path) -> bool:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(file))
    return all(
        tokenizer(text, add_special_tokens=False).input_ids == plain.encode(text, add_special_tokens=False).ids
        for text in _PROBES
    )


def read_generation(*folders: Path | None) -> dict[str, Any]:
    """The first generation_config.json of these folders; empty if there is none.

    Raises:
        CheckpointError: If its `eos_token_id` is neither an id nor a list of ids.
    """
    for folder in folders:
        if folder is not None and (folder / GENERATION).is_file():
            found = read_json(folder / GENERATION)
            eos_ids(found, folder / GENERATION)
            return found
    return {}


def eos_ids(generation: Mapping[str, Any], where: Path | str = GENERATION) -> list[int]:
    """The ids at which a reply ends.

    Raises:
        CheckpointError: If they are no ids.
    """
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in ids):
        raise CheckpointError(f"{where}: eos_token_id is {quoted(value)}, it should be an id or a list of ids")
    return list(ids)


def with_ends(generation: Mapping[str, Any] | None, processor: Any) -> dict[str, Any]:
    """The content of generation_config.json with the ids at which the template ends a reply.

    transformers and vLLM read the ends of replies from this file alone. The content stays as it is if the template adds
    no id to the tokenizer's own.

    Args:
        processor: A processor with `template` and `tokenizer`, or None.
    """
    generation = dict(generation or {})
    if processor is None:
        return generation
    tokenizer = processor.tokenizer
    known = eos_ids(generation) or [token for token in (tokenizer.eos_token_id,) if token is not None]
    ends = sorted({*known, *stop_token_ids(template_for(processor.template, tokenizer).stop, tokenizer)})
    return generation | {"eos_token_id": ends} if set(ends) != set(known) else generation


def chat_template_of(folder: Path) -> str | None:
    """The chat template that transformers' processors and tokenizers find in a folder; None if there is none.

    Raises:
        CheckpointError: If a file that should hold one is broken.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{jinja}: is not UTF-8 text") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several templates by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default")
        if isinstance(found, Mapping):
            found = found.get("default")
        if found is not None and not isinstance(found, str):
            raise CheckpointError(f"{path}: chat_template is {quoted(found)}, it should be a Jinja text")
        if found:
            return found
    return None


def has_chat_template(folder: Path) -> bool:
    """Whether a folder brings a chat template of its own."""
    return chat_template_of(folder) is not None


def special_ids(folder: Path) -> dict[str, int]:
    """Added and special tokens of a folder's tokenizer by their text, from its JSON files alone.

    Raises:
        CheckpointError: If a file is broken.
    """
    found: dict[str, int] = {}
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        path = folder / name
        entries = read_json(path).get(key) if path.is_file() else None
        if isinstance(entries, Mapping):
            entries = [{"id": number, **entry} for number, entry in entries.items() if isinstance(entry, Mapping)]
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and str(entry.get("id")).isdigit():
                found[entry["content"]] = int(entry["id"])
    path = folder / "added_tokens.json"
    if path.is_file():
        found |= {text: number for text, number in read_json(path).items() if isinstance(number, int)}
    return found


def known_template(tokenizer: Any) -> str | None:
    """The name of llavakit's template whose text a tokenizer's chat template is; None if it is none of them."""
    systems()  # they register templates
    for name in TEMPLATES:
        for begins in (None, False):
            if chat_template_for(name, tokenizer, begins=begins) == tokenizer.chat_template:
                return get_template(name).name
    return None
