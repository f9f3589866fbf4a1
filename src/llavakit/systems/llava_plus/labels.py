"""Labels of LLaVA-Plus's first template as the published code counts them, for comparison with its runs.

The code tokenises every turn alone, where it gains a begin token, and adds the counts up: what is left out moves by
about one token per turn, so that words of the user are learned and the word `Assistant` is not. The default policy,
`spans`, marks the answers exactly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from llavakit.conversation.labels import IGNORE, Labels, Tokens
from llavakit.conversation.template import PLACEHOLDER, Template
from llavakit.conversation.tokens import tokenize
from llavakit.errors import UserError

_TURN = re.compile(r"### (?:Human|Assistant): ")
KEPT = 2  # tokens at the beginning of a user's turn that are learned


class CountedTurns:
    """Turns of the template `llava_v0`, by their token counts.

    Args:
        learned: Numbers of user turns (from 0, among all turns) that are learned too; the published code leaves out
            only turns whose speaker is spelt `human`.
    """

    def __init__(self, *, learned: Sequence[int] = ()) -> None:
        self.learned = frozenset(learned)

    def check(self, template: Template) -> None:
        """Refuse templates of other turns."""
        if template.file != "hashes":
            raise UserError(f"label policy 'counted_turns' knows the turns of llava_v0, not those of {template.name!r}")

    def __call__(self, tokens: Tokens) -> Labels:
        tokenizer, whole = tokens.tokenizer, PLACEHOLDER not in tokens.text

        def count(text: str) -> int:
            ids = tokenize(text, tokenizer)[0]
            if not whole:
                return len(ids)
            ids = ids if tokens.max_length is None else ids[: tokens.max_length]
            return sum(token != tokenizer.pad_token_id for token in ids)

        header, *turns = _turns(tokens)
        labels = [token if token >= 0 else IGNORE for token in tokens.ids]
        place = count(header)
        labels[:place] = [IGNORE] * min(place, len(labels))
        for number, turn in enumerate(turns):
            length = count(turn)
            if turn.startswith("### Human: ") and number not in self.learned:
                begin, end = min(place + KEPT, len(labels)), min(place + length, len(labels))
                labels[begin:end] = [IGNORE] * max(end - begin, 0)
            place += length
        return Labels(labels)


def _turns(tokens: Tokens) -> list[str]:
    """The header and the turns of a training text, whose last `### ` is no turn.

    A turn begins where the template writes one: at an answer, and behind the end of one.
    """
    text = tokens.text
    begins = [start for start, _ in tokens.answers if _TURN.match(text, start)]
    edges = [0, *begins, len(text) - len("### ")]
    return [text[start:end] for start, end in itertools.pairwise(edges)]
