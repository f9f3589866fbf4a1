"""Pages: what a store is built from, read one by one from records or from a folder of Markdown and HTML files.

A record is an object with `id` or `url`, and any of `title`, `summary`, `text` (cut into passages), `passages` or
`sections` (a list that is taken as it is), and `image` or `images`. Whatever else it holds of text or numbers is kept
as the fields of its entries.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from llavakit.checkpoints.identity import file_identity
from llavakit.data.readers import open_source
from llavakit.errors import RecordError, UserError, quoted

SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html"}
SHORTEST = 5  # characters of a section that is taken, as published (ReflectiVA)
_TEXTS = ("title", "summary", "text")
_KNOWN = {"id", "url", "passages", "sections", "image", "images", *_TEXTS}


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        name: Its address or id.
        text: Text that is to be cut into passages.
        passages: Passages that were given as such.
        images: Pictures: paths.
        fields: What else its record holds.
        line: Where its record stands, from 1.
    """

    name: str
    title: str = ""
    summary: str = ""
    text: str = ""
    passages: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    line: int = 1


class Pages(Protocol):
    """Pages by number.

    Attributes:
        file: Name in messages.
    """

    file: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Page: ...

    def identity(self) -> str:
        """Digest of the content."""
        ...


def open_pages(source: str | Path, images: str | Path | None = None) -> Pages:
    """Pages of a JSONL or JSON file, or of a folder.

    Args:
        source: The file or folder.
        images: Folder in which pictures of records are; default the file's.

    Raises:
        UserError: If there is nothing to read.
    """
    path = Path(source)
    if path.is_dir():
        return FolderPages(path)
    return RecordPages(path, Path(images) if images is not None else path.parent)


class RecordPages:
    """Pages of a file of records."""

    def __init__(self, path: Path, images: Path) -> None:
        self.file, self.images, self._source = str(path), images, open_source(path)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Page:
        record, line = self._source[number], self._source.line(number)

        def refuse(key: str, problem: str) -> RecordError:
            return RecordError(self.file, line, key, problem)

        if not isinstance(record, dict):
            raise refuse("record", f"is {quoted(record)}; a page is an object with id or url, and text or passages")
        name = record.get("id", record.get("url"))
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise refuse("id", "missing; a page needs an id or a url, text or number")
        texts = {key: record.get(key) or "" for key in _TEXTS}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise refuse(key, f"is {quoted(text)}; must be text")
        if "passages" in record and "sections" in record:
            raise refuse("passages", "given beside sections; a page has one of them")
        key = "sections" if "sections" in record else "passages"
        passages = _list(record.get(key), key, refuse)
        if key == "sections":
            passages = tuple(one for one in passages if len(one.strip()) >= SHORTEST)
        given = record.get("images", record.get("image"))
        given = [given] if isinstance(given, str) else given
        pictures = tuple(str(self.images / one) for one in _list(given, "images", refuse))
        more = {key: value for key, value in record.items() if key not in _KNOWN}
        fields = {key: str(value) for key, value in more.items() if isinstance(value, (str, int, float))}
        return Page(str(name), **texts, passages=passages, images=pictures, fields=fields, line=line)

    def identity(self) -> str:
        return file_identity(Path(self.file))


def _list(value: Any, key: str, refuse: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise refuse(key, f"is {quoted(value)}; must be a list of text")
    return tuple(value)


class FolderPages:
    """Markdown and HTML files below a folder, in the order of their names; a page is called by its path in there."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder = str(folder), folder
        names = (Path(base, name) for base, _, files in os.walk(folder) for name in files)
        self.paths = sorted(path for path in names if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(f"{folder}: holds no Markdown or HTML file ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Page:
        path = self.paths[number]
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(str(path), 1, "text", f"is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise RecordError(str(path), 1, "text", f"cannot be read ({error.strerror or error})") from None
        if SUFFIXES[path.suffix.lower()] == "markdown":
            from markdown_it import MarkdownIt

            text = MarkdownIt().render(text)
        reader = _Html()
        reader.feed(text)
        reader.close()
        name = path.relative_to(self.folder).as_posix()
        images = [one for one in (self._inside(path.parent, link) for link in reader.images) if one is not None]
        return Page(name, reader.name() or path.stem, text=reader.text(), images=tuple(dict.fromkeys(images)))

    def _inside(self, parent: Path, link: str) -> str | None:
        """The picture that a page links to, if it lies in the folder."""
        if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.IGNORECASE):
            return None
        target = (parent / unquote(link.partition("?")[0].partition("#")[0])).resolve()
        return str(target) if target.is_file() and target.is_relative_to(self.folder.resolve()) else None

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.relative_to(self.folder).as_posix()}\0{file_identity(path)}\0".encode())
        return digest.hexdigest()


class _Html(HTMLParser):
    """Text, title and pictures of a page."""

    _SILENT = {"script", "style", "template", "noscript"}
    _BREAKS = {"p", "div", "li", "tr", "br", "table", "ul", "ol", "section", "article", "blockquote", "pre", "dt", "dd"}
    _HEADS = {"h1", "h2", "h3", "h4", "h5", "h6"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.images: list[str] = []
        self._parts: list[str] = []
        self._title: list[str] = []
        self._heading: list[str] = []
        self._silent = 0
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SILENT:
            self._silent += 1
        elif tag == "img":
            self.images += [value for key, value in attrs if key == "src" and value]
        elif tag == "title" or (tag == "h1" and not self._heading):
            self._inside = tag
        if tag in self._BREAKS or tag in self._HEADS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SILENT:
            self._silent = max(0, self._silent - 1)
        if tag == self._inside:
            self._inside = None
        if tag in self._BREAKS or tag in self._HEADS:
            self._parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        if self._inside == "title":
            self._title.append(data)
            return
        if self._inside == "h1":
            self._heading.append(data)
        self._parts.append(data)

    def name(self) -> str:
        return " ".join("".join(self._title or self._heading).split())

    def text(self) -> str:
        """One line a paragraph."""
        lines = (" ".join(line.split()) for line in "".join(self._parts).splitlines())
        return "\n".join(line for line in lines if line)
