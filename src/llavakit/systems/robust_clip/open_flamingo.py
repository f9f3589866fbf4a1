"""Prompts and labels of OpenFlamingo, which the paper attacks beside LLaVA.

Captions are asked as `<image>Output:`, questions as `<image>Question:... Short answer:`; demonstrations stand in front.
What is attacked is found by the last colon, so answers hold none.
"""

from __future__ import annotations

from llavakit.conversation.labels import IGNORE, Labels, Tokens
from llavakit.conversation.template import Template
from llavakit.errors import UserError

END = "<|endofchunk|>"
COLON = ":"

OPEN_FLAMINGO = Template(
    "open_flamingo",
    "llavakit.systems.robust_clip:open_flamingo",
    stop=(END,),
    placement="keep",
    labels="after_last_colon",
)


class AfterLastColon:
    """Everything behind the last colon; padding, the first position, pictures and the end mark are not learned."""

    def check(self, template: Template) -> None:
        """Every template will do."""

    def __call__(self, tokens: Tokens) -> Labels:
        vocabulary = tokens.tokenizer.get_vocab()
        colon = vocabulary.get(COLON)
        places = [place for place, token in enumerate(tokens.ids) if token == colon]
        if not places:
            raise UserError("labels begin behind the last colon, and the prompt has no token for one")
        ignored = {tokens.tokenizer.pad_token_id, vocabulary.get(END)}
        begin = max(places[-1] + 1, 1)
        return Labels(
            [
                token if place >= begin and token >= 0 and token not in ignored else IGNORE
                for place, token in enumerate(tokens.ids)
            ]
        )
