"""Answering with triplets of a datastore: `llavakit chat MODEL --responder kg-llava --responder-option store=...`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llavakit.conversation.messages import is_media, normalise, text_of
from llavakit.conversation.turns import Event, TraceEvent
from llavakit.errors import UserError, quoted
from llavakit.generation.responder import Call, Responder
from llavakit.media import load_image
from llavakit.retrieval.retriever import Retriever, open_retriever
from llavakit.systems.kg_llava.prompts import DIAGNOSES, QUESTIONS, TRIPLETS, with_triplets

CERTAINTIES = ("uncertain", "positive")


class WithTriplets(Responder):
    """A model that reads the triplets of the nearest captions in front of the question about a picture.

    A question stays as it is; if it is a list of findings (`positive Edema, uncertain Pneumonia`), the first of the
    published questions is asked about them. Turns without a picture go to the model alone.

    Args:
        model: Who answers.
        store: The datastore, or a retriever.
        encoder: Folder of its encoder; default the one that the store names.
        triplets: Most triplets of a prompt.
    """

    def __init__(
        self,
        model: Responder,
        *,
        store: str | Retriever | None = None,
        encoder: str | None = None,
        triplets: int = TRIPLETS,
    ) -> None:
        super().__init__(model)
        if isinstance(triplets, bool) or not isinstance(triplets, int) or triplets < 1:
            raise UserError(f"triplets {quoted(triplets)}: must be a positive number")
        given = isinstance(store, Retriever)
        self.triplets, self.retriever = triplets, None
        if store is not None:
            self.retriever = _check_filled(store if given else open_retriever(store, encoder=encoder))
        self.settings: dict[str, Any] = {"store": None if given else store, "triplets": triplets}

    def run(self, call: Call) -> Iterator[Event]:
        """The model's answer to the conversation with triplets in its last question."""
        messages = normalise(call.messages)
        last = next((number for number in reversed(range(len(messages))) if messages[number]["role"] == "user"), None)
        pictures = [] if last is None else [part for part in messages[last]["content"] if part["type"] == "image"]
        if self.retriever is None or not pictures:
            yield from call.stream(self.main)
            return
        if call.before_media is not None:
            call.before_media(pictures[0])
        processor = getattr(self.main, "processor", None)
        picture = load_image(pictures[0]["image"]) if processor is None else processor.read_media(pictures[0])[0]
        hits = self.retriever.retrieve([picture], self.triplets)[0]
        texts = [self._harmless(hit.entry.text) for hit in hits]
        yield TraceEvent(name="triplets", data={"triplets": texts, "scores": [round(hit.score, 4) for hit in hits]})
        asked = with_triplets(texts, question_of(text_of(messages[last]).strip()), self.triplets)
        media = [part for part in messages[last]["content"] if is_media(part)]
        messages[last] = {**messages[last], "content": [*media, {"type": "text", "text": asked}]}
        yield from call.stream(self.main, messages)

    def _harmless(self, text: str) -> str:
        """A caption in which nothing acts as a special token: a store is data."""
        (turn,) = self.main.escape([{"role": "user", "content": text}])
        return text_of(normalise([turn])[0])


def _check_filled(retriever: Retriever) -> Retriever:
    """A store without entries is said at once, and not at the first question."""
    store = getattr(retriever, "store", None)
    if store is not None and not len(store):
        raise UserError(f"{store.path}: the store is empty; `llavakit prepare kg_datastore` fills one")
    return retriever


def question_of(text: str) -> str:
    """A question, or the first of the published ones about a list of findings."""
    return QUESTIONS[0].format(pathologies=text) if _is_list(text.split(", ")) else text


def _is_list(items: Sequence[str]) -> bool:
    known = {f"{certainty} {name}" for certainty in CERTAINTIES for name in DIAGNOSES}
    return all(item in known for item in items)
