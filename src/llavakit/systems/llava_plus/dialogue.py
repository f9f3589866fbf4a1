"""One conversation of LLaVA-Plus: what is said, what tools are called with, and what the user is shown.

Per turn of the user the model answers once; if it wants one tool that there is, that is called, its result becomes a
turn of the user's side, and the model's second answer is final. A new picture begins a new conversation. Source:
`add_text` and `http_bot` of the published code.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from llavakit.conversation.messages import Message
from llavakit.conversation.turns import Event, PictureEvent, ReasoningDelta, TextDelta, TraceEvent
from llavakit.systems.llava_plus import pictures
from llavakit.systems.llava_plus.grammar import ACTIONS, THOUGHTS, VALUE, Lines, asked_again, decode, split, the_action
from llavakit.systems.llava_plus.names import is_tagged
from llavakit.systems.llava_plus.results import cleaned, result_text

MOST_CHARACTERS, MOST_WITH_IMAGE = 1536, 1200
MOST_TOKENS = 1536  # of an answer, whatever is asked for
THRESHOLDS = {"box_threshold": 0.3, "text_threshold": 0.25}
BOXED = ("grounding_dino", "ram+grounding_dino", "blip2+grounding_dino")
MADE = ("iou_sort_masks", "image_seg", "edited_image")  # pictures of a result, the one that is shown first
BOXED_AND_MASKED = ("grounding_dino+sam", "grounded_sam")

Ask = Callable[[list[Message], Mapping[str, Any]], Iterator[Event]]


class Tools(Protocol):
    """What runs tools."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tool of this name."""

    def __call__(self, name: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a tool finds; see `results` for the names of what it gives."""


@dataclass
class Said:
    """A message of the conversation.

    Attributes:
        role: "user" or "assistant".
        text: As the prompt has it, `<image>` included; None while it is open.
        image: The picture that the user gave with it.
        pictures: What the answer shows.
        kind: "question", "answer", "call", "result" or "final".
    """

    role: str
    text: str | None
    kind: str
    image: Image.Image | None = None
    pictures: list[Image.Image] = field(default_factory=list)


@dataclass
class Turn:
    """What one turn of the user led to.

    Attributes:
        opened: Whether it began a conversation.
        actions: What the model's actions say; None if they say nothing that can be decoded.
        name, payload, result: Of the tool, if one was called.
        drawings: Boxes that were drawn.
    """

    opened: bool = False
    actions: Any = None
    name: str | None = None
    payload: dict[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    drawings: list[pictures.Drawing] = field(default_factory=list)


class Row(NamedTuple):
    """A row of a transcript: whose it is, text in HTML, and pictures below it."""

    role: str
    text: str
    pictures: list[Image.Image]


class Dialogue:
    """A conversation.

    Args:
        tools: What may be called.
        template: Name of the model's chat template, as far as it is known.
        mode: How pictures are sent to the model, see `pictures.for_model`.
        preamble: Called with a new picture: text that stands in front of the question (All Tools).
    """

    def __init__(
        self,
        tools: Tools,
        *,
        template: str = "",
        mode: str = "Crop",
        preamble: Callable[[Image.Image], str] | None = None,
        system: Message | None = None,
    ) -> None:
        self.tools, self.template, self.mode, self.preamble, self.system = tools, template, mode, preamble, system
        self.said: list[Said] = []
        self.turn = Turn()
        self._forget()

    def _forget(self) -> None:
        """Begin a new conversation."""
        self.said = []
        self.mask: Any = None  # the first mask of the last tool that gave some, as run lengths
        self.segmentation: Any = None
        self.reference: Image.Image | None = None
        self.reference_mask: Image.Image | None = None

    # ------------------------------------------------------------------ the user's side

    def say(
        self,
        ask: Ask,
        text: str,
        image: Image.Image | None = None,
        *,
        stroke: np.ndarray | None = None,
        reference: Image.Image | None = None,
        reference_stroke: np.ndarray | None = None,
    ) -> Iterator[Event]:
        """The answer to a message; nothing if it is empty.

        Args:
            ask: Events of the model's answer to messages under changes of the sampling parameters; the generator
                returns its raw text.
            text: The question.
            image: A new picture; it begins a new conversation.
            stroke: What is painted on it [height, width]; its box goes into the question.
            reference, reference_stroke: A further picture for tools that compare, and what is painted on it.
        """
        self.turn = Turn()
        if not text and image is None:
            return
        text = text[: MOST_CHARACTERS if image is None else MOST_WITH_IMAGE]
        if image is not None:
            self._forget()
            text = pictures.with_box(text, None if stroke is None else pictures.stroke_box(stroke))
            if self.preamble is not None:
                text = f"{self.preamble(image)}\n\n{text}"
        self.turn.opened = not self.said
        if reference is not None:
            self.reference = reference
            painted = np.zeros(reference.size[::-1]) if reference_stroke is None else reference_stroke
            self.reference_mask = _picture(painted)
        self.said.append(Said("user", text, "question", image))
        yield from self._answer(ask)

    def branch(self) -> Dialogue:
        """The same conversation, to go on in another way."""
        other = copy.copy(self)
        other.said = [dataclasses.replace(one, pictures=list(one.pictures)) for one in self.said]
        other.turn = Turn()
        return other

    def replay(self, earlier: Sequence[tuple[str, str, Image.Image | None]]) -> None:
        """Take up a conversation that went on elsewhere, of (role, text, picture) of every message."""
        for role, text, image in earlier:
            if image is not None:
                self._forget()
                text = pictures.with_box(text, None)
            self.said.append(Said(role, text, "question" if role == "user" else "answer", image))

    def _answer(self, ask: Ask) -> Iterator[Event]:
        first = yield from self._ask(ask, {}, final=False)
        lines = split(first)
        self.turn.actions = None if lines is None else decode(lines.actions)
        action = the_action(self.turn.actions)
        if action is not None:
            action.params.pop("image", None)
            self.turn.actions = [{**self.turn.actions[0], "API_params": action.params}]
        if action is None or action.name not in self.tools:
            self._close(first, "answer")
            return
        self._close(first, "call")
        asked = self.said[-2]
        question = (asked.text or "") if asked.image is None else (asked.text or "").replace("<image>", "")
        if lines.thoughts.strip():
            yield ReasoningDelta(text=lines.thoughts.strip(), stage="thoughts")
        name, payload = self._payload(action.name, action.params)
        yield TraceEvent(name="tool_call", data={"name": name, "arguments": action.params})
        result = self.tools(name, payload)
        self.turn.name, self.turn.payload, self.turn.result = name, payload, result
        self._keep(result)
        told = cleaned(name, result)
        yield TraceEvent(name="tool_result", data={"name": name, "result": told})
        self.said.append(Said("user", asked_again(result_text(name, result), question), "result"))
        second = yield from self._ask(ask, {"top_p": 1.0}, final=True)
        self._close(second, "final")
        for shown in self._shown(name, action.params, result, told):
            self.said[-1].pictures.append(shown)
            yield PictureEvent(image=shown, caption=name)

    def _ask(self, ask: Ask, changes: Mapping[str, Any], *, final: bool) -> Iterator[Event]:
        """Pass on what is certain of an answer, then the rest of it if it is the user's; its raw text."""
        messages = self.messages()
        self.said.append(Said("assistant", None, "open"))
        streaming = False
        events = ask(messages, changes)
        while True:
            try:
                event = next(events)
            except StopIteration as stopped:
                raw = (stopped.value or "").strip()
                break
            streaming = streaming or isinstance(event, ReasoningDelta)
            if streaming and isinstance(event, (ReasoningDelta, TextDelta)):
                yield event
        if not streaming:
            lines = split(raw)
            decoded = None if lines is None else decode(lines.actions)
            action = the_action(decoded)
            if lines is not None and (final or decoded == []):
                yield from _text(lines.value.strip())
            elif action is None or action.name not in self.tools:
                yield from _text(raw)
        return raw

    def _close(self, text: str, kind: str) -> None:
        self.said[-1].text, self.said[-1].kind = text, kind

    # ------------------------------------------------------------------ tools

    def _payload(self, name: str, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The tool that serves a name, and what it is sent."""
        image = self.image
        sent = None if image is None else pictures.for_tool(image)
        payload: dict[str, Any] = {"image": sent, **THRESHOLDS, **params}
        if name == "inpainting":
            payload["mask"] = self.mask
        if name in ("openseed", "controlnet"):
            if name == "controlnet":
                payload["mask"] = self.segmentation
            payload["mode"], name = name, "controlnet"
        if name == "seem":
            payload["refimg"], payload["refmask"] = self.reference, self.reference_mask
        return name, payload

    def _keep(self, result: Mapping[str, Any]) -> None:
        masks = result.get("masks_rle")
        if isinstance(masks, Sequence) and masks:
            self.mask = masks[0]
        if result.get("image_seg") is not None:
            self.segmentation = result["image_seg"]

    def _shown(
        self, name: str, params: Mapping[str, Any], result: Mapping[str, Any], told: Mapping[str, Any]
    ) -> Iterator[Image.Image]:
        """Pictures of an answer: what the tool made, or the user's picture with what it found."""
        published = name in (*BOXED, *BOXED_AND_MASKED, "sam")
        made = any(result.get(key) is not None for key in MADE)
        found = not made and (published or "phrases" in told or bool(result.get("masks_rle")))
        if found and self.image is not None and "error" not in result:
            shown = pictures.for_model(self.image, self.mode)
            points = name == "sam" and "points" in params
            drawing = None if points else pictures.boxes_in_pixels(told, shown.size)
            if drawing is not None:
                self.turn.drawings.append(drawing)
                shown = pictures.draw_boxes(shown, drawing)
            if name not in BOXED:
                shown = pictures.draw_masks(shown, result.get("masks_rle") or ())
            if points:
                shown = pictures.draw_points(shown, params["points"])
            yield shown
            return
        for key in MADE:
            one = result.get(key)
            if one is not None:
                yield from one if isinstance(one, (list, tuple)) else [one]
                return

    # ------------------------------------------------------------------ what others see

    @property
    def held_bytes(self) -> int:
        """What its pictures take."""
        held = [picture for one in self.said for picture in (one.image, *one.pictures) if picture is not None]
        held += [one for one in (self.segmentation, self.reference) if isinstance(one, Image.Image)]
        made = getattr(getattr(self.tools, "artefacts", None), "held_bytes", 0)
        return made + sum(picture.width * picture.height * len(picture.getbands()) for picture in held)

    @property
    def image(self) -> Image.Image | None:
        """The user's picture."""
        return next((one.image for one in self.said if one.image is not None), None)

    def messages(self) -> list[Message]:
        """The conversation for the model."""
        found: list[Message] = [] if self.system is None else [self.system]
        for place, one in enumerate(self.said):
            if one.image is None:
                found.append({"role": one.role, "content": [{"type": "text", "text": one.text or ""}]})
                continue
            part = {"type": "image", "image": pictures.for_model(one.image, self.mode)}
            text = (one.text or "").replace("<image>", "").strip()
            if place == 0 and is_tagged(self.template):
                found.append({"role": "user", "content": [part]})
                found.append({"role": "assistant", "content": [{"type": "text", "text": "Received."}]})
                found.append({"role": "user", "content": [{"type": "text", "text": text}]})
            else:
                found.append({"role": "user", "content": [part, {"type": "text", "text": text}]})
        return found

    def transcript(self, debug: bool = False) -> list[Row]:
        """What the user is shown, in order, as the published page has it; texts of models and tools are not escaped.

        Args:
            debug: Whether thoughts, calls and results are shown too, small and grey. Without, a text that has no
                value to show is a placeholder.
        """
        rows: list[Row] = []
        said = iter(self.said)
        for one in said:
            text = one.text or ""
            if one.image is not None:
                rows.append(Row("user", "", [pictures.for_chat(one.image)]))
                text = text.replace("<image>", "").strip()
            if one.role == "user":
                rows += [Row("user", text, [])] if text else []
            elif one.kind == "call":
                result, final = next(said), next(said)
                shown = list(map(pictures.for_chat, final.pictures))
                rows.append(Row("assistant", _with_call(text, result.text or "", final.text or "", debug), shown))
            else:
                rows.append(Row("assistant", _without_call(text, debug), []))
        return rows


RULE = '<hr width="100%" size="1" color="silver" align="center">'
BEGIN = '"th'  # of a text that the published page reads as three lines


def _small(text: str) -> str:
    return f'<span style="font-size: 12px; color: gray;line-height: 1.0;">{text}</span>'


def _head(lines: Lines) -> str:
    """The lines before a value, its label included."""
    return f"{THOUGHTS} {lines.thoughts.strip()}\n{ACTIONS} {lines.actions.strip()}\n{VALUE}"


def _waiting(text: str) -> str:
    """The page's placeholder; its dots go by the length of what it stands for."""
    return f'"thinking{"." * (len(text) % 21 // 3)}"'


def _without_call(text: str, debug: bool) -> str:
    if not text.startswith(BEGIN):
        return text
    lines = split(text)
    if lines is None:
        return text if debug else _waiting(text)
    decoded = decode(lines.actions)
    if decoded is None or decoded:  # nothing was called, so the text is the answer
        return text
    return (_small(_head(lines) + "\n") if debug else "") + lines.value.strip()


def _with_call(call: str, result: str, final: str, debug: bool) -> str:
    lines, last = split(call), split(final)
    steps = [f"{_head(lines)} {lines.value.strip()}", result.strip().replace("\n\n", "\n")]
    whole = RULE.join(map(_small, [*steps, final if last is None else _head(last)]))
    if last is None:
        return whole if debug else _waiting(whole)
    return (f"{whole}\n" if debug else "") + last.value.strip()


def _text(text: str) -> Iterator[Event]:
    if text:
        yield TextDelta(text=text)


def _picture(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((np.asarray(mask) != 0).astype(np.uint8) * 255)
