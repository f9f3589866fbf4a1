"""Tar files in WebDataset's form: the members of a sample follow one another and share their name up to its first dot.

    000123.json   the record, in any form that is read elsewhere; its media name members of the sample, or none
    000123.jpg    its picture (videos and volumes likewise; 000123.1.jpg and 000123.2.jpg are two pictures)

A picture with `000123.txt` instead of a record is a caption pair. Members of other kinds are left alone.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from llavakit.data.shards import Entry, ShardFiles, unreadable
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import FieldError, RecordError

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_KINDS = {
    "image": "jpg jpeg png webp gif bmp tif tiff ppm pgm jp2 avif heic ico tga dcm",
    "video": "mp4 mov webm mkv avi mpg mpeg m4v",
    "volume": "npy nii nii.gz mgh mgz",
    "audio": "wav mp3 flac ogg m4a",
}
_MODALITY = {ending: modality for modality, endings in _KINDS.items() for ending in endings.split()}
_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_KEYS |= {"volume": "volume", "volumes": "volume", "image3d": "volume", "audio": "audio", "audios": "audio"}
_CAPTION = ("txt", "text", "caption")
_RECORD = ("conversations", "conversatons", "messages", "prompt")


class TarShards(ShardFiles):
    """Tar files, also compressed ones (`.tar.gz`, slower to go on in)."""

    def read(self, shard: int, skip: int = 0) -> Iterator[Entry]:
        path, line = self.paths[shard], 0
        try:
            with _opened(path) as tar:
                for name, members in _samples(tar, skip):
                    line += 1
                    if line > skip:
                        yield Entry(path, line, _entry(name, members, path, line))
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            if line >= skip:
                yield unreadable(path, line + 1, error)


def _opened(path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.ReadError:
        raise tarfile.ReadError("no tar file") from None  # the original tells what every compression thinks of it


def _samples(tar: tarfile.TarFile, skip: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Names of all samples, with the contents of their members by ending behind the first `skip`."""
    number, current, members = 0, None, {}
    while (member := tar.next()) is not None:
        tar.members.clear()  # it would remember all of them
        found = _NAME.fullmatch(member.name) if member.isfile() else None
        if found is None:
            continue
        if found[1] != current:
            if current is not None:
                yield current, members
            number, current, members = number + 1, found[1], {}
        if number > skip:  # read at once: a compressed file goes back to its beginning for what lies behind
            members[found[2].lower()] = tar.extractfile(member).read()
    if current is not None:
        yield current, members


def _entry(name: str, members: Mapping[str, bytes], path: str, line: int) -> Any:
    try:
        return record_of(name, members)
    except FieldError as error:
        return RecordError(path, line, error.field, f"{error.problem} (sample {name})")
    except JsonError as error:
        return RecordError(path, line, "record", f"{error} (in {name}.json)")


def record_of(name: str, members: Mapping[str, bytes]) -> Any:
    """The entry that the members of a sample make: its record with media as bytes.

    Args:
        name: Of the sample.
        members: Their contents by ending.

    Raises:
        JsonError: If the record is no JSON.
        FieldError: If its media and the members do not fit.
    """
    raw = parse_json(members["json"], finite=False) if "json" in members else {}
    if not isinstance(raw, dict):
        return raw
    media = [(f"{name}.{ending}", _modality(ending), content) for ending, content in members.items()]
    media = [one for one in media if one[1] is not None]
    raw.setdefault("id", name.rpartition("/")[2])
    caption = next((members[ending] for ending in _CAPTION if ending in members), None)
    if caption is not None and not any(raw.get(key) is not None for key in _RECORD):
        raw["conversations"] = _caption_pair(caption, media)
    _place(raw, media)
    return raw


def _modality(ending: str) -> str | None:
    """`image` of `jpg`, `1.jpg` and the like; None for other members."""
    parts = ending.split(".")
    return _MODALITY.get(".".join(parts[-2:])) or _MODALITY.get(parts[-1])


def _caption_pair(caption: bytes, media: list[tuple[str, str, bytes]]) -> list[dict[str, str]]:
    try:
        text = caption.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FieldError("caption", "is not UTF-8") from None
    marks = "\n".join("<image>" for _ in media)
    return [{"from": "human", "value": marks}, {"from": "gpt", "value": text.strip()}]


def _place(raw: dict[str, Any], media: list[tuple[str, str, bytes]]) -> None:
    """Put the members where the record names them: by name, else in their order."""
    places = list(_places(raw))
    for modality in dict.fromkeys([*(kind for _, kind, _ in media), *(kind for kind, *_ in places)]):
        mine = {file: content for file, kind, content in media if kind == modality}
        waiting = dict(mine)
        named = [(holder, key) for kind, holder, key in places if kind == modality]
        left = []
        for holder, key in named:
            file = _named(holder[key], mine)
            if file is None:
                left.append((holder, key))
            else:  # a record may show the same picture twice
                holder[key] = mine[file]
                waiting.pop(file, None)
        if not named and waiting:
            raw[modality] = list(waiting.values())
        elif waiting and len(left) != len(waiting):
            said = f"the record names {len(named)}, the sample holds {len(waiting)} more: {', '.join(waiting)}"
            raise FieldError(modality, said)
        else:
            for (holder, key), content in zip(left, waiting.values(), strict=False):
                holder[key] = content


def _named(value: str, files: Mapping[str, bytes]) -> str | None:
    """The member that a name means: the whole name, its last part, or its ending."""
    value = value.lower()  # as the endings of members are kept
    last = value.rpartition("/")[2]
    return next((file for file in files if file.lower() == value or file.lower().rpartition("/")[2] == last), None)


def _places(raw: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(modality, holder, key) of every string that names a media item."""
    for name, modality in _KEYS.items():
        value = raw.get(name)
        if _names_file(value):
            yield modality, raw, name
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if _names_file(item):
                yield modality, value, number
    turns = [raw[key] for key in ("messages", "prompt", "chosen", "rejected") if isinstance(raw.get(key), list)]
    for turn in (turn for own in turns for turn in own if isinstance(turn, dict)):
        for part in turn["content"] if isinstance(turn.get("content"), list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image", "video", "volume") and _names_file(part.get(kind)):
                yield kind, part, kind


def _names_file(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith("data:")
