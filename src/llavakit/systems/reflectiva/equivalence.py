"""Answer equivalence (BEM): whether two answers to a question mean the same, by a BERT sequence classifier.

The folder is one of transformers: a BERT classifier of two classes, the second of which is "equivalent", whose token
types are three. The published weights are a TensorFlow module; convert them, or name another function.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llavakit.errors import CheckpointError, UserError

LENGTH = 512


class AnswerEquivalence:
    """Probability that a candidate says the same as a reference.

    Args:
        folder: The classifier.

    Raises:
        UserError: If it is none, or cannot tell three texts apart.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"bem: {folder}: not a sequence classifier ({reason})") from None
        config = self.model.config
        if getattr(config, "type_vocab_size", 0) < 3 or config.num_labels != 2:
            raise UserError(
                f"bem: {folder}: must have two classes and three token types (candidate, reference, question)"
            )

    @torch.no_grad()
    def __call__(self, candidate: str, reference: str, question: str) -> float:
        first, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids, kinds = [first], [0]
        for kind, text in enumerate((candidate, reference, question)):
            own = [*self.tokenizer(text, add_special_tokens=False).input_ids, end]
            ids, kinds = ids + own, kinds + [kind] * len(own)
        inputs = torch.tensor([ids[:LENGTH]]), torch.tensor([kinds[:LENGTH]])
        logits = self.model(input_ids=inputs[0], token_type_ids=inputs[1]).logits
        return float(logits[0].softmax(-1)[1])
