"""Talking about the picture that is being edited: a message carries it if it has changed since the last message."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from llavakit.conversation.messages import KEEP, Message, Part, media_of
from llavakit.generation.request import SamplingParams
from llavakit.generation.responder import Responder
from llavakit.tools.pictures import shown_size

LONGEST, LONGEST_WITH_PICTURE = 1536, 1200  # characters of a message; what is more is left out
SAMPLING = SamplingParams(temperature=0.2, top_p=0.7, max_new_tokens=512)
MARK = "<image>"


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


class PictureChat:
    """A conversation about the working image.

    Args:
        responder: Who answers.
        forgets: Whether a conversation that has a picture begins anew with the next one, as published; otherwise it
            goes on and the model sees all versions that were talked about.
        sampling: Of every answer.

    Attributes:
        messages: The conversation.
        waiting: The picture that the next message carries.
    """

    def __init__(self, responder: Responder, *, forgets: bool = True, sampling: SamplingParams = SAMPLING) -> None:
        self.responder, self.forgets, self.sampling = responder, forgets, sampling
        self.messages: list[Message] = []
        self.waiting: Image.Image | None = None

    def changed(self, image: Image.Image | None) -> None:
        """The working image is another one."""
        self.waiting = image

    def ask(self, text: str) -> list[Message] | None:
        """The conversation with a further question, which the model is now to answer; None if there is nothing to ask.

        Args:
            text: The question. A picture comes where the model's template has it; where it joins a running conversation
                of a chat that `forgets`, as published, in place of the question's `<image>`, otherwise behind the
                question.
        """
        picture, self.waiting = self.waiting, None
        if not text and picture is None:
            return None
        text = text[:LONGEST]
        message: Message = {"role": "user", "content": [_text(text)]}
        if picture is not None:
            text = text[:LONGEST_WITH_PICTURE]
            part = {"type": "image", "image": picture.resize(shown_size(picture.size))}
            if self.forgets and media_of(self.messages):
                self.messages = []
            if self.messages and self.forgets:
                before, mark, after = text.partition(MARK)
                pieces = [_text(before if mark else f"{before}\n"), part, _text(after)]
                content = [one for one in pieces if one["type"] != "text" or one["text"]]
                message |= {"content": content, "placement": KEEP}
            else:
                message["content"] = [part, _text(text.replace(MARK, "").strip())]
        self.messages.append(message)
        return self.messages

    def stream(self, text: str) -> Iterator[str]:
        """The answer to a question as far as it has come; nothing if nothing was asked.

        A question that fails, or whose answer is not waited for, is taken back, and its picture with it.
        """
        before, waiting = list(self.messages), self.waiting
        messages = self.ask(text)
        if messages is None:
            return
        response = None
        try:
            response = self.responder.submit(messages, self.sampling)
            said = response.answers[0]
            for _ in response:
                yield said.content
        except BaseException:
            self.messages = before
            self.waiting = waiting if self.waiting is None else self.waiting
            raise
        finally:
            if response is not None:
                response.cancel()  # if nobody waits for the rest
        messages.append({"role": "assistant", "content": [_text(said.content.strip())]})

    def say(self, text: str) -> str | None:
        """The whole answer to a question; None if nothing was asked. See `stream`."""
        answer = None
        for so_far in self.stream(text):
            answer = so_far
        return answer
