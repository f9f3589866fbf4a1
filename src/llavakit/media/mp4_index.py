"""The sample tables of MP4 and MOV files, checked before FFmpeg believes them.

FFmpeg makes an entry in memory for every sample that a table announces. Where the table gives one size for all
samples, the count is a bare number: 20 million samples in a file of a few kilobytes took 1.4 GB and 17 s. This module
walks the boxes that FFmpeg looks into and compares the counts with the limit and with the file's size. Tables that
list their samples one by one are as long as what is there, and FFmpeg reads them with care.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from llavakit.errors import MediaError
from llavakit.media.source import Limits

# Boxes whose content FFmpeg reads as boxes, wherever they stand.
_CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"mvex", b"moof", b"traf", b"udta", b"ilst"}
_CONTAINERS |= {b"tref", b"sinf", b"schi", b"ipro", b"iprp", b"wave", b"dinf"}
_DEEPEST = 16
_MOST_BOXES = 200_000
_PER_SAMPLE = 0x000F00  # flags of a `trun` box that lists something for each sample


def check_index(file: BinaryIO, name: str, limits: Limits) -> None:
    """Refuse an MP4 or MOV file that announces more samples than it may or can have; other files pass.

    Raises:
        MediaError: With both numbers.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(4)
    if file.read(4) not in (b"ftyp", b"moov", b"moof", b"mdat", b"styp", b"wide", b"free", b"skip", b"pnot", b"sidx"):
        return
    samples = 0
    for number, (kind, start, end) in enumerate(_boxes(file, 0, size)):
        if number == _MOST_BOXES:
            raise MediaError(f"{name}: has more than {_MOST_BOXES:,} boxes; its index is damaged")
        file.seek(start)
        body = file.read(min(end - start, 16))
        if kind == b"cmov":
            raise MediaError(f"{name}: has a compressed index, which is not read; remux it (ffmpeg -i IN -c copy OUT)")
        if kind == b"stsz" and len(body) >= 12:
            each, count = struct.unpack_from(">II", body, 4)
            samples += count if each else 0
        elif kind == b"trun" and len(body) >= 8:
            flags, count = struct.unpack_from(">II", body)
            samples += 0 if flags & _PER_SAMPLE else count
        if samples > size:
            raise MediaError(f"{name}: its index announces {samples:,} samples in {size:,} bytes; it is damaged")


def _boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of every box between two places, containers before what they contain."""
    while end - start >= 8:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if length == 1 and end - content >= 8:
            (length,) = struct.unpack(">Q", file.read(8))
            content += 8
        stop = end if length == 0 else min(start + length, end)
        if stop < content:
            return
        yield kind, content, stop
        if kind in _CONTAINERS and depth < _DEEPEST:
            yield from _boxes(file, content, stop, depth + 1)
        elif kind == b"meta":  # with or without four bytes in front
            yield from _boxes(file, content + 4, stop, depth + 1)
        start = stop
