"""Answering with tools: `llavakit chat MODEL --tools tools.yaml`, and the server with the same option.

The model's own calls are run here (`Dialogue`). A client that sends tools of its own runs them itself: then the model
answers alone, and its codec turns the three lines into OpenAI's `tool_calls` and back.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from llavakit.conversation.messages import Message, is_media, normalise, text_of
from llavakit.conversation.turns import Event, TextDelta
from llavakit.errors import UserError
from llavakit.generation.asking import content_of
from llavakit.generation.responder import Call, Messages, Responder
from llavakit.media.image import load_image
from llavakit.media.policy import decode_data_url
from llavakit.systems.llava_plus.dialogue import MOST_TOKENS, THRESHOLDS, Dialogue, Tools
from llavakit.systems.llava_plus.grammar import ThreeLines
from llavakit.systems.llava_plus.results import result_text
from llavakit.systems.llava_plus.workers import both
from llavakit.tools import Artefacts, Result, Toolbox, load_toolbox
from llavakit.tools.rle import decode_mask
from llavakit.tools.skill import IMAGE, SkillError

# Names that the released model writes, and what serves them if nothing of the name itself is there.
SERVED = {
    "ocr": ("easyocr",),
    "easyocr": ("ocr",),
    "inpainting": ("stable_inpainting", "inpaint"),
    "sam": ("segment",),
    "grounded_sam": ("grounding_dino+sam",),
    "stable-diffusion": ("stable_diffusion",),
    "sd": ("stable-diffusion", "stable_diffusion"),
    "instruct-pix2pix": ("instruct_pix2pix",),
    "ip2p": ("instruct-pix2pix", "instruct_pix2pix"),
    "clip": ("retrieval", "retrieve"),
    "retrieval": ("retrieve",),
    "semantic-sam": ("semantic_sam",),
}
UNASKED = ("ram+grounding_dino", "blip2+grounding_dino")  # pairs that need no words
PAIRS = ("ram+grounding_dino", "blip2+grounding_dino", "grounding_dino+sam")
REFERENCE_BYTES = 32 * 2**20
KEPT, KEPT_BYTES, KEPT_SECONDS = 256, 512 * 2**20, 3600.0  # conversations that are remembered, and for how long
SHARE = 4  # of these one of several owners has at most this part
ARTEFACTS = {"most": 32, "most_bytes": 64 * 2**20, "seconds": KEPT_SECONDS}  # of one conversation
UNDERSTANDING = ("detect_shapes", "grounding_dino", "owlv2", "blip2", "ram", "ocr", "easyocr", "retrieve", "retrieval")


class AgentOptions(BaseModel):
    """Options of a request.

    Attributes:
        agent: "fly": tools are called on demand; "all": those that understand a picture run on it at once, and what
            they find stands in front of the question; "none": the model alone.
        stroke: What is painted on the new picture, as COCO run lengths {"size", "counts"}.
        reference: A further picture for tools that compare, as a data URL.
        reference_stroke: What is painted on that one.
    """

    agent: Literal["fly", "all", "none"] = "fly"
    stroke: dict[str, Any] | None = Field(None, description="COCO run lengths of what is painted on the new picture.")
    reference: str | None = Field(None, description="Data URL of a further picture, for tools that compare.")
    reference_stroke: dict[str, Any] | None = Field(None, description="What is painted on the further picture.")


class PublishedTools:
    """A toolbox under the names, and with the results, that LLaVA-Plus knows.

    Args:
        toolbox: The skills.
        artefacts: Of the conversation.
    """

    def __init__(self, toolbox: Toolbox, artefacts: Artefacts) -> None:
        self.toolbox, self.artefacts = toolbox, artefacts

    def skill(self, name: object) -> str | None:
        """The skill that serves a name."""
        names = (name, *SERVED.get(name, ())) if isinstance(name, str) else ()
        return next((one for one in names if one in self.toolbox), None)

    def __contains__(self, name: object) -> bool:
        return self.skill(name) is not None or (name in PAIRS and all(map(self.__contains__, name.split("+"))))

    def __call__(self, name: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The result in the published form; of a call that failed its `error`."""
        found = self.skill(name)
        if found is None:
            try:
                return both(name, payload, self)
            except SkillError as error:
                return {"error": str(error)}
        known = self.toolbox.skills[found].properties
        # What the loop adds to every call goes to the skills that take it; what the model wrote must fit.
        added = {*THRESHOLDS, "image", "mask", "mode", "refimg", "refmask"}
        arguments = {key: value for key, value in payload.items() if key in known or key not in added}
        return published(self.toolbox.call(found, arguments, self.artefacts))


def published(result: Result) -> dict[str, Any]:
    """A result with pictures and masks under the published names."""
    if result.error is not None:
        return {"error": result.error}
    found = result.whole()
    found.pop("artefacts", None)
    return found | dict(result.pictures)


class NoTools:
    """No tools at all."""

    def __contains__(self, name: object) -> bool:
        return False

    def __call__(self, name: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        return {"error": f"there is no tool {name}"}


class ToolUser(Responder):
    """A model that calls tools.

    Args:
        model: Who answers.
        tools: A configuration of tools (see `llavakit.tools.configuration`), its file, a `Toolbox`, or what `Dialogue`
            takes; None for a model without tools of its own.
        agent: Default of the option of a request.
    """

    options = AgentOptions

    def __init__(
        self,
        model: Responder,
        *,
        tools: str | Path | Mapping[str, Any] | Toolbox | Tools | None = None,
        agent: Literal["fly", "all", "none"] = "fly",
    ) -> None:
        super().__init__(model)
        if isinstance(tools, (str, Path, Mapping)):
            tools = load_toolbox(None if tools in ("", True) else tools)
        self.tools: Toolbox | Tools | None = tools
        self.agent = agent
        # by owner and what was said; with bytes and time
        self._kept: OrderedDict[tuple[str, str], tuple[Dialogue, int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, call: Call) -> Iterator[Event]:
        """One reply; calls and results are in the trace, pictures of tools in the answer."""
        options = call.options or AgentOptions()
        agent = options.agent if "agent" in options.model_fields_set else self.agent
        if self.tools is None or agent == "none" or call.tools:
            yield from call.stream(self.main)
            return
        messages = normalise(call.messages)
        if messages[-1]["role"] != "user":
            raise UserError("messages: the last one must be the user's")
        image = self._image(messages[-1], call)
        if image is None and not text_of(messages[-1]):
            return  # as published: nothing is asked
        dialogue = self._dialogue(call, messages, agent)
        if options.stroke is not None and image is None:
            raise UserError("stroke: belongs to a new picture; the message has none")
        reference = None if options.reference is None else self._reference(options.reference)
        if options.reference_stroke is not None and reference is None:
            raise UserError("reference_stroke: there is no reference that it could belong to")
        if image is not None and isinstance(dialogue.tools, PublishedTools):
            dialogue.tools.artefacts = Artefacts(image, **ARTEFACTS)

        def ask(told: list[Message], changes: Mapping[str, Any]) -> Iterator[Event]:
            length = min(call.sampling.max_new_tokens, MOST_TOKENS)
            yield from call.stream(self.main, told, max_new_tokens=length, tools=(), **changes)
            answer = call.answer
            if answer.text or not (answer.calls or answer.reasoning):
                return answer.text or answer.content
            return ThreeLines().render(answer)  # of a model elsewhere, whose server has read the lines

        content = ""
        for event in dialogue.say(
            ask,
            text_of(messages[-1]),
            image,
            stroke=_stroke(options.stroke, image, "stroke"),
            reference=reference,
            reference_stroke=_stroke(options.reference_stroke, reference, "reference_stroke"),
        ):
            content += event.text if isinstance(event, TextDelta) else ""
            yield event
        said: Message = {"role": "assistant", "content": [{"type": "text", "text": content}]}
        self._remember((call.owner, _key([*messages, said])), dialogue)

    # ------------------------------------------------------------------ conversations

    def dialogue_of(self, messages: Messages, owner: str = "") -> Dialogue | None:
        """What is remembered of an owner's conversation that ends with an answer of this responder."""
        with self._lock:
            return self._recall((owner, _key(normalise(messages))))

    def _recall(self, key: tuple[str, str]) -> Dialogue | None:
        """A conversation that has not expired; under the lock."""
        past = time.monotonic() - KEPT_SECONDS
        while self._kept and next(iter(self._kept.values()))[2] < past:
            self._kept.popitem(last=False)
        return self._kept[key][0] if key in self._kept else None

    def _remember(self, key: tuple[str, str], dialogue: Dialogue) -> None:
        """Keep a conversation; where there is no room its owner's oldest go, and nobody else's."""
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = dialogue, dialogue.held_bytes, time.monotonic()
            own = [known for known in self._kept if known[0] == key[0]]
            for oldest in own:
                if not (self._too_many(self._kept, 1) or self._too_many(own, SHARE if key[0] else 1)):
                    return
                del self._kept[oldest]
                own = own[1:]

    def _too_many(self, keys: Collection[tuple[str, str]], share: int) -> bool:
        return share * len(keys) > KEPT or share * sum(self._kept[key][1] for key in keys) > KEPT_BYTES

    def _dialogue(self, call: Call, messages: list[Message], agent: str) -> Dialogue:
        """The conversation so far: remembered, or made of the messages."""
        earlier = messages[:-1]
        with self._lock:
            known = self._recall((call.owner, _key(earlier))) if earlier else None
        if known is not None:
            branch = known.branch()
            if isinstance(branch.tools, PublishedTools):  # a new picture there is none here
                branch.tools = PublishedTools(branch.tools.toolbox, branch.tools.artefacts)
            return branch
        tools: Any = self.tools
        preamble = None
        if isinstance(tools, Toolbox):
            tools = PublishedTools(tools, Artefacts(**ARTEFACTS))
            preamble = functools.partial(all_results, tools) if agent == "all" else None
            tools = NoTools() if agent == "all" else tools
        template = str(getattr(getattr(self.main, "processor", None), "template", "") or "")
        system = earlier[0] if earlier and earlier[0]["role"] == "system" else None
        dialogue = Dialogue(tools, template=template, preamble=preamble, system=system)
        dialogue.replay([(one["role"], text_of(one), self._image(one, call)) for one in earlier if one is not system])
        return dialogue

    def _image(self, message: Message, call: Call) -> Image.Image | None:
        """The picture of a message, opened; of several the first, as published."""
        for part in message["content"]:
            if is_media(part):
                if part["type"] != "image":
                    raise UserError(f"messages: tools work on pictures, not on a {part['type']}")
                if call.before_media is not None:
                    call.before_media(part)
                return load_image(part["image"], **self._limits())
        return None

    def _reference(self, url: str) -> Image.Image:
        if not url.startswith("data:"):
            raise UserError("reference: must be a data URL")
        return load_image(decode_data_url(url, REFERENCE_BYTES), **self._limits())

    def _limits(self) -> dict[str, Any]:
        return {} if self._media_limits is None else {"limits": self._media_limits}

    _media_limits: Any = None

    def restrict(self, limits: Any) -> None:
        self._media_limits = limits
        super().restrict(limits)


def all_results(tools: PublishedTools, image: Image.Image) -> str:
    """What every tool that understands pictures finds in one, for the mode All Tools."""
    lines = []
    for skill in tools.toolbox.ready():
        required = [name for name in skill.parameters.get("required", ()) if name != IMAGE]
        if skill.name in UNDERSTANDING and not required:
            lines.append(result_text(skill.name, published(tools.toolbox.call(skill.name, {"image": image}))))
    lines += [result_text(pair, tools(pair, {"image": image})) for pair in UNASKED if pair in tools]
    return "\n".join(lines)


def _stroke(value: Any, image: Image.Image | None, where: str) -> np.ndarray | None:
    """What is painted on a picture."""
    if value is None or image is None:
        return None
    found = decode_mask(value, where)
    if found.shape != (image.height, image.width):
        given = f"{found.shape[1]} x {found.shape[0]}"
        raise UserError(f"{where}: is {given} pixels, the picture {image.width} x {image.height}")
    return found


def _key(messages: Sequence[Message]) -> str:
    """What tells conversations apart: roles, texts and the content of pictures."""
    said = [[m["role"], text_of(m), [content_of(p) for p in m["content"] if is_media(p)]] for m in messages]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode("utf-8", "replace")).hexdigest()
