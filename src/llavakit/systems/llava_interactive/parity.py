"""LLaVA-Interactive's golden components: scripted tools and a scripted model behind the session that users work in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llavakit.conversation.messages import is_media, normalise
from llavakit.conversation.template import get_template
from llavakit.conversation.turns import Event, TextDelta
from llavakit.editing.chat import PictureChat
from llavakit.editing.geometry import CANVAS, LATENT, Box, centre, centre_square, extent
from llavakit.editing.layout import Mismatch, NothingToAdd, NothingToMake, layout_request
from llavakit.editing.objects import NoSuchObject, Objects, Segmented
from llavakit.editing.session import Backends, NothingNamed, NotSegmented, Session, SeveralObjects
from llavakit.editing.tabs import COMPOSE, CREATE, INPAINT, TABS
from llavakit.errors import UserError
from llavakit.generation.responder import Call, Responder
from llavakit.media.image import load_image
from llavakit.proof.entries import array as array_of
from llavakit.proof.entries import prompt_text
from llavakit.proof.golden import Case, Result, component
from llavakit.systems.llava_interactive.published import (
    Canvas,
    WorkingImage,
    grounding_weights,
    kept_latents,
    mirrored,
)

TASKS = {"Compose": COMPOSE, "Grounded Inpainting": INPAINT, "Grounded Generation": CREATE}
TASK_OF = {tab: task for task, tab in TASKS.items()}
ERRORS = {
    Mismatch: "There is a mismatching between bounding boxes and the given grounding instruction.",
    NothingToAdd: "There is nothing to inpaint. Please give grounding instructions and draw the bounding box.",
    NothingToMake: "There is nothing to generate. Please give language instructions.",
    NotSegmented: "The segmentation step must be completed first before generating a new image",
    NothingNamed: "Please providing grounding text to match the identified object",
}
FILLING, DRAWN = (1, 2, 3), (9, 8, 7)  # what the scripted tools paint


def arrays(case: Case) -> dict[str, np.ndarray]:
    """The case's tensors."""
    return {name: array_of(values) for name, values in case.tensors.items()}


def tensor(array: np.ndarray) -> Tensor:
    """An array of its own as a tensor; masks as 0 and 255."""
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    return torch.from_numpy(np.array(array))


# Arithmetic


def boxes_of_masks(case: Case) -> dict[str, Any]:
    """Boxes of masks, in the order of their names."""
    return {"boxes": [extent(mask) for _, mask in sorted(arrays(case).items())]}


def crops(case: Case) -> Result:
    """Middle squares, as they are and resized."""
    sides = case.inputs["hw"]
    found = {}
    for name, picture in arrays(case).items():
        found |= {f"{name}_center{side}": tensor(centre(picture, side)) for side in sides}
        found[f"{name}_crop{CANVAS}"] = tensor(centre_square(picture, CANVAS)[::8, ::8])
        found[f"{name}_crop{LATENT}"] = tensor(centre_square(picture, LATENT))
    return Result(tensors=found)


def padding(case: Case) -> Result:
    """Pictures padded for the hole filler."""
    multiple = case.inputs["modulo"]
    return Result(tensors={name: tensor(mirrored(array, multiple)) for name, array in arrays(case).items()})


def latent_mask(case: Case) -> Result:
    """Latents that are kept, for every picture of a batch."""
    kept = kept_latents(case.inputs["boxes"], case.inputs["size"])
    return Result(tensors={"keep_mask": torch.from_numpy(kept)[None, None].repeat(case.inputs["batch"], 1, 1, 1)})


def schedules(case: Case) -> dict[str, Any]:
    """Weights of the grounding layers."""
    return {"alphas": [grounding_weights(steps, shares) for steps, shares in case.inputs["items"]]}


# Objects


class Script:
    """Scripted tools of an editing session, and what they were asked."""

    def __init__(self, case: Case) -> None:
        self.inputs = case.inputs
        self.log: list[dict[str, Any]] = []
        self.holes: list[np.ndarray] = []
        self.requests: list[dict[str, Any]] = []
        self.backgrounds: list[np.ndarray] = []

    def segment(self, image: np.ndarray, text: str | None = None, mask: Any = None, **_: Any) -> Segmented:
        """Rectangles with the numbers of their objects."""
        self.text = text
        size = self.inputs.get("seem_size") or (image.shape[1], image.shape[0])
        picture = np.asarray(Image.fromarray(image).resize(tuple(size), Image.Resampling.NEAREST))
        ids = np.zeros(picture.shape[:2], np.uint8)
        for number, rectangles in self.inputs["objects"]:
            for x0, y0, x1, y1 in rectangles:
                ids[y0:y1, x0:x1] = number
        labels = {int(number): label for number, label in self.inputs["labels"].items()}
        return Segmented(ids, labels, picture)

    def fill(self, image: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """Holes in one colour."""
        self.holes.append(hole)
        return np.where(hole[..., None], np.array(FILLING, np.uint8), image)

    def replace(self, image: np.ndarray, boxes: Sequence[Box], text: str, seed: int | None) -> np.ndarray:
        """Nothing new."""
        self.backgrounds.append(image)
        self.requests.append(
            {
                "task": TASK_OF[INPAINT],
                "language_instruction": "",
                "grounding_texts": text,
                "alpha_sample": 0.3,
                "guidance_scale": 7.5,
                "batch_size": 1,
                "fix_seed": seed is not None,
                "rand_seed": seed or 0,
                "use_actual_mask": False,
                "append_grounding": True,
                "style_cond_image": None,
                "inpainting_mask": None,
                "boxes": [list(box) for box in boxes],
                "sketch_pad_is_background": True,
            }
        )
        return image


def edit_session(case: Case) -> Result:
    """Events of the page on one picture: what is selected, moved, cut out, filled and asked of the generator."""
    script, picture = Script(case), arrays(case)["image"]
    session = Session(Backends(script, script, script), pastes=False)
    asked: list[list[int]] = []
    tensors: dict[str, np.ndarray] = {}
    log: list[dict[str, Any]] = []
    for number, event in enumerate(case.inputs["events"]):
        entry: dict[str, Any] = {"event": event}
        try:
            given = _event(event, picture)
            if event["op"] == "segment":
                session.apply({"op": "upload", "image": picture})  # the sketch pad hands the picture over again
                size = [picture.shape[1], picture.shape[0]]
                reference = event.get("reftxt", "")
                called = {"task": event["task"], "reftxt": reference, "image_size": size, "mask_size": size}
                log.append({"seem": called})
            session.apply(given)
            if event["op"] == "generate":
                background = session.versions[-1].op == "remove"
                entry |= {"n_returned": 3 if background else 2}
                entry |= {"returned": "inpainted background" if background else "GENERATED"}
        except UserError as error:
            entry["exception"] = _exception(error, event)
        objects = session.objects
        if event["op"] == "generate" and objects is not None:
            asked = [list(box) for box in objects.placed()]
        if "exception" not in entry:
            tensors |= {f"ev{number}_{name}": value for name, value in _layers(event["op"], objects).items()}
        while len(script.holes) > sum(name.endswith("_hole_mask") for name in tensors):
            place = sum(name.endswith("_hole_mask") for name in tensors)
            tensors |= {f"lama{place}_image": objects.whole, f"lama{place}_hole_mask": script.holes[place]}
        log.append(entry | {"state": _state(objects, asked)})
    tensors |= {f"gligen_background_{place}": image for place, image in enumerate(script.backgrounds)}
    call = {"url": "http://localhost:9171/api/v2/image", "image_mode": "RGBA", "mask_mode": "L"}
    found = {"log": log, "gligen_calls": script.requests, "lama_calls": [call] * len(script.holes)}
    return Result(json=found, tensors={name: tensor(value) for name, value in tensors.items()})


def _event(event: Mapping[str, Any], picture: np.ndarray) -> dict[str, Any]:
    """An event of the page as one of the session."""
    match event["op"]:
        case "segment":
            named = event["task"] == ["Text"]
            mark = {"text": event.get("reftxt", "")} if named else {"mask": np.ones(picture.shape[:2], bool)}
            return {"op": "segment", "dilation": event["dilate"], **mark}
        case "move":
            return {"op": "move", "object": event["id"], "dx": event["by"][0], "dy": event["by"][1]}
        case "dilate":
            return {"op": "dilate", "dilation": event["dilate"]}
        case "generate":
            return {"op": "generate", "text": event["text"]}
    raise UserError(f"inputs.events: {event['op']!r} is unknown")


def _exception(error: UserError, event: Mapping[str, Any]) -> str:
    if isinstance(error, SeveralObjects):
        return "AssertionError: Only handle one segmented object at a time"
    if isinstance(error, NoSuchObject):
        return f"KeyError: {event.get('id', 1)}"
    if type(error) in ERRORS:
        return f"GrErr: {ERRORS[type(error)]}"
    raise error


def _layers(op: str, objects: Objects) -> dict[str, np.ndarray]:
    """What the original holds after an event."""
    if op == "move":
        return {"object_rgba": objects.changed[-1].pixels.copy(), "base_layer": objects.rest.copy()}
    if op not in ("segment", "dilate"):
        return {}
    found = {
        "object_mask": objects.mask,
        "keep_mask": objects.kept,
        "masked_background": objects.masked,
        "inpainted": objects.filled,
    }
    if op == "segment":
        shown = objects.whole.copy()
        shown[..., 3] = 255 - shown[..., 3]
        found["segmented_rgba"] = shown
    return found


def _state(objects: Objects | None, asked: list[list[int]]) -> dict[str, Any]:
    if objects is None:
        return {"move_no": 0, "seg_boxes": {}, "segment_info": None, "changed_objects": [], "boxes": asked}
    changed = [{"id": one.id, "text": one.label, "box": one.box and list(one.box)} for one in objects.changed]
    return {
        "move_no": objects.moves,
        "seg_boxes": {str(number): box and list(box) for number, box in objects.boxes.items()},
        "segment_info": {str(number): label for number, label in objects.found.labels.items()},
        "changed_objects": changed,
        "boxes": asked,
    }


# The canvas


def _painted(mask: Mapping[str, Any]) -> np.ndarray:
    width, height = mask["size"]
    painted = np.zeros((height, width, 3) if mask.get("channels") else (height, width), np.uint8)
    for x0, y0, x1, y1 in mask["rects"]:
        painted[y0:y1, x0:x1] = mask.get("value", 255)
    return painted


def box_drawing(case: Case) -> Result:
    """Painting on the canvas, event by event."""
    case.informational(*(f"inputs.events.{number}.text" for number in range(len(case.inputs["events"]))))  # of previews
    canvas, picture = Canvas(), arrays(case)["image"]
    steps: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    trigger = 0
    for number, event in enumerate(case.inputs["events"]):
        if event["op"] == "resize_masked":
            steps.append({"inpaint_hw": canvas.shrink()})
            tensors[f"ev{number}_canvas"] = canvas.shown()
            continue
        tab = TASKS[event["task"]]
        if event["op"] == "clear":
            canvas.clear()
            trigger += tab != INPAINT
            steps.append({"trigger": trigger, "state_empty": canvas == Canvas()})
            continue
        first = canvas.paint(tab, _painted(event["mask"]), picture)
        trigger += first
        steps.append(
            {
                "trigger": trigger,
                "image_scale": canvas.scale(tab),
                "boxes": None if first else [list(box) for box in canvas.boxes],
                "n_masks": len(canvas.masks),
                "has_original": canvas.original is not None,
            }
        )
    return Result(json={"steps": steps}, tensors={name: tensor(value) for name, value in tensors.items()})


def generator_requests(case: Case) -> Result:
    """Requests to the generator, or why there is none."""
    known, items, tensors, canvas = arrays(case), [], {}, Canvas()
    for number, item in enumerate(case.inputs["items"]):
        tab = TASKS[item["task"]]
        original = known[item["original"]] if "original" in item else known.get("image")
        try:
            request = layout_request(
                tab,
                item["boxes"],
                item["text"],
                item.get("language", ""),
                image=known[item["inpainting_image"]] if "inpainting_image" in item else None,
                mask=known[item["inpainting_mask"]] if "inpainting_mask" in item else None,
                original=original,
                side=item.get("inpaint_hw"),
            )
        except (Mismatch, NothingToAdd, NothingToMake) as error:
            items.append({"error": f"{ERRORS[type(error)]} Hit clear to start over."})
            continue
        canvas.generated(tab)
        made = request.result(np.full((CANVAS, CANVAS, 3), DRAWN, np.uint8))
        found = {
            "task": item["task"],
            "language_instruction": request.caption,
            "grounding_instruction": request.phrases,
            "inpainting_boxes": request.boxes,
            "alpha_sample": request.tau,
            "guidance": request.guidance,
            "batch": request.samples,
            "result_size": [made.shape[1], made.shape[0]],
            "draw_boxes_after": canvas.collects,
        }
        if request.image is not None:
            found["image_size"] = [request.image.shape[1], request.image.shape[0]]
            tensors[f"item{number}_image512"] = request.image[::16, ::16]
        if request.kept is not None:
            tensors[f"item{number}_keep_mask64"] = request.kept
        if request.original is not None:
            tensors[f"item{number}_result"] = made
        items.append(found)
    return Result(json={"items": items}, tensors={name: torch.from_numpy(np.array(v)) for name, v in tensors.items()})


@component(echoes=("log.*.0.other",), ordered=True)  # a log of events
def shared_state(case: Case) -> dict[str, Any]:
    """The working image between tabs, and what each tab shows."""
    working, log = WorkingImage(), []
    for number, event in enumerate(case.inputs["events"]):
        tab = TASKS.get(event.get("task"))
        match event["op"]:
            case "change_task":
                log.append(TASK_OF[working.next_tab])
            case "load":
                log.append(working.shown(tab))
            case "upload" | "generated":
                working.image = event["image"]
                log.append(working.image)
            case "update":
                log.append(working.entered(tab))
            case "trigger":
                log.append(event["n"] + (tab == CREATE))
            case "clear_grounding":
                canvas = Canvas(boxes=[(0, 0, 9, 9)], masks=[np.ones((CANVAS, CANVAS), bool)])
                canvas.clear()
                other = case.wanted.json["log"][number][0]["other"]  # of the script's state, which the original leaves
                log.append([{"boxes": canvas.boxes, "masks": canvas.masks, "other": other}, ""])
            case "compose" | "inpaint" | "generate":
                own = {"compose": COMPOSE, "inpaint": INPAINT, "generate": CREATE}[event["op"]]
                shown = TABS[own]
                log.append([TASK_OF[own], shown.draws, shown.caption, *[shown.draws] * 4])  # all but the caption
            case other:
                raise UserError(f"inputs.events: {other!r} is unknown")
    return {"log": log}


# The chat

TEMPLATE = "llava_v1"


class ScriptedModel(Responder):
    """Says what the case scripts; keeps what it was asked."""

    def __init__(self, outputs: Sequence[str]) -> None:
        super().__init__(name="scripted")
        self.outputs = iter(outputs)
        self.calls: list[dict[str, Any]] = []

    def run(self, call: Call) -> Iterator[Event]:
        messages = normalise(call.messages)
        images = [load_image(part["image"]) for turn in messages for part in turn["content"] if is_media(part)]
        sampling = call.sampling
        params = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        self.calls.append(
            {
                "prompt": prompt_text(TEMPLATE, messages, add_generation_prompt=True),
                "stop": get_template(TEMPLATE).stop[0],
                "images": [list(image.size) for image in images],
                "params": params | {"max_new_tokens": sampling.max_new_tokens},
            }
        )
        yield TextDelta(text=next(self.outputs))


def chat_flow(case: Case) -> dict[str, Any]:
    """Which messages carry the picture, and what the model is asked."""
    model = ScriptedModel(case.inputs["llm_outputs"])
    chat, log = PictureChat(model), []
    for event in case.inputs["events"]:
        if event["op"] == "working_image":
            chat.changed(Image.new("RGB", tuple(event["size"])))
            log.append({"op": "working_image"})
            continue
        model.calls = []
        answer = chat.say(event["text"])
        waiting = chat.waiting and list(chat.waiting.size)
        log.append(
            {
                "op": "say",
                "skipped": answer is None,
                "exception": None,
                "calls": model.calls,
                "image_slot_after": waiting,
                "n_messages": len(chat.messages),
            }
        )
    return {"log": log}


ADAPTERS = {
    "alpha_schedule": schedules,
    "bbox": boxes_of_masks,
    "box_drawing": box_drawing,
    "chat_flow": chat_flow,
    "crop": crops,
    "edit_session": edit_session,
    "gligen_request": generator_requests,
    "lama_pad": padding,
    "latent_mask": latent_mask,
    "shared_state": shared_state,
}
