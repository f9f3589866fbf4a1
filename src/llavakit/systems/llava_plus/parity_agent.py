"""Golden sessions of LLaVA-Plus: a scripted model and scripted tools behind the responder that users talk to."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from llavakit.conversation.messages import is_media, normalise
from llavakit.conversation.template import get_template
from llavakit.conversation.turns import Event
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import RawDelta
from llavakit.media.image import load_image
from llavakit.proof.entries import byte_tokenizer, prompt_text, text_processor
from llavakit.proof.golden import Case, Example, Result, component, examples, take
from llavakit.systems.llava_plus.agent import ToolUser
from llavakit.systems.llava_plus.dialogue import Dialogue
from llavakit.systems.llava_plus.grammar import ThreeLines
from llavakit.systems.llava_plus.names import template_of
from llavakit.tools.rle import encode_mask

COLOUR = (120, 60, 30)  # pictures of a case are flat; only their sizes are given
ROLES = {"v0": ("Human", "Assistant"), "mpt": ("<|im_start|>user\n", "<|im_start|>assistant\n")}


def blank(size: Sequence[int]) -> Image.Image:
    """A flat picture."""
    return Image.new("RGB", tuple(size), COLOUR)


def painted(size: Sequence[int], rectangles: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Filled rectangles as run lengths."""
    mask = np.zeros((size[1], size[0]), bool)
    for x0, y0, x1, y1 in rectangles:
        mask[y0:y1, x0:x1] = True
    return encode_mask(mask)


class Stage:
    """What the scripted model and tools say, and every call of them."""

    def __init__(self, run: Mapping[str, Any], template: str, worker: str) -> None:
        self.outputs = iter(run["llm_outputs"])
        self.responses = iter(run["tool_responses"])
        self.template, self.worker = template, worker
        self.calls: list[dict[str, Any]] = []


class ScriptedModel(Responder):
    """Says what the case scripts, read by the system's codec as a model's own text would be."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(name=stage.worker)
        self.stage = stage
        self.processor = text_processor(byte_tokenizer(), stage.template)

    def run(self, call: Call) -> Iterator[Event]:
        messages = normalise(call.messages)
        sampling = call.sampling
        first = not any(one["kind"] == "tool" for one in self.stage.calls)
        params = {"temperature": sampling.temperature} | ({"top_p": sampling.top_p} if first else {})
        params |= {"max_new_tokens": sampling.max_new_tokens, "stop": get_template(self.stage.template).stop[0]}
        images = [load_image(part["image"]) for message in messages for part in message["content"] if is_media(part)]
        self.stage.calls.append(
            {
                "kind": "llm",
                "worker": self.stage.worker,
                "prompt": prompt_text(self.stage.template, messages, add_generation_prompt=True),
                "params": params,
                "images": [{"format": "PNG", "size": list(image.size)} for image in images],
            }
        )
        text = next(self.stage.outputs)
        parser = ThreeLines().parser()
        yield RawDelta(text=text)
        yield from parser.feed(text)
        yield from parser.finish()


class ScriptedTools:
    """Finds what the case scripts."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __contains__(self, name: object) -> bool:
        return True

    def __call__(self, name: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        shown = {key: _described(key, value) for key, value in payload.items()}
        self.stage.calls.append({"kind": "tool", "worker": name, "payload": shown})
        return {key: _opened(key, value) for key, value in next(self.stage.responses).items()}


def _described(key: str, value: Any) -> Any:
    if not isinstance(value, Image.Image):
        return value
    if key == "mask":
        buffer = io.BytesIO()
        value.save(buffer, "JPEG")
        return base64.b64encode(buffer.getvalue()).decode()
    return {"format": "JPEG" if key.startswith("ref") else "PNG", "size": list(value.size)}


def _opened(key: str, value: Any) -> Any:
    if key in ("edited_image", "image_seg"):
        return blank(value["size"])
    if key == "iou_sort_masks":
        return [blank(one["size"]) for one in value]
    return value


def session(config: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """All turns of one session."""
    run = take(run)
    template = template_of(config["model_name"])
    stage = Stage(run, template, config["model_name"])
    responder = ToolUser(ScriptedModel(stage), tools=ScriptedTools(stage))
    fields = {"temperature": config.get("temperature", 0.2), "top_p": config.get("top_p", 0.7)}
    fields["max_new_tokens"] = config.get("max_new_tokens", 512)
    messages: list[dict[str, Any]] = []
    dialogue: Dialogue | None = None
    turns = []
    for turn in run["turns"]:
        stage.calls = []
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.get("text") or ""}]
        options: dict[str, Any] = {}
        if turn.get("image"):
            size = turn["image"]["size"]
            content.insert(0, {"type": "image", "image": blank(size)})
            options |= {"stroke": painted(size, turn["stroke"])} if turn.get("stroke") is not None else {}
        if turn.get("ref") and turn.get("image"):  # the original takes a reference with a new picture alone
            options["reference"] = data_url(blank(turn["ref"]["size"]))
            if turn.get("ref_stroke") is not None:
                options["reference_stroke"] = painted(turn["ref"]["size"], turn["ref_stroke"])
        message = {"role": "user", "content": content}
        answer = responder.submit([*messages, message], **fields, **options).result()
        ignored = not stage.calls
        if not ignored:
            messages += [message, {"role": "assistant", "content": answer.content}]
            dialogue = responder.dialogue_of(messages)
        turns.append(_turn(dialogue, stage, template, ignored, config.get("render", True)))
    return {"turns": turns}


def data_url(image: Image.Image) -> str:
    """A picture as a client sends it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _turn(dialogue: Dialogue | None, stage: Stage, template: str, ignored: bool, render: bool) -> dict[str, Any]:
    turn = None if dialogue is None or ignored else dialogue.turn

    def rows(debug: bool) -> list[list[str | None]]:
        if not render or dialogue is None:
            return []
        shown = []
        for row in dialogue.transcript(debug):
            pictures = [f"<IMG {one.width}x{one.height}>" for one in row.pictures]
            texts = [row.text] if row.text or row.role == "assistant" else []
            shown.append(["\n".join([*texts, *pictures]), None])
        return shown

    return {
        "template": template if turn is not None and turn.opened else None,
        "tool_cfg": None if turn is None else turn.actions,
        "reached_tool_step": not ignored,
        "exception": None,
        "calls": list(stage.calls),
        "messages": [] if dialogue is None else [_message(one, template) for one in dialogue.said],
        "display_hidden": rows(False),
        "display_debug": rows(True),
        "state_mask_rle": None if dialogue is None else dialogue.mask,
        "state_has_image_seg": dialogue is not None and dialogue.segmentation is not None,
        "drawn_boxes_px": [list(drawing) for drawing in turn.drawings] if turn is not None else [],
    }


def _message(one: Any, template: str) -> dict[str, Any]:
    kind = next((kind for kind in ROLES if kind in template), "v1")
    user, assistant = ROLES.get(kind, ("USER", "ASSISTANT"))
    found = {"role": user if one.role == "user" else assistant, "text": one.text}
    if one.image is not None:
        found |= {"images": [list(one.image.size)], "tuple_len": 4}
    elif one.pictures:
        found |= {"images": [list(picture.size) for picture in one.pictures], "tuple_len": 3}
    return found


@component(ordered=True)
def agent(case: Case) -> Result:
    """One session."""
    return Result(json=session(case.config, case.inputs))


def agents(case: Case) -> list[Example]:
    """Sessions that know nothing of each other."""
    return examples(partial(session, case.config), case.inputs["runs"], "runs")
