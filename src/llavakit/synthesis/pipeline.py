"""Pipelines: what is read, what a teacher is asked, and which records its replies become.

    class Captions(Pipeline):
        def work(self, item, teacher):
            reply = teacher.ask([{"role": "user", "content": f"Describe: {item['facts']}"}])
            if not reply:
                raise Refused("the reply is empty")
            yield {"id": item["id"], "text": reply}

    PIPELINES.add("captions", "my_package.captions:Captions")   # or "pipelines" among a system card's parts

    llavakit synthesize captions facts.jsonl captions.jsonl --teacher http://localhost:8000/v1#NAME

A pipeline knows nothing of files that are written, of threads, processes and money; whatever runs it gives the same
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llavakit.data.readers import Source, open_source
from llavakit.errors import FieldError, UserError

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]


class Refused(UserError):
    """An item that becomes no record; the message is the reason, which is written beside the output."""


class Teacher(Protocol):
    """Who is asked; `llavakit.evaluation.judges.Judge` is one. Replies are kept, so that nothing is paid for twice.

    Failed calls raise `llavakit.generation.remote.CallFailed`, which a pipeline lets pass: the item is asked again by
    the next run.
    """

    def ask(self, messages: Messages, temperature: float | None = None, attempt: int = 0) -> str:
        """The reply to a conversation; `attempt` tells a question that is put again from its first time."""

    def ask_parsed(
        self, messages: Messages, parse: Callable[[str], T | None], temperatures: Sequence[float]
    ) -> T | None:
        """Ask at each temperature in turn until `parse` makes something of the reply; None if it never does."""


class Pipeline:
    """Base class. Options are keyword arguments of the constructor, held as attributes; instances are pickled.

    Attributes:
        version: Raise it when the same item would become other records: runs of another version are not resumed.
        asks: Whether a teacher is needed. A pipeline without one may use several processes.
        temperature, max_tokens: Of the teacher's replies, unless the user says otherwise.
        surveys: Whether `survey` looks at every item before the work begins.
        files: Digests of the files that options name; runs with other ones are not resumed.
    """

    version = 1
    asks = True
    temperature = 0.7
    max_tokens = 1024
    surveys = False
    files: Sequence[str] = ()

    def items(self, source: Path) -> Source:
        """What is worked on, in order; by default the entries of a .json or .jsonl file.

        Raises:
            UserError: If `source` is not what is read.
        """
        return open_source(source)

    def check(self, item: Any) -> None:
        """Refuse an item that cannot be worked on, before anything is asked.

        Raises:
            FieldError: With the field that is wrong.
        """
        if not isinstance(item, Mapping):
            raise FieldError("record", f"must be an object, not {type(item).__name__}")

    def name(self, item: Any) -> Any:
        """What a refused item is called; by default its `id`."""
        return item.get("id") if isinstance(item, Mapping) else None

    def instead(self, name: Any, reason: str) -> Iterable[Mapping[str, Any]]:
        """What stands in the output in the place of an item that became no record; by default nothing.

        Args:
            name: What `name` gave, if the item could be read.
            reason: Why it became none.
        """
        return ()

    def survey(self, number: int, item: Any) -> Any:
        """What `gather` is to know of the `number`-th item (from 0); runs in any process, the item is checked."""

    def gather(self, found: Iterator[Any], folder: Path) -> None:
        """Write into `folder` what `open` reads; `found` are the results of `survey` in order of the items."""

    def open(self, folder: Path) -> None:
        """Get ready in the process that works; only called if the pipeline surveys."""

    def work(self, item: Any, teacher: Teacher | None) -> Iterable[Mapping[str, Any]]:
        """The records of a checked item, which may be none.

        Args:
            teacher: Who is asked; None if the pipeline asks nobody.

        Raises:
            Refused: With the reason why it becomes no record.
        """
        raise NotImplementedError
