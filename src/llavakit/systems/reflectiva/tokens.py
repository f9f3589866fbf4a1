"""The six tokens that ReflectiVA adds by renaming the last reserved ones of Llama 3.1."""

from __future__ import annotations

from typing import Any

from llavakit.errors import UserError

NO_RETRIEVAL, RETRIEVAL = "[No Retrieval]", "[Retrieval]"
NO_RELEVANT, RELEVANT = "[No Relevant]", "[Relevant]"
BEGIN, END = "<paragraph>", "</paragraph>"
NEEDS = (NO_RETRIEVAL, RETRIEVAL)  # whether a question needs a passage
FITS = (NO_RELEVANT, RELEVANT)  # whether a passage helps
TOKENS = {NO_RETRIEVAL: 128250, RETRIEVAL: 128251, NO_RELEVANT: 128252, RELEVANT: 128253, BEGIN: 128254, END: 128255}


def id_of(token: str, tokenizer: Any) -> int:
    """The id of one of the tokens.

    Raises:
        UserError: If the tokenizer would split it: that of the model which training starts from does.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise UserError(
            f"the tokenizer has no token {token!r}; take the one that ReflectiVA is published with, or add the tokens "
            "(parts.tokens of the recipe)"
        )
    return found
