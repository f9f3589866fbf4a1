"""Keys of a configuration file: each is read, known to carry no meaning for inference, or refused.

A layout reads config.json through `Fields`, which remembers what was asked for. What is left over must be listed in
`INERT`, or in the layout's own `inert`, with the reason why a model answers the same without it; otherwise the file is
refused. So a layout cannot overlook a key, and neither can one that is written later.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from llavakit.errors import CheckpointError, quoted

_TRAINING = "says how the weights were trained"
_WRITER = "says what wrote the file"
_GENERATION = "default of transformers' generate in old releases; generation_config.json has taken its place"
_RUNTIME = "says how the code that wrote the file ran, not what the model computes"
_HEADS = "belongs to heads that a language model does not have"

INERT: dict[str, str] = {
    **dict.fromkeys(("_name_or_path", "architectures", "transformers_version", "_commit_hash", "model_type"), _WRITER),
    **dict.fromkeys(("auto_map", "custom_pipelines"), "names code on the hub, which is never executed"),
    **dict.fromkeys(("dtype", "torch_dtype"), "the tensors say their own precision"),
    **dict.fromkeys(
        (
            *("use_cache", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
            *("attn_implementation", "gradient_checkpointing", "pretraining_tp", "torchscript", "use_bfloat16"),
            *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"),
        ),
        _RUNTIME,
    ),
    **dict.fromkeys(
        (
            *("initializer_range", "initializer_factor", "attention_dropout", "dropout", "tokenizer_padding_side"),
            *("tokenizer_model_max_length", "max_sequence_length", "layerdrop", "attn_pdrop", "embd_pdrop"),
            *("resid_pdrop", "hidden_dropout_prob", "drop_path_rate", "ignore_index"),
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        (
            *("id2label", "label2id", "problem_type", "num_labels", "finetuning_task", "task_specific_params"),
            *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
            *("summary_use_proj", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id"),
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        (
            *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
            *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
            *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
            *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate"),
            *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
            *("exponential_decay_length_penalty", "begin_suppress_tokens"),
        ),
        _GENERATION,
    ),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # any configuration may have them
# Keys that change nothing as long as they have one of these values.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False,)),
    "pruned_heads": ({},),
    "tf_legacy_loss": (False, True),
}


class Fields(Mapping[str, Any]):
    """The object in a config.json; remembers which of its keys were read.

    Looking whether a key is there, and iterating over keys, does not count as reading.

    Args:
        values: The object.
        where: Name of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values, self.where = dict(values), where
        self._names = {key: key for key in self._values}  # name here -> name in the file
        self._read: set[str] = set()  # names in the file

    def renamed(self, rename: Callable[[str], str]) -> Fields:
        """The same object under other keys; what is read there counts here too.

        Raises:
            CheckpointError: If two keys become one.
        """
        other = Fields({}, self.where)
        for key, name in self._names.items():
            new = rename(key)
            if new in other._names:
                raise CheckpointError(f"{self.where}: {quoted(other._names[new])} and {quoted(name)} mean the same")
            other._values[new], other._names[new] = self._values[key], name
        other._read = self._read
        return other

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._read.add(self._names[key])
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> dict[str, Any]:
        """Keys that have not been read so far."""
        return {key: value for key, value in self._values.items() if self._names[key] not in self._read}

    def one_of(self, key: str, *allowed: Any) -> Any:
        """The value of a key that may only have one of these; None if it is missing.

        Raises:
            CheckpointError: If it has another.
        """
        value = self.get(key)
        if value is not None and value not in allowed:
            choices = ", ".join(quoted(choice) for choice in allowed)
            raise CheckpointError(f"{self.where}: {key} is {quoted(value)}; llavakit reads {choices}")
        return value

    def section(self, key: str) -> Fields:
        """The object under a key, with its own bookkeeping.

        Raises:
            CheckpointError: If it is no object.
        """
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}: {key} is {quoted(value)}, it should be an object")
        return Fields(value, f"{self.where}: {key}")

    def finish(self, inert: Mapping[str, str] = INERT) -> None:
        """Refuse what was neither read nor is without meaning; null says no more than a missing key.

        Args:
            inert: Further keys without meaning, each with the reason.

        Raises:
            CheckpointError: It names the first such key.
        """
        known = set(INERT) | set(inert) | self._read
        for key, value in self.unread().items():
            if not is_inert(key, value, inert):
                raise CheckpointError(not_understood(self.where, key, value, sorted(known)))


def is_inert(key: str, value: Any, inert: Mapping[str, str] = INERT) -> bool:
    """Whether a model answers the same without this entry."""
    return value is None or key in INERT or key in inert or value in _HARMLESS.get(key, ())


def not_understood(where: str, key: str, value: Any, known: Sequence[str]) -> str:
    """The message for an unknown key."""
    close = difflib.get_close_matches(key, known, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"{where}: {quoted(key)}: {quoted(value)} is not understood{meant}; "
        "if the model does not depend on it, take it out of the file"
    )


UNDECLARED = frozenset({"vision_use_head"})  # read by models, but not declared by every release


def check_known(config: PreTrainedConfig, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that a transformers configuration took without knowing them.

    transformers stores unknown keywords as attributes, where nothing reads them.

    Args:
        config: The configuration that was built from `options`.
        options: What it was built from.
        where: File and section, for messages.

    Raises:
        CheckpointError: It names the first unknown option.
    """
    cls = type(config)
    known = {*getattr(cls, "__dataclass_fields__", ()), *cls.attribute_map, *cls.sub_configs, *TOKEN_IDS, *UNDECLARED}
    for key, value in options.items():
        if key in known or not hasattr(config, key) or is_inert(key, value):
            continue
        if not hasattr(cls(), key):  # what a class computes for itself (names of stages) it may be given too
            raise CheckpointError(not_understood(where, key, value, sorted(known)))


def compare_values(ours: Any, theirs: Any, where: str, other: str, path: str = "") -> None:
    """Refuse two files that say the same thing differently.

    Args:
        ours, theirs: JSON values.
        where, other: The files, for messages.

    Raises:
        CheckpointError: It names the first place where they differ, and both values.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs} - set(INERT)):
            compare_values(ours.get(key), theirs.get(key), where, other, f"{path}.{key}" if path else key)
    elif ours != theirs:
        raise CheckpointError(f"{where}: {path} is {quoted(ours)}, and {quoted(theirs)} in {other}")
