"""The exceptions that a user may see.

Everything that a user can mend is a `UserError`: one line that names the file, record or field and says what
would be right. The command line prints it without a traceback and exits with status 2. Messages repeat input, which may
be anything: long values are cut and control characters escaped here, in one place, for all of them.
"""

from __future__ import annotations

import re
from typing import Any

ECHO = 200  # characters of a foreign value that a message repeats
LONGEST_MESSAGE = 1000

# What a message can hold of somebody's input: quoted text, a list or mapping, or text without a blank.
_LONG_VALUE = re.compile(
    rf"""(?<!\w)'[^']{{{ECHO},}}'|(?<!\w)"[^"]{{{ECHO},}}"|[\[{{(].{{{ECHO},}}[\]}})]|\S{{{ECHO + 1},}}""", re.DOTALL
)
# Surrogates cannot be printed; control characters other than newline and tab may command a terminal.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def quoted(value: Any) -> str:
    """`repr` of a value for a message, cut after `ECHO` characters; a value that has none gives its type."""
    try:
        text = repr(value)
    except Exception:  # deep nesting, integers of thousands of digits, foreign classes
        text = f"<{type(value).__name__}>"
    return shorten(text)


def shorten(text: str, most: int = ECHO) -> str:
    """A text of at most `most` characters, its middle left out if need be."""
    return text if len(text) <= most else f"{text[: most - most // 4 - 1]}…{text[len(text) - most // 4 :]}"


def _presentable(message: str) -> str:
    message = _UNPRINTABLE.sub(lambda match: f"\\x{ord(match.group()):02x}", message)
    if len(message) <= ECHO:
        return message
    return shorten(_LONG_VALUE.sub(lambda match: shorten(match.group()), message), LONGEST_MESSAGE)


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class Portable(Exception):
    """An exception that crosses processes with its message and attributes, whatever its constructor takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class UserError(Portable):
    """A mistake in the user's input; the message is one clear line that needs no context."""

    def __init__(self, message: object = "") -> None:
        super().__init__(_presentable(str(message)))


class MediaError(UserError):
    """An image, video or volume that cannot be read, or that breaks a limit."""


class RecordError(UserError):
    """A broken record in a data file.

    Args:
        file: The data file.
        line: Line number in a JSONL file, or index in a JSON list, counted from 1.
        field: The field that is wrong, as a dotted path (`conversations.1.value`).
        problem: What is wrong and what would be right.
    """

    def __init__(self, file: str, line: int, field: str, problem: str) -> None:
        super().__init__(f"{file}:{line}: {field}: {problem}")
        self.file, self.line, self.field, self.problem = file, line, field, problem


class FieldError(UserError):
    """A wrong field of a conversation.

    Args:
        field: Dotted path (`conversations.1.value`).
        problem: What is wrong and what would be right.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


class CheckpointError(UserError):
    """A model folder that is not one, or whose tensors do not fit the configuration."""


class WriteError(CheckpointError):
    """A checkpoint that could not be written.

    Args:
        target: The file or folder that was to be written.
        reason: What the file system said.
        kept: What is still there.
    """

    def __init__(self, target: object, reason: str, kept: str) -> None:
        super().__init__(f"{target}: could not be written ({reason}); {kept}")
        self.reason = reason


class RecipeError(UserError):
    """An unknown key or a wrong type in a recipe."""


class CallFailed(UserError):
    """One call of a model that brought no answer; others may. It can be asked again."""


class APIRefused(UserError):
    """An API refuses every call (a wrong key or model, money spent): there is no use in asking on."""
