"""Saved sessions: the events with their pictures, as a folder or a ZIP archive, and their replay."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.checkpoints.files import atomic_folder
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.editing.session import Session, as_pixels
from llavakit.errors import UserError, quoted
from llavakit.media.image import load_image
from llavakit.media.source import Attached
from llavakit.tools.rle import encode_mask

FORMAT = 1
LOG = "session.json"
MOST_BYTES = 512 * 2**20  # of one file in an archive


def _files(session: Session) -> dict[str, bytes]:
    """The files of a saved session by name."""
    files: dict[str, bytes] = {}
    events = []
    for event in session.events:
        written = dict(event)
        if "image" in event:
            pixels = as_pixels(event["image"])
            name = f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}.png"
            if name not in files:
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                files[name] = buffer.getvalue()
            written["image"] = name
        if isinstance(event.get("mask"), np.ndarray):
            written["mask"] = encode_mask(event["mask"])
        events.append(written)
    log = {"format": FORMAT, "backends": dict(session.backends.names), "events": events}
    log["versions"] = [{"op": one.op, "parent": one.parent, "sha256": one.digest} for one in session.versions]
    files[LOG] = (json.dumps(log, indent=1) + "\n").encode()
    return files


def save(session: Session, folder: str | Path) -> Path:
    """Write the events as `session.json`, with their pictures as PNG; returns the folder.

    Raises:
        UserError: If the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists; name another folder")
    with atomic_folder(folder) as scratch:
        for name, content in _files(session).items():
            (scratch / name).write_bytes(content)
    return folder


def archive(session: Session) -> bytes:
    """What `save` writes, as a ZIP archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in _files(session).items():
            file.writestr(name, content)
    return buffer.getvalue()


def _read(place: Path, name: str) -> bytes:
    """A file of a saved session.

    Raises:
        OSError: If it cannot be read.
        UserError: If the archive is damaged, or the file in it too large.
    """
    if not place.is_file():
        return (place / name).read_bytes()
    try:
        with zipfile.ZipFile(place) as archive:
            if archive.getinfo(name).file_size > MOST_BYTES:
                raise UserError(f"{place}: {name} is larger than {MOST_BYTES} bytes")
            return archive.read(name)
    except KeyError:
        raise FileNotFoundError(name) from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{place}: is no ZIP archive of a session ({error})") from None


def read_log(place: str | Path) -> dict[str, Any]:
    """The log of a saved session.

    Raises:
        UserError: If it is none, or of another format.
    """
    place = Path(place)
    try:
        log = parse_json(_read(place, LOG))
    except OSError:
        raise UserError(f"{place}: holds no {LOG}; name a folder or archive that a session was saved in") from None
    except JsonError as error:
        raise UserError(f"{place / LOG}: {error}") from None
    if not isinstance(log, dict) or not isinstance(log.get("events"), list):
        raise UserError(f"{place / LOG}: is no event log")
    if log.get("format") != FORMAT:
        raise UserError(f"{place / LOG}: has format {quoted(log.get('format'))}, this version reads {FORMAT}")
    return log


def replay(
    place: str | Path, session: Session, progress: Callable[[int, Mapping[str, Any]], None] | None = None
) -> list[int]:
    """Carry out the events of a saved session; numbers of versions whose pictures differ from the saved ones.

    Raises:
        UserError: If an event fails; it is named by its number.
    """
    place = Path(place)
    log = read_log(place)
    for number, event in enumerate(log["events"]):
        given = dict(event) if isinstance(event, Mapping) else {}
        where = f"{place}: event {number}"
        if isinstance(given.get("image"), str):
            given["image"] = _picture(place, given["image"], where)
        try:
            session.apply(given)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if progress is not None:
            progress(number, event)
    saved = [one.get("sha256") for one in log.get("versions", [])]
    return [one.number for one in session.versions if one.number >= len(saved) or one.digest != saved[one.number]]


def _picture(place: Path, name: str, where: str) -> np.ndarray:
    if Path(name).name != name:
        raise UserError(f"{where}: image: must be a file beside the log, not {quoted(name)}")
    try:
        content = _read(place, name)
    except OSError:
        raise UserError(f"{where}: image: {quoted(name)} is missing beside the log") from None
    return as_pixels(load_image(Attached(content, f"{place / name}")))
