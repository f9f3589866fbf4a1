"""Stop strings: whether generated ids have reached the end of the assistant's turn.

The rule is the one of the original LLaVA (`KeywordsStoppingCriteria`): the ids end exactly with a keyword's ids, or a
keyword appears in the decoded text of the last few new ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class KeywordStop:
    """Finds stop strings at the end of a sequence of token ids.

    Args:
        keywords: Stop strings, such as `Template.stop`.
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.keyword_ids: list[list[int]] = []
        for keyword in keywords:
            ids = list(tokenizer(keyword)["input_ids"])
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(ids)
        self.longest = max(map(len, self.keyword_ids), default=0)

    def __call__(self, ids: Sequence[int], prompt_length: int = 0) -> bool:
        """Whether generation is to stop after `ids`, of which the first `prompt_length` are the prompt."""
        ids = list(ids)
        if any(ids[-len(keyword) :] == keyword for keyword in self.keyword_ids if keyword):
            return True
        recent = min(len(ids) - prompt_length, self.longest)
        if recent <= 0:
            return False
        text = self.tokenizer.decode(ids[-recent:], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

    def all(self, rows: Sequence[Sequence[int]], prompt_length: int = 0) -> bool:
        """Whether every row of a batch is to stop."""
        return all(self(row, prompt_length) for row in rows)
