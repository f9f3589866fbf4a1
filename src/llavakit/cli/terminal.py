"""A conversation with a model in the terminal: history, attached media, streaming.

This module knows lines of text and messages. How a message becomes tokens, and where media may come from, is the
model's business.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.conversation.turns import CallEvent, Event, PictureEvent, ReasoningDelta, TextDelta, TraceEvent
from llavakit.errors import UserError

if TYPE_CHECKING:
    from llavakit.generation.responder import Responder

MEDIA = ("image", "video", "volume")
HELP = """/image FILE    attach an image to the next message; /video and /volume likewise
/reset         forget the conversation and what is attached
/help          this text
/exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


def attachment(modality: str, place: str) -> dict[str, Any]:
    """A content part for a media item.

    Args:
        modality: "image", "video" or "volume".
        place: File, folder (of a volume's slices), or http(s) or data URL.

    Raises:
        UserError: If there is nothing at `place`, or it may not be fetched.
    """
    from llavakit.media import image_size
    from llavakit.media.source import fetched

    source = fetched(place)  # once, though every turn of a conversation reads it again
    if source is place:
        source = str(Path(place).expanduser())
        if not Path(source).exists():
            raise UserError(f"{place}: no such {modality} file")
    if modality == "image":
        image_size(source)  # what is no image is refused before a model is loaded
    return {"type": modality, modality: source}


def with_boxes(attached: Iterable[dict[str, Any]], files: Iterable[str]) -> list[dict[str, Any]]:
    """Attached media with the boxes of images behind them.

    Args:
        files: Box files (`llavakit.data.boxes`); an entry's id is the image's file name, with or without its suffix.

    Raises:
        UserError: If no entry or several are of an image.
    """
    from llavakit.data.boxes import BoxFile

    known = [BoxFile(file) for file in files]
    found = []
    for part in attached:
        found.append(part)
        if not known or part["type"] != "image":
            continue
        place = str(part["image"]) if isinstance(part["image"], str) else ""
        names = {Path(place).stem, Path(place).name, place}
        entries = [(boxes, name) for boxes in known for name in names if name in boxes]
        if len(entries) != 1:
            problem = "no entry" if not entries else f"{len(entries)} entries"
            raise UserError(
                f"{place or 'the image'}: {', '.join(b.file for b in known)}: {problem} with its name as id"
            )
        found.append(entries[0][0].part(entries[0][1]))
    return found


class Session:
    """One conversation.

    Args:
        model: Answers messages.
        options: Keywords of every `model.submit` call (`max_new_tokens`, `temperature`).
        system: System message, or None for the template's own.
        write: Takes pieces of text as they come.
        note: Takes pieces of reasoning as they come; by default they go to standard error, so that a pipe gets the
            answer alone.
        trace: Whether to note what a responder did on the way, and what an answer took, as lines of JSON.
    """

    def __init__(
        self,
        model: Responder,
        options: Mapping[str, Any] | None = None,
        system: str | None = None,
        write: Callable[[str], Any] | None = None,
        note: Callable[[str], Any] | None = None,
        trace: bool = False,
    ) -> None:
        self.trace = trace
        self.model, self.options, self.system = model, dict(options or {}), system
        self.write, self.note = write or _write, note or _note
        self._stage: str | None = None  # whose text was written last
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and what is attached."""
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.attached: list[dict[str, Any]] = []

    def attach(self, modality: str, place: str) -> None:
        """Attach a media item to the next message.

        Raises:
            UserError: If there is nothing at `place`.
        """
        self.attached.append(attachment(modality, place))

    def say(self, text: str) -> str:
        """Send a message with what is attached, write the answer as it comes, and return it.

        Ctrl-C ends the answer; what was said until then is kept.

        Raises:
            UserError: If the message cannot be answered; the conversation is as it was before, attachments dropped.
        """
        attached, self.attached = self.attached, []
        turn = {"role": "user", "content": [*attached, {"type": "text", "text": text}]}
        response = self.model.submit([*self.messages, turn], **self.options)
        try:
            for event in response:
                self._show(event)
        except KeyboardInterrupt:
            self.write(" [stopped]")
        finally:
            response.cancel()
        self.write("\n")
        if self.trace:
            self._note_trace("usage", asdict(response.usage))
        answer = response.answers[0]
        self.messages += [turn, answer.message()]
        return answer.content

    def _note_trace(self, name: str, data: Any) -> None:
        self.note(f"{'' if self._stage is None else chr(10)}[{name}] {json.dumps(data, ensure_ascii=False)}\n")
        self._stage = None

    def _show(self, event: Event) -> None:
        match event:
            case TraceEvent(name=name, data=data) if self.trace:
                self._note_trace(name, data)
                return
            case ReasoningDelta(text=text, stage=stage):
                stage = stage or "reasoning"
                self.note(text if stage == self._stage else f"\n[{stage}] {text.lstrip()}")
                self._stage = stage
                return
            case TextDelta(text=text):
                pass
            case CallEvent(call=call):
                text = f"[calls {call.name} {call.arguments}]"
            case PictureEvent(image=image, caption=caption):
                text = f"[picture {_saved(image)}{': ' if caption else ''}{caption}]"
            case _:
                return
        if self._stage is not None:
            self.note("\n\n")
        self._stage = None
        self.write(text)

    def handle(self, line: str) -> bool:
        """Deal with one line of input; False when the user wants to leave.

        Raises:
            UserError: If the line is an unknown command, or its message cannot be answered.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self.say(line)
            return True
        command, _, argument = line[1:].partition(" ")
        argument = argument.strip().strip("'\"")
        if command in ("exit", "quit"):
            return False
        if command in MEDIA:
            if not argument:
                raise UserError(f"/{command}: name a file, as in /{command} FILE")
            self.attach(command, argument)
            self.write(f"[{command} attached to the next message]\n")
        elif command == "reset":
            self.reset()
            self.write("[new conversation]\n")
        elif command == "help":
            self.write(HELP + "\n")
        else:
            raise UserError(f"/{command}: unknown command; /help lists them")
        return True


def interact(session: Session, lines: Iterable[str] | None = None) -> None:
    """Answer line after line until the input ends or the user leaves; a failing line ends nothing.

    Args:
        lines: Input; None asks at the terminal.
    """
    source = iter(_ask() if lines is None else lines)
    while True:
        try:
            line = next(source, None)
        except KeyboardInterrupt:
            line = None
        if line is None:
            return
        try:
            if not session.handle(line):
                return
        except UserError as error:
            print(error, file=sys.stderr)


def _ask() -> Iterator[str]:
    terminal = sys.stdin.isatty()
    if terminal:
        print("Type a message; /help lists the commands.")
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, end="", flush=True, file=sys.stderr)


def _saved(image: Any) -> str:
    """A file with a picture of a reply."""
    handle, path = tempfile.mkstemp(prefix="llavakit-", suffix=".png")
    os.close(handle)
    image.save(path)
    return path
