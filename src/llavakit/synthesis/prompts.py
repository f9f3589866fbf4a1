"""Replies to a file of prompts, offline: `llavakit generate`.

    generate("runs/demo/final", "prompts.jsonl", "replies.jsonl", max_new_tokens=64)

A prompt is a line with `messages` (or in another form of `llavakit.data.records`), and perhaps how it is to be answered
(`temperature`, `max_tokens`, ...); a request of OpenAI's batch files is read too. Line n of the output answers prompt
n, or says why it could not be answered. It is a pipeline (`llavakit.synthesis.pipeline`) whose teacher is the model, so
it goes on after a kill, and runs on Ray, as all of them do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llavakit.conversation.messages import media_of
from llavakit.data.records import read_record
from llavakit.errors import APIRefused, CallFailed, FieldError, RecordError, UserError, quoted
from llavakit.generation.request import RequestFailed, SamplingParams, Usage
from llavakit.synthesis.pipeline import Pipeline, Refused
from llavakit.synthesis.run import refuse_options, run_pipeline, source_identity
from llavakit.synthesis.work import Job

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "n")
_WHOLE = ("max_new_tokens", "top_k", "seed", "n")
_SPELLINGS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_UNUSED = ("model", "messages", "user", "metadata", "stream", "store", "service_tier")  # of a request in a batch file


@dataclass(frozen=True)
class MediaFolders:
    """The media policy of a file of prompts: what it may name.

    Attributes:
        root: Folder that relative paths start from; paths may lead below it.
        others: Further folders that paths may lead below.
        fetch: Whether http(s) URLs are fetched, from public addresses only.
    """

    root: Path
    others: Sequence[Path] = ()
    fetch: bool = True

    def check(self, value: Any, where: str) -> None:
        """Refuse a media item that may not be read.

        Raises:
            FieldError: Under `where`.
        """
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, str):
                continue
            if item.startswith(("http://", "https://")):
                if not self.fetch:
                    raise FieldError(where, f"URLs are not fetched in this run; {quoted(item)} must be a file")
                continue
            place = Path(item).resolve()
            if not any(place.is_relative_to(folder.resolve()) for folder in (self.root, *self.others)):
                said = f"{quoted(item)} lies outside of {self.root.resolve()}; allow its folder with --media-folder"
                raise FieldError(where, said)


class Prompts(Pipeline):
    """Asks a model every prompt.

    Args:
        sampling: How prompts are answered that do not say it.
        media: What prompts may name.
    """

    def __init__(self, sampling: SamplingParams, media: MediaFolders) -> None:
        self.sampling, self.media = sampling, media

    def check(self, item: Any) -> None:
        """Refuse a prompt that cannot be asked; its media must exist."""
        self._read(item)

    def name(self, item: Any) -> Any:
        """The prompt's `id` (`custom_id` in a batch file)."""
        return item.get("id", item.get("custom_id")) if isinstance(item, Mapping) else None

    def instead(self, name: Any, reason: str) -> Iterable[Mapping[str, Any]]:
        """The reason, in the place of the reply."""
        yield ({} if name is None else {"id": name}) | {"error": reason}

    def _read(self, item: Any) -> tuple[list[dict[str, Any]], SamplingParams]:
        """Messages and how to answer them."""
        super().check(item)
        batch = item.get("body")
        body = item if batch is None else batch
        if not isinstance(body, Mapping):
            raise FieldError("body", f"must be an object with messages, not {type(body).__name__}")
        if body.get("tools"):
            raise FieldError("tools", "prompts with tools are answered by `llavakit serve`; take them out")
        try:
            record = read_record(body, media_root=self.media.root, needs_answer=False, urls=True)
        except RecordError as error:
            raise FieldError(error.field, error.problem) from error
        if record.messages[-1]["role"] == "assistant":
            raise FieldError("messages", "end with an answer; the last one must be a question")
        for part in media_of(record.messages):
            self.media.check(part[part["type"]], part["type"])
        return record.messages, self._sampling(body, strict=batch is not None)

    def _sampling(self, body: Mapping[str, Any], strict: bool) -> SamplingParams:
        changes = {}
        for key, value in body.items():
            field = _SPELLINGS.get(key, key)
            if field in SAMPLING and value is not None:
                kind = int if field in _WHOLE else (int, float)
                if field == "stop":
                    listed = [value] if isinstance(value, str) else value
                    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
                        raise FieldError(key, f"must be a string or a list of strings, not {quoted(value)}")
                elif isinstance(value, bool) or not isinstance(value, kind):
                    raise FieldError(key, f"must be a {'whole ' if kind is int else ''}number, not {quoted(value)}")
                changes[field] = value
            elif strict and value is not None and key not in _UNUSED:
                raise FieldError(f"body.{key}", f"is not known here; known are messages, {', '.join(SAMPLING)}")
        try:
            return replace(self.sampling, **changes)
        except UserError as error:
            raise FieldError("sampling", str(error)) from error

    def work(self, item: Any, teacher: Any) -> Iterator[Mapping[str, Any]]:
        """The reply to a checked prompt."""
        messages, sampling = self._read(item)
        try:
            answers, usage = teacher.answer(messages, sampling)
        except (CallFailed, APIRefused):
            raise
        except RequestFailed as error:
            raise CallFailed(str(error)) from error
        except UserError as error:
            raise Refused(str(error)) from error
        name = self.name(item)
        replies = [_reply(answer) for answer in answers]
        body = replies[0] if len(replies) == 1 else {"replies": replies}
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        yield ({} if name is None else {"id": name}) | body | {"usage": counts}


def _reply(answer: Any) -> dict[str, Any]:
    message = answer.message()
    del message["role"]
    return message | {"finish_reason": answer.finish_reason}


class Replies:
    """A model that answers prompts from many threads, decoded together."""

    def __init__(self, model: Any) -> None:
        self.model, self.usage, self._lock = model, Usage(), threading.Lock()
        model.start()

    def answer(self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams) -> tuple[list[Any], Usage]:
        """The answers to a conversation, and what they used.

        Raises:
            UserError, RequestFailed: If there is none.
        """
        response = self.model.submit(messages, sampling, stream=False)
        found = response.result()
        with self._lock:
            self.usage = self.usage + response.usage
        return found if isinstance(found, list) else [found], response.usage

    def report(self) -> dict[str, int]:
        """Tokens so far."""
        return {"prompt_tokens": self.usage.prompt_tokens, "completion_tokens": self.usage.completion_tokens}

    def close(self) -> None:
        """End the model's thread."""
        self.model.stop(drain=False)


@dataclass(frozen=True)
class Answering:
    """Which model answers; in the place of `llavakit.synthesis.work.Asking`.

    Attributes:
        model: What `llavakit.load` takes, or a responder.
        options: Of `llavakit.load`.
        max_batch: Replies that are decoded together.
    """

    model: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int = 16

    @property
    def concurrency(self) -> int:
        """Prompts under way: the next ones are read while others are decoded."""
        return 2 * self.max_batch

    @property
    def batch(self) -> int:
        """Prompts that a worker of Ray takes at a time; towards the end of them it decodes fewer together."""
        return 8 * self.max_batch

    def after(self, spent: float) -> Answering:
        """The same: what runs here costs nothing."""
        return self

    def share(self, workers: int) -> Answering:
        """The same: every worker of Ray has a model of its own."""
        return self

    def teacher(self) -> Replies:
        """The model, loaded."""
        from llavakit.generation.load import load

        loaded = isinstance(self.model, (str, Path))
        return Replies(load(self.model, max_batch=self.max_batch, **self.options) if loaded else self.model)


def generate(
    model: Any,
    source: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    media_folders: Sequence[str | Path] = (),
    fetch: bool = True,
    max_batch: int = 16,
    runner: str = "local",
    processes: int = 1,
    on_bad_record: str = "stop",
    options: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Answer a file of prompts, or go on with a run that was interrupted.

    Args:
        model: Folder, hub id or address; with the runner "local" also a responder.
        source: `.jsonl` or `.json`.
        output: `.jsonl` or `.json`, written at the end, in the order of the prompts; until then replies are in
            `OUT.partial.jsonl`.
        images: Folder that media paths start from and may lead below; default: the folder of `source`.
        media_folders: Further folders that paths may lead below.
        fetch: Whether http(s) URLs are fetched.
        max_batch: Replies that are decoded together, by every worker.
        runner: "local", or "ray" (workers of Ray, on this machine or the cluster that RAY_ADDRESS names).
        processes: Workers of Ray.
        on_bad_record: "stop" refuses a file with a broken prompt before anything is asked; "skip" writes its fault in
            the place of the reply.
        options: Of `llavakit.load`.
        sampling: Fields of `SamplingParams`, for prompts that do not say them. Draws have the seed 0.

    Returns:
        Counts: `items` (prompts), `replies`, prompts that are `bad`, `refused` (the model cannot answer them) and
        `failed` (the same call asks them again), and tokens.

    Raises:
        UserError: For what is wrong with model, prompts or output.
    """
    from llavakit.data.paths import split_part

    refuse_options(runner, on_bad_record, processes=processes, max_batch=max_batch)
    if processes > 1 and runner == "local":
        raise UserError("processes: several belong to --runner ray; one process decodes many prompts together")
    if runner == "ray" and not isinstance(model, (str, Path)):
        raise UserError("runner ray: name the model by its folder, hub id or address; every worker loads it")
    root = Path(images) if images is not None else Path(split_part(source)[0]).parent
    params = SamplingParams(**{"seed": 0} | sampling)
    pipeline = Prompts(params, MediaFolders(root, tuple(map(Path, media_folders)), fetch))
    options = dict(options or {})
    identity = {"model": _model_identity(model), "options": options, "sampling": asdict(params)}
    identity["source"] = source_identity(source)
    job = Job(pipeline, pipeline.items(Path(source)))
    asking = Answering(model, options, max_batch)
    found = run_pipeline(job, Path(output), identity, asking, processes, runner, on_bad_record)
    del found["records"]  # as many as there are prompts
    return found | {"replies": found["items"] - found["refused"] - found["bad"] - found["failed"]}


def _model_identity(model: Any) -> str:
    """A model by its content, one behind an API by its name."""
    from llavakit.checkpoints.identity import model_identity
    from llavakit.checkpoints.opening import local_folder
    from llavakit.generation.identity import digest_of, identity_of

    if not isinstance(model, (str, Path)):
        return digest_of(identity_of(model))
    if str(model).startswith(("http://", "https://")):
        return str(model).partition("#")[2] or str(model)
    return model_identity(local_folder(model))
