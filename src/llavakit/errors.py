"""The exceptions that a user may see.

Everything that a user can mend is a `UserError`: one line that names the file, record or field and says what
would be right. The command line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

from typing import Any

ECHO = 200  # characters of a foreign value that a message repeats


def quoted(value: Any) -> str:
    """`repr` of a value for a message, cut after `ECHO` characters; a value that has none gives its type."""
    try:
        text = repr(value)
    except Exception:  # deep nesting, integers of thousands of digits, foreign classes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= ECHO else text[: ECHO - 3] + "..."


class UserError(Exception):
    """A mistake in the user's input; the message stands alone as one clear line."""


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
