"""CheXbert: a BERT that says which of 14 conditions a report finds, denies or leaves open (Smit et al. 2020).

The weights are published apart (`chexbert.pth` of `StanfordAIMI/RRG_scorers`); F1 on its labels is in `reports`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from llavakit.checkpoints.files import check_tensor
from llavakit.errors import CheckpointError
from llavakit.evaluation.metrics.reports import CONDITIONS

LONGEST = 512  # ids of a report


class CheXbert(nn.Module):
    """A linear head per condition on the last hidden state of the first token: 4 classes, "No Finding" 2."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        sizes = [2 if name == "No Finding" else 4 for name in CONDITIONS]
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in sizes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Scores [reports, classes] of every condition.

        Args:
            input_ids, attention_mask: [reports, longest].
        """
        first = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return [head(first) for head in self.linear_heads]

    @classmethod
    def published(cls, state: Mapping[str, Tensor], where: str = "chexbert.pth") -> CheXbert:
        """The network of published tensors, whose sizes are theirs: BERT-base, heads of 64 channels.

        Raises:
            CheckpointError: If they are not such a network's.
        """
        bare = {name.removeprefix("module."): state[name] for name in state}
        words, ends = bare.get("bert.embeddings.word_embeddings.weight"), "intermediate.dense.weight"
        layers = [name for name in bare if name.startswith("bert.encoder.layer.") and name.endswith(ends)]
        if words is None or not layers:
            raise CheckpointError(f"{where}: holds no BERT; CheXbert's weights are chexbert.pth")
        config = BertConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            num_hidden_layers=len(layers),
            num_attention_heads=max(words.shape[1] // 64, 1),
            intermediate_size=bare[layers[0]].shape[0],
        )
        return cls(config).load(state, where)

    def load(self, state: Mapping[str, Tensor], where: str = "chexbert.pth") -> CheXbert:
        """The published tensors; the pooler, which no head reads, is left out.

        Args:
            where: What the tensors come from, for messages.

        Raises:
            CheckpointError: If a tensor is missing, superfluous or misshaped.
        """
        bare = {name.removeprefix("module."): name for name in state}
        unused = ("bert.pooler.", "bert.embeddings.position_ids")
        given = {name: state[own] for name, own in bare.items() if not name.startswith(unused)}
        wanted = self.state_dict()
        for name in sorted(set(wanted) ^ set(given)):
            raise CheckpointError(f"{where}: {'lacks' if name in wanted else 'has an unknown tensor'} {name}")
        for name, tensor in given.items():
            check_tensor(where, name, tensor, wanted[name].shape)
        self.load_state_dict(given)
        return self.eval()

    @torch.no_grad()
    def label(self, reports: Sequence[str], tokenizer: Any, batch_size: int = 32) -> Tensor:
        """Class per condition and report [14, reports]: 0 blank, 1 positive, 2 negative, 3 uncertain."""
        found = []
        for start in range(0, len(reports), batch_size):
            rows = [torch.tensor(report_ids(text, tokenizer)) for text in reports[start : start + batch_size]]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            found.append(torch.stack([scores.argmax(-1) for scores in self(ids, mask.long())]))
        return torch.cat(found, dim=1) if found else torch.zeros(len(CONDITIONS), 0, dtype=torch.long)


def report_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a report: white space is one space; of more than 512 ids the last is the end mark."""
    ids = tokenizer(" ".join(text.split()))["input_ids"]
    return ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], tokenizer.sep_token_id]


def word_pieces(vocabulary: Path, *, lower: bool = True) -> Any:
    """The tokenizer of a BERT vocabulary file, one piece a line."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab=str(vocabulary), do_lower_case=lower)
