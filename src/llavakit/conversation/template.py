"""Chat templates: messages to one string, with the spans that the assistant says.

A template is a Jinja file in the dialect of transformers' chat templates; several names share one file and differ in
values (system text, end marker). `{% generation %}` marks what the assistant says, so the same text serves as
prompt, as label mask and, saved as `chat_template.jinja`, as the template of a server. This module knows no
tokenizer.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from llavakit.conversation.messages import KEEP, Message, Part
from llavakit.errors import UserError
from llavakit.registry import TEMPLATES

OWN = "tokenizer"  # name of the chat template that a tokenizer brings
PLACEHOLDER = "<image>"
TYPED = "[image]"  # replaces a placeholder inside a text, because text must never ask for a media item
SPELT = "<image\ufdd0"  # the same where the tokenizer is to read the letters as they are, which take as many characters
VIDEO_MARK, TYPED_VIDEO = "<video>", "[video]"  # what templates of other libraries write for a video

_RENDERING = threading.Lock()  # transformers keeps one span tracker per template, which two threads would share

Span = tuple[int, int]


@dataclass(frozen=True)
class Rounds:
    """How the original code counts labels: it cuts the text into rounds and tokenises each one again.

    Args:
        end: String that ends a turn (`</s>`).
        answer: String after which the answer of a round begins.
        grouped: Turns that make one round between `end` strings; the first round of grouped turns has one more, for
            the system text.
        begin: Tokens in front of the first round that no round counts.
        counts_end: Whether the tokens of `end` are added to every round; otherwise the begin token that every round
            gets when tokenised alone makes up for them.
        answer_offset: Added to the number of masked tokens of a round.
        later_offset: Added to both counts from the second round on, if the tokenizer does not restart a word after a
            special token (`legacy=False`).
        in_place: Whether the tokens of a round are those that cover its characters in the whole text, instead of those
            of the round tokenised alone; the fields about counts then mean nothing.
    """

    end: str
    answer: str
    grouped: int = 1
    begin: int = 1
    counts_end: bool = False
    answer_offset: int = 0
    later_offset: int = 0
    in_place: bool = False


@dataclass(frozen=True)
class Marks:
    """What is learned beside the answers where role marks are learned too (LLaVA-OneVision).

    Args:
        header: String that opens an assistant turn; learned with the turn.
        after: String between an answer's end and the next turn; learned with the turn.
        everywhere: Strings of one token each that are learned wherever they occur.
    """

    header: str
    after: str
    everywhere: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A chat template.

    Args:
        name: Registered name.
        file: Jinja file, without suffix, in the folder `templates` of this package; "package:file" names one in that
            folder of another package.
        system: System text if the messages bring none.
        stop: Strings at which the assistant's turn is over.
        values: Further variables of the Jinja file; `before` and `after` are written around every placeholder,
            `joint` between one that was moved to the front and the text (default a newline).
        after_media: Written behind every placeholder, whatever the placement; no further line break follows then.
        breaks: Strings after which the tokenizer starts anew, as where the original code tokenises the pieces of a
            prompt one by one.
        placement: "front": a message's only media item is moved before its text, which is stripped, as `<image>\\n`;
            "ahead": the same with the text as it is, whose own first line break counts; "lead": as "front", unless it
            comes first already; "back": it is moved behind the text as `\\n<image>`; "keep": media stay where they are.
        training_placement: The placement in training samples, if it is another one.
        labels: Label policy, see `llavakit.conversation.labels`.
        rounds: For the policy "rounds".
        marks: For the policy "marks".
        keeps_first_answer: Whether training samples keep an assistant turn in front of the first user turn.
        prompts_keep_first_answer: The same for prompts.
        as_generated: Whether the ids that an assistant's turn brings are the whole turn, also without an end mark;
            otherwise an end mark that they lack follows.
        most_images: Images with which a turn of a training sample may open; see `messages.limit_images`. None for any
            number.
        bos: What happens to the tokenizer's begin token if the template writes one too: "double" keeps both, "once"
            drops one; "before_text" drops the tokenizer's own in front of a prompt that opens with a media item;
            "written": the template writes every begin token that it wants (`bos_token`), and the tokenizer adds none.
        pieces: Whether answers are tokenised apart from what stands around them, as is what stands before and after a
            begin token.
        drops_unanswered: Whether training samples leave out what the user says after the last answer.
        training: File that writes training samples, if it is another one.
        training_values: Variables of the Jinja file that are others in training samples.
        jinja: The Jinja text itself, instead of `file`; see `own_template`.
        specials: Values of the special tokens that `jinja` may name (`bos_token`, `eos_token`).
    """

    name: str
    file: str
    system: str = ""
    stop: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    after_media: str = ""
    breaks: tuple[str, ...] = ()
    placement: str = "front"
    training_placement: str | None = None
    labels: str = "spans"
    rounds: Rounds | None = None
    marks: Marks | None = None
    keeps_first_answer: bool = False
    most_images: int | None = None
    prompts_keep_first_answer: bool = True
    as_generated: bool = False
    bos: str = "double"
    pieces: bool = False
    drops_unanswered: bool = False
    training: str | None = None
    training_values: Mapping[str, Any] = field(default_factory=dict)
    jinja: str | None = None
    specials: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def source(self) -> str:
        """The whole Jinja text, complete in itself; `llavakit.conversation.encode` tokenises what it renders."""
        return self._source(self.file) if self.jinja is None else self.jinja

    def whole(self, *, begins: bool, restarts: bool) -> str:
        """`source` for tools that tokenise the rendered text in one go and add no special tokens.

        Args:
            begins: Whether the tokenizer puts its begin token in front of a text by itself.
            restarts: Whether it needs a space to start a new word after a begin token or a media item.
        """
        gap = " " if restarts else ""
        if self.bos == "written":
            return self._source(self.file, gap=gap)
        opening = (
            f"{{%- set bos_token = bos_token + {json.dumps(gap)} -%}}\n" if begins else "{%- set bos_token = '' -%}\n"
        )
        if begins and self.bos == "double" and "bos_token" not in _read(self.file):
            opening += "{{- bos_token -}}\n"
        return opening + self._source(self.file, gap=gap)

    def for_tokenizer(self, tokenizer: Any) -> Template:
        """The template with the begin token of a tokenizer, if it writes it itself."""
        if self.bos != "written":
            return self
        return replace(self, specials={"bos_token": tokenizer.bos_token or ""})

    def _source(self, file: str, **values: Any) -> str:
        own = {"default_system": self.system, "default_placement": self.placement}
        if self.after_media:
            own["after_media"] = self.after_media
        values = {**own, **self.values, **values}
        head = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())
        return head + _read("_content") + _read(file)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        training: bool = False,
        placement: str | None = None,
        typed: str = TYPED,
    ) -> tuple[str, list[Span]]:
        """The text of normalised messages and the character spans that the assistant says.

        Every media item is `<image>`; an `<image>` inside a text part becomes `typed`.

        Args:
            add_generation_prompt: Whether the text ends where the assistant is to answer.
            continue_final_message: Whether the last message is left open, so that the assistant continues it.
            training: Whether to use the form of training samples, where that differs.
            placement: Instead of the template's own.
            typed: `TYPED`, or `SPELT` for a text that `tokenize` reads.

        Raises:
            UserError: If the template cannot express the conversation.
        """
        if continue_final_message and self._opens_empty(messages):
            return self.render(
                messages[:-1], add_generation_prompt=True, training=training, placement=placement, typed=typed
            )
        source = self.source
        if training and (self.training or self.training_values):
            source = self._source(self.training or self.file, **self.training_values)
        bare = [{"role": m["role"], "content": self._content(m, typed)} for m in messages]
        if placement is None and training:
            placement = self.training_placement
        options = {} if placement is None else {"placement": placement}
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if self.jinja is None:
            return self._rendered(source, bare, **ends, **options)
        if any(part["type"] == "video" for message in bare for part in message["content"]):
            bare = [
                message | {"content": [_without_video_mark(part) for part in message["content"]]} for message in bare
            ]
        if not self._takes_parts:
            bare = [message | {"content": _as_text(message["content"])} for message in bare]
        text, spans = self._rendered(source, bare, **ends)
        if any(part["type"] == "video" for message in messages for part in message["content"]):
            text = text.replace(VIDEO_MARK, PLACEHOLDER)  # as long, so that spans stay where they are
        if training and not spans:
            spans = self._answers(text, bare)
        return text, spans

    def _content(self, message: Message, typed: str) -> list[Part] | str:
        """What the Jinja file sees of a message: parts, or the whole text where its media are to stay."""
        parts = [_bare(part, typed) for part in message["content"]]
        if self.jinja is not None or message.get("placement") != KEEP:
            return parts
        shown = [part for part in parts if part["type"] != "boxes"]
        return "".join(part["text"] if part["type"] == "text" else PLACEHOLDER + self.after_media for part in shown)

    def _opens_empty(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is an empty one of the assistant, of which a template that trims keeps no place."""
        trims = self.jinja is not None or self.values.get("trims")
        last = messages[-1] if trims and messages else {"role": ""}
        return last["role"] == "assistant" and all(part.get("text", "-").strip() == "" for part in last["content"])

    def _rendered(self, source: str, messages: list[Message], **options: Any) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = re.search(r"\{%-?\s*generation\b", source) is not None  # transformers warns where there are none
        try:
            with _RENDERING:
                texts, spans = render_jinja_template(
                    [messages],
                    chat_template=source,
                    return_assistant_tokens_mask=marked,
                    **{"bos_token": "", **self.specials},
                    **options,
                )
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"template {self.name!r}: {error}") from error
        text, answers = texts[0], spans[0] if marked else []
        return text, [(start, min(end, len(text))) for start, end in answers if start < min(end, len(text))]

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether `jinja` reads contents as lists of parts; templates of language models read strings alone."""
        probe = "\u2318"
        try:
            text, _ = self._rendered(self.source, [{"role": "user", "content": [{"type": "text", "text": probe}]}])
        except UserError:
            return False
        return probe in text and "'text'" not in text

    def _answers(self, text: str, messages: list[Message]) -> list[Span]:
        """Answers of a template without `{% generation %}` marks: what each assistant turn adds to the text."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(self.source, messages[:number], add_generation_prompt=True)[0]
            after = self._rendered(self.source, messages[: number + 1], add_generation_prompt=False)[0]
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"template {self.name!r}: earlier turns change when the conversation goes on, so the answers to "
                    "learn cannot be told apart; put {% generation %} marks into it, or name another template"
                )
            spans.append((len(before), len(after)))
        return spans


def _as_text(parts: list[Part]) -> str:
    """Parts as one string: a media item is its placeholder, on a line of its own as transformers' users write it."""
    texts = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        texts.append(part["text"] if part["type"] == "text" else PLACEHOLDER)
        if part["type"] != "text" and following is not None and not following.get("text", "").startswith("\n"):
            texts.append("\n")
    return "".join(texts)


def _bare(part: Part, typed: str) -> Part:
    """A part without the media item itself, as the Jinja file sees it."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"].replace(PLACEHOLDER, typed)}
    return {"type": part["type"]}


def _without_video_mark(part: Part) -> Part:
    """A part whose text asks for no video."""
    return part | {"text": part["text"].replace(VIDEO_MARK, TYPED_VIDEO)} if part["type"] == "text" else part


@functools.cache
def _read(file: str) -> str:
    package, _, name = file.rpartition(":")
    folder = resources.files(package or "llavakit.conversation") / "templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def get_template(template: str | Template) -> Template:
    """The template of that name; a template is returned unchanged.

    Raises:
        UserError: If there is none; the message names the nearest known name.
    """
    return template if isinstance(template, Template) else TEMPLATES.get(template)


def own_template(tokenizer: Any) -> Template:
    """The chat template that a tokenizer brings, or that was given to it from the files of a processor.

    Raises:
        UserError: If it brings none.
    """
    jinja = tokenizer.chat_template
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if not jinja:
        raise UserError("template 'tokenizer': the tokenizer has no chat template; name one of llavakit's (--template)")
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return Template(OWN, "", placement="keep", keeps_first_answer=True, bos="once", jinja=jinja, specials=specials)


def template_for(template: str | Template, tokenizer: Any) -> Template:
    """`get_template`; the name "tokenizer" means the tokenizer's own chat template."""
    return own_template(tokenizer) if template == OWN else get_template(template)
