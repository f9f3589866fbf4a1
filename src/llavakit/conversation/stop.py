"""The original LLaVA's stop rule (`KeywordsStoppingCriteria`), for comparison with original runs.

The engine matches stop strings in the streamed text, however it was cut into tokens. The original stops where the ids
end exactly with a keyword's ids, or where a keyword appears in the decoded text of the last few new ids, as many as the
longest keyword takes alone; a keyword that was generated in more tokens goes unseen. Use it with
`chat.generate(messages, stopping_criteria=[KeywordStop(...)])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class KeywordStop(StoppingCriteria):
    """Finds stop strings at the end of sequences of token ids, as the original does.

    Args:
        keywords: Stop strings, such as `Template.stop`.
        tokenizer: A transformers tokenizer.
        prompt_length: Ids of the prompt, which are not looked at.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, prompt_length: int = 0) -> None:
        self.keywords = list(keywords)
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.keyword_ids: list[list[int]] = []
        for keyword in keywords:
            ids = list(tokenizer(keyword)["input_ids"])
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(ids)
        self.longest = max(map(len, self.keyword_ids), default=0)

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Whether each row of `input_ids` [batch, length] has come to its end [batch]."""
        return torch.tensor([self._ends(row) for row in input_ids.tolist()], device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        if any(ids[-len(keyword) :] == keyword for keyword in self.keyword_ids if keyword):
            return True
        recent = min(len(ids) - self.prompt_length, self.longest)
        if recent <= 0:
            return False
        text = self.tokenizer.decode(ids[-recent:], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
