"""The responder: what answers a conversation, above the model."""

from __future__ import annotations

from collections.abc import Iterator

from llavakit.conversation.turns import Event, TraceEvent
from llavakit.generation.responder import Call, Responder

CHECK = {"role": "user", "content": "Look at the picture again and answer once more."}


class SecondLook(Responder):
    """A draft that nobody sees, and the model's answer after it.

    The draft is counted and cancelled with the request. Streams, batches and the server work as for a model alone.
    """

    def run(self, call: Call) -> Iterator[Event]:
        draft = call.ask(self.main, purpose="draft")
        yield TraceEvent(name="draft", data={"text": draft.content})
        yield from call.stream(self.main, [*call.messages, {"role": "assistant", "content": draft.content}, CHECK])
