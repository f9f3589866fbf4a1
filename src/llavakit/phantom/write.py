"""Worlds as folders: pictures, volumes and clips, records in LLaVA's format, questions for evaluation, and the truth.

    manifest.json              world, options, counts; its presence says that the folder is complete
    images/ videos/ volumes/   media, named after their items
    train.json, heldout.json   records: all questions about one item in one conversation
    captions.json              records for stage 1 (training cases): item and description; heldout_captions.json
    heldout_questions.jsonl    question_id, image | video | volume, text, answer, type, format
    boxes.json                 item -> image, size, boxes (fractions of width and height)
    kg.json                    knowledge: statements true of all cases; cases: statements true of one
    cases.jsonl                facts (and report) of every case
    texts.json                 sentences with every word of the world, to train a tokenizer on

A folder appears complete or not at all. The same call again finds the folder and does nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.phantom import words
from llavakit.phantom.base import Case, Item, Question, World, check_choice, generator, pick
from llavakit.registry import WORLDS, nearest

FORMATS = ("short", "sentence", "choice")
VOLUME_FORMATS = ("npy", "nii")
LITERALS = {"image": "<image>", "images": "<image>", "video": "<video>", "volume": "<image3d>"}
_LAYOUT = 1
"""Raised whenever the same options give another folder than before."""


def write_world(name: str, out: str | Path, *, n: int, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Write the first `n` cases of a world into a folder.

    Args:
        name: World, as registered ("thorax", "scene").
        out: The folder. If it holds the same data already, nothing is written.
        n: Number of cases; every tenth is held out.
        seed: Same seed, same data.
        options: Options of the world, and of the writer: `formats`, a comma-separated choice of "short" (a word,
            asked for by LLaVA-1.5's sentence), "sentence" (no format sentence) and "choice" (option letters), one of
            which is drawn for every conversation; `volume_format`, "npy" or "nii" (NIfTI, needs nibabel);
            `progress`, whether to show a progress bar. Options that are None count as not given.

    Returns:
        The manifest, with `out` (the folder) and `reused` (whether it was there already).

    Raises:
        UserError: If the world or an option is unknown, or the folder holds something else.
    """
    out = Path(out)
    options = {key: value for key, value in options.items() if value is not None}
    progress = bool(options.pop("progress", True))
    formats = options.pop("formats", "short")
    formats = tuple(formats.split(",")) if isinstance(formats, str) else tuple(formats)
    for entry in formats:
        check_choice("formats", entry, FORMATS)
    volume_format = check_choice("volume_format", options.pop("volume_format", "npy"), VOLUME_FORMATS)
    if n < 1:
        raise UserError(f"n: {n} cases cannot be written; use 1 or more")
    world = build_world(name, **options)
    generator(seed, 0, "check")
    plan = {
        "world": name,
        "version": [world.version, _LAYOUT],
        "n": n,
        "seed": seed,
        "options": json.loads(json.dumps(options)),
        "formats": list(formats),
        "volume_format": volume_format,
    }
    if (found := _find(out, plan)) is not None:
        return found | {"out": str(out), "reused": True}
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        workplace.chmod(0o777 & ~_umask())
        writer = _Writer(workplace, world, seed, formats, volume_format)
        for index in _track(range(n), f"phantom {name}", progress):
            writer.add(world.sample(seed, index), index)
        manifest = plan | {"counts": writer.finish()}
        _dump(workplace / "manifest.json", manifest)
        try:
            os.rename(workplace, out)
        except OSError:
            # Another process was faster; its folder is taken if it holds the same data.
            found = _find(out, plan)
            if found is None:
                raise
            return found | {"out": str(out), "reused": True}
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return manifest | {"out": str(out), "reused": False}


def build_world(name: str, **options: Any) -> World:
    """The world called `name` with these options.

    Raises:
        UserError: If there is no such world, it has no such option, or a value is out of range.
    """
    cls = WORLDS.get(name)
    known = [p for p in inspect.signature(cls).parameters if p != "self"]
    for option in options:
        if option not in known:
            raise UserError(f"world {name!r} has no option {option!r}{nearest(option, known)}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"world {name!r}: {error}") from error


def _find(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that holds this very data; None if there is no folder or it is empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads((out / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: holds something else (no readable manifest.json); name another folder") from error
    differing = [key for key in plan if manifest.get(key) != plan[key]]
    if differing:
        raise UserError(f"{out}: holds data with another {', '.join(differing)}; name another folder or delete it")
    return manifest


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _track(numbers: range, label: str, show: bool) -> Any:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(numbers, label, console=console, transient=True, disable=not (show and console.is_terminal))


def _dump(path: Path, data: Any) -> None:
    """Write JSON with one entry of the outermost list or object per line."""
    line = json.JSONEncoder(ensure_ascii=False).encode
    if isinstance(data, dict):
        text = "{\n" + ",\n".join(f"{line(key)}: {line(value)}" for key, value in data.items()) + "\n}\n"
    else:
        text = "[\n" + ",\n".join(map(line, data)) + "\n]\n"
    path.write_text(text, encoding="utf-8")


class _Writer:
    """Collects the records of a world and writes media as they come."""

    def __init__(self, folder: Path, world: World, seed: int, formats: tuple[str, ...], volume_format: str) -> None:
        self.folder, self.world, self.seed = folder, world, seed
        self.formats, self.volume_format = formats, volume_format
        self.records: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
        self.captions: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
        self.questions: list[dict[str, Any]] = []
        self.boxes: dict[str, Any] = {}
        self.triples: dict[str, Any] = {}
        self.cases: list[dict[str, Any]] = []

    def add(self, case: Case, index: int) -> None:
        """Write the media of a case and note its records."""
        rng = generator(self.seed, index, "write/format")
        items = {}
        for item in case.items:
            media = self._media(item)
            items[item.id] = media
            if item.questions:
                turns = converse(item.kind, item.questions, pick(rng, self.formats), rng)
                record = {"id": item.id, **media, "conversations": turns}
                self.records[case.split].append(record)
            if item.caption:
                ask = LITERALS[item.kind] + "\n"
                prompt = ask * len(item.media) + item.caption_prompt
                turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": item.caption}]
                self.captions[case.split].append({"id": item.id, **media, "conversations": turns})
            if case.split == "heldout":
                for number, question in enumerate(item.questions):
                    form = pick(rng, self.formats)
                    text, answer = phrase(question, form, rng)
                    self.questions.append(
                        {"question_id": f"{item.id}/{number}", **media, "text": text, "answer": answer}
                        | {"type": question.type, "format": form}
                    )
            if item.boxes:
                height, width = item.media[0].shape[:2]
                self.boxes[item.id] = {"split": case.split, **media, "width": width, "height": height} | {
                    "boxes": [
                        {"label": box.label, "description": box.description, "xyxy": [round(v, 4) for v in box.xyxy]}
                        for box in item.boxes
                    ]
                }
        if case.triples:
            self.triples[case.id] = {"split": case.split, "triples": case.triples}
        self.cases.append(
            {"id": case.id, "split": case.split, "items": items, "facts": case.facts}
            | ({"report": case.report} if case.report else {})
        )

    def finish(self) -> dict[str, int]:
        """Write the records; returns how many there are of each kind."""
        folder = self.folder
        _dump(folder / "train.json", self.records["train"])
        _dump(folder / "heldout.json", self.records["heldout"])
        _dump(folder / "captions.json", self.captions["train"])
        _dump(folder / "heldout_captions.json", self.captions["heldout"])
        _dump(folder / "boxes.json", self.boxes)
        _dump(folder / "kg.json", {"knowledge": self.world.knowledge(), "cases": self.triples})
        _dump(folder / "texts.json", self.world.texts())
        for name, lines in (("heldout_questions", self.questions), ("cases", self.cases)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return {
            "train": len(self.records["train"]),
            "heldout": len(self.records["heldout"]),
            "captions": len(self.captions["train"]),
            "heldout_captions": len(self.captions["heldout"]),
            "heldout_questions": len(self.questions),
        }

    def _media(self, item: Item) -> dict[str, Any]:
        """Write the media of an item; returns the key of a record with the path or paths."""
        if item.kind in ("image", "images"):
            suffixes = [""] if item.kind == "image" else [f"-{k}" for k in range(len(item.media))]
            paths = [
                self._save("images", f"{item.id}{s}.png", m, save_png)
                for s, m in zip(suffixes, item.media, strict=True)
            ]
            for label, mask in item.masks.items():
                self._save("masks", f"{item.id}-{label}.png", mask.astype(np.uint8) * 255, save_png)
            return {"image": paths[0] if item.kind == "image" else paths}
        if item.kind == "video":
            return {"video": self._save("videos", f"{item.id}.mp4", item.media[0], save_video)}
        spacing = [round(v, 4) for v in item.spacing]
        if self.volume_format == "npy":
            return {"volume": self._save("volumes", f"{item.id}.npy", item.media[0], np.save), "spacing": spacing}
        save: Callable = lambda path, array: save_nifti(path, array, item.spacing)  # noqa: E731
        return {"volume": self._save("volumes", f"{item.id}.nii.gz", item.media[0], save), "spacing": spacing}

    def _save(self, kind: str, name: str, array: np.ndarray, save: Callable[[Path, np.ndarray], None]) -> str:
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        save(folder / name, array)
        return f"{kind}/{name}"


def phrase(question: Question, form: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question with its response-format sentence, and the answer in that form.

    Args:
        form: "short", "sentence" or "choice"; a question without choices is asked in the short form instead.
        rng: Order of the options.
    """
    if question.self_contained:
        return question.text, question.answer
    if form == "sentence":
        return question.text, question.sentence
    if form == "choice" and 2 <= len(question.choices) <= len(words.LETTERS):
        order = [question.choices[i] for i in rng.permutation(len(question.choices))]
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(words.LETTERS, order, strict=False))
        letter = words.LETTERS[order.index(question.answer)]
        return f"{question.text}\n{options}\n{words.CHOICE}", letter
    return f"{question.text}\n{words.SHORT}", question.answer


def converse(kind: str, questions: list[Question], form: str, rng: np.random.Generator) -> list[dict[str, str]]:
    """All questions about one item as the turns of one conversation.

    As in LLaVA-1.5's data the short-answer sentence is said once, after the first question that it applies to (spec
    llava-1.5, section 5).

    Args:
        kind: Kind of the item; "images" are two.
    """
    turns, said = [], False
    for question in questions:
        text, answer = phrase(question, form, rng)
        if text.endswith(words.SHORT):
            text = question.text if said else text
            said = True
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    head = (LITERALS[kind] + "\n") * (2 if kind == "images" else 1)
    turns[0]["value"] = head + turns[0]["value"]
    return turns


def save_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 `[height, width]` or `[height, width, 3]` as PNG."""
    from PIL import Image

    Image.fromarray(image).save(path, compress_level=1)


def save_video(path: Path, frames: np.ndarray, rate: int = 4) -> None:
    """Write uint8 `[frames, height, width, 3]` as H.264 with full colour resolution, equal bytes for equal frames."""
    import av

    # With its look-ahead, libx264 writes other bytes now and then, even in one thread: findings/x264_not_repeatable.sh.
    options = {"crf": "12", "preset": "veryfast", "x264-params": "rc-lookahead=0:mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save_nifti(path: Path, hounsfield: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """Write int16 `[slices, rows, columns]` as NIfTI with axes x, y, z and an affine to patient coordinates (RAS).

    Raises:
        UserError: If nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise UserError("volume_format: 'nii' needs nibabel; pip install 'llavakit[medical]', or use 'npy'") from error
    z, y, x = spacing
    # Columns run to the patient's left, rows to the back, slices downwards: all opposite to the axes of RAS.
    nibabel.save(nibabel.Nifti1Image(hounsfield.transpose(2, 1, 0), np.diag([-x, -y, -z, 1.0])), str(path))
