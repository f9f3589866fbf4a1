"""Checking drafts in a conversation: `llavakit chat MODEL --responder report-error-checking --image film.png`.

The user gives the picture and the drafted findings; the members say whether there is a mistake, and if there is, of
which type. A draft that is a question of the benchmark already is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llavakit.conversation.messages import is_media, normalise, text_of
from llavakit.conversation.turns import Event, TextDelta, TraceEvent
from llavakit.errors import UserError
from llavakit.evaluation.records import choose
from llavakit.generation.responder import Call, Responder
from llavakit.systems.report_error_checking import answers
from llavakit.systems.report_error_checking.prompts import complex_prompt, simple_prompt

SENTENCES = {
    "insert": "a statement that does not belong to the image was added",
    "remove": "a statement about the image is missing",
    "substitute": "a statement was changed into a wrong one",
}
_BEGINNING = "Please choose the most suitable one "


class DraftChecker(Responder):
    """Several models that check a draft together.

    Args:
        model: The first member.
        members: Folders or addresses of the others, a list or names with commas between them.
        rule: "majority", "any" or "all".
        tie: What equal numbers of Y and N are.

    Raises:
        UserError: If an option does not fit.
    """

    def __init__(
        self, model: Responder, *, members: str | Sequence[Any] = (), rule: str = "majority", tie: str = "Y"
    ) -> None:
        from llavakit.generation.load import load

        choose(rule, "rule", answers.RULES[:3])
        choose(tie, "tie", ("Y", "N"))
        others = members.split(",") if isinstance(members, str) else list(members)
        loaded = [
            other if isinstance(other, Responder) else load(str(other).strip(), responder="plain") for other in others
        ]
        super().__init__(model, *loaded)
        self.rule, self.tie = rule, tie
        self.settings = {"rule": rule, "tie": tie}

    def run(self, call: Call) -> Iterator[Event]:
        """The decision, as a line that begins with its letter."""
        messages = normalise(call.messages)
        turn = messages[-1]
        draft, media = text_of(turn).strip(), [part for part in turn["content"] if is_media(part)]
        if not draft:
            raise UserError("there is no draft; write the findings")
        if draft.startswith(_BEGINNING):
            level = answers.complex_answer if "among A, B and C" in draft else answers.simple_answer
            texts = self._ask(call, media, draft)
            said = [level(text) for text in texts]
            letter = self._simple(said) if level is answers.simple_answer else answers.type_vote(said)
            if level is answers.complex_answer and letter is not None:
                letter = "ABC"[answers.TYPES.index(letter)]
            yield TextDelta(text=letter or texts[0])
            return
        said = [answers.simple_answer(text) for text in self._ask(call, media, simple_prompt(draft))]
        decision = self._simple(said)
        trace: dict[str, Any] = {"answers": said, "rule": self.rule, "decision": decision}
        if decision is None:
            reply = "No member gave an answer that can be read."
        elif decision == "N":
            reply = "N. No mistakes found."
        else:
            kinds = [answers.complex_answer(text) for text in self._ask(call, media, complex_prompt(draft))]
            kind = answers.type_vote(kinds)
            trace |= {"types": kinds, "type": kind}
            reply = "Y. There is a mistake" + (f": {SENTENCES[kind]} ({kind})." if kind else ".")
        if len(self.parts) > 1:
            reply += f" ({said.count('Y')} of {len(said)} members see a mistake; rule {self.rule}.)"
        yield TextDelta(text=reply)
        yield TraceEvent(name="check", data=trace)

    def _simple(self, said: Sequence[str | None]) -> str | None:
        return answers.vote(said, self.rule, self.tie)

    def _ask(self, call: Call, media: Sequence[Any], prompt: str) -> list[str]:
        """Every member's reply."""
        turn = [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
        found = call.ask_all([(part, turn, {"max_new_tokens": 8}) for part in self.parts], purpose="members")
        return [answer.content for answer in found]

    def score(self, context: Any, replies: Sequence[str]) -> Any:
        """Likelihoods by the only member.

        Raises:
            UserError: If there are several.
        """
        if len(self.parts) > 1:
            raise UserError("an ensemble has no likelihoods; ask its members one by one, and score with rule=mean")
        return self.main.score(context, replies)
