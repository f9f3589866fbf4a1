"""BERTScore (Zhang et al. 2020): tokens of two texts matched greedily by the cosine of their contextual embeddings.

The encoder is any transformers model. The layer decides the figure and is part of it; for encoders that papers use it
is the one that the package bert-score takes. Without idf weights and without rescaling, as papers report it by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llavakit.errors import UserError

# Layers that the package bert-score 0.3.13 takes, by the last part of the hub id.
LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "distilbert-base-uncased": 5,
    "distilroberta-base": 5,
    "scibert_scivocab_uncased": 8,
    "deberta-xlarge-mnli": 40,
    "deberta-large-mnli": 18,
    "deberta-base-mnli": 9,
}


LONGEST = 512  # tokens of a text


class BertScores(NamedTuple):
    """Per text, float64 [texts]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


class BertScore:
    """An encoder with the layer whose states are compared.

    Args:
        source: Folder or hub id of the encoder.
        layer: Which hidden states; None takes the published layer of a known encoder.

    Raises:
        UserError: If it cannot be loaded, or no layer is known or there.
    """

    def __init__(self, source: str, layer: int | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        name = str(source).rstrip("/").rpartition("/")[2]
        layer = LAYERS.get(name) if layer is None else layer
        if layer is None:
            raise UserError(f"{source}: no layer of {name} is published; say which with --bertscore-layer")
        try:
            self.model = AutoModel.from_pretrained(source).eval()
            prefix = {"add_prefix_space": True} if self.model.config.model_type in ("roberta", "gpt2") else {}
            self.tokenizer = AutoTokenizer.from_pretrained(source, **prefix)  # as bert-score has it
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{source}: cannot be loaded as an encoder: {str(error).splitlines()[0]}") from None
        count = self.model.config.num_hidden_layers
        if not 0 <= layer <= count:
            raise UserError(f"{source}: has layers 0 to {count}, layer {layer} was asked for")
        self.name, self.layer = name, layer

    @torch.no_grad()
    def score(self, texts: Sequence[str], references: Sequence[str], batch_size: int = 32) -> BertScores:
        """Precision, recall and F1 of every text; 0 where one of the two is empty."""
        rows = []
        for start in range(0, len(texts), batch_size):
            ours, theirs = (self._embed(side[start : start + batch_size]) for side in (texts, references))
            rows += [_match(a, b) for a, b in zip(ours, theirs, strict=True)]
        return BertScores(*np.array(rows, float).reshape(len(rows), 3).T)

    def _embed(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Unit vectors [tokens, width] of every text, and which of them are words rather than marks."""
        most = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings, LONGEST)
        batch: Any = self.tokenizer(
            [text.strip() for text in texts], padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        states = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[self.layer]
        unit = torch.nn.functional.normalize(states, dim=-1)
        marks = torch.isin(batch["input_ids"], torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]))
        real = batch["attention_mask"].bool()
        return [(unit[n][real[n]], ~marks[n][real[n]]) for n in range(len(texts))]


def _match(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """Marks may be matched, but have no weight."""
    (own, words), (other, wanted) = ours, theirs
    if not words.any() or not wanted.any():
        return (0.0, 0.0, 0.0)
    table = own @ other.T
    precision, recall = float(table.max(1).values[words].mean()), float(table.max(0).values[wanted].mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0
