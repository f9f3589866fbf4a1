"""A tokenizer for cases that hold ids without a tokenizer: every id is one token of a made-up text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast


class IdTokenizer:
    """A tokenizer in which every id of a case is one token: those of the template have their names, others a number.

    Args:
        ids: Ids of the template's strings by string.
        sequences: The case's sequences.
        begin, end: The begin and the end token.
    """

    def __init__(self, ids: Mapping[str, int], sequences: Sequence[Sequence[int]], begin: str, end: str) -> None:
        self.names = {number: text for text, number in ids.items()}
        for number in sorted({number for sequence in sequences for number in sequence} - set(self.names)):
            self.names[number] = f"[{number}]"
        backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        backend.add_tokens([AddedToken(text, normalized=False) for text in self.names.values()])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end)
        self.original = {self.tokenizer.convert_tokens_to_ids(text): number for number, text in self.names.items()}

    def text(self, ids: Sequence[int]) -> str:
        """What ids say."""
        return "".join(self.names[number] for number in ids)
