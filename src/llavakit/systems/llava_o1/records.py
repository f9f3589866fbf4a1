"""Training records in stages from records with plain answers, written by a teacher as the published data were.

    llavakit prepare staged_answers questions.json staged.jsonl teacher=http://localhost:8000/v1#NAME images=pictures

Source: records of LLaVA's form with one picture, answers as they are to be concluded, and optionally `hints` (texts for
the teacher). Replies are kept beside the output (`.teacher.jsonl`), and so are ids of records with a refused question
(`.refused.json`); interrupted, the same command goes on. A call that failed leaves its record for the next time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.data.readers import open_source
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.judges import Judge
from llavakit.generation.remote import CallFailed
from llavakit.systems.llava_o1.stages import stages_codec
from llavakit.systems.llava_o1.teaching import VERDICT_TOKENS, staged_record


def staged_answers(
    source: Path,
    output: Path,
    bad: Left,
    *,
    teacher: str,
    verifier: str | None = None,
    images: str | None = None,
    base_url: str | None = None,
    api_key_env: str | None = None,
    concurrency: int | None = None,
    temperature: float = 1.0,
    max_tokens: int = 2048,
    price_in: float | None = None,
    price_out: float | None = None,
    max_cost: float | None = None,
) -> dict[str, Any]:
    """Preparation of answers in stages; see the module.

    Args:
        teacher: Address (`http://host:8000/v1#NAME`), model folder, or name of a model at `base_url`; the further
            options are those of `llavakit.generation.remote.APIClient`.
        verifier: Who compares conclusions with answers; default: the teacher.
        images: Folder of the pictures; default: that of the source.
        temperature, max_tokens: Of the teacher.

    Raises:
        UserError: If an option does not fit, or what is kept beside the output is something else.
    """
    folder = Path(images) if images is not None else source.parent
    left_behind = output.with_suffix(".refused.json")
    done = list(open_source(output)) if output.exists() else []
    refused = _refused(left_behind)
    known = {_key(record.get("id")) for record in done} | {_key(own) for own in refused}
    pending, missing = [], 0
    for record in _checked(open_source(source), str(source), bad):
        if _key(record["id"]) in known:
            continue
        if not (folder / record["image"]).is_file():
            missing += 1
            continue
        known.add(_key(record["id"]))
        pending.append(record)
    api = {"api_key_env": api_key_env, "price_in": price_in, "price_out": price_out, "max_cost": max_cost}
    given = {name: value for name, value in api.items() if value is not None}
    cache = output.with_suffix(".teacher.jsonl")
    options = {"temperature": temperature, "max_tokens": max_tokens, "concurrency": concurrency}
    counts: Counter[str] = Counter({"failed_calls": 0})
    made = list(done)
    with Judge(teacher, base_url, cache=cache, **options, **given) as writing:
        checking = writing
        if verifier is not None:
            checking = Judge(verifier, base_url, cache=output.with_suffix(".verifier.jsonl"), **options, **given)
        try:
            write = _writer(writing, checking, folder)
            for record, found in zip(pending, writing.map(write, pending), strict=True):
                if isinstance(found, CallFailed):
                    counts["failed_calls"] += 1
                    continue
                staged, failed = found
                if failed:
                    refused.append(record["id"])
                if staged is not None:
                    made.append(staged)
        finally:
            if checking is not writing:
                checking.close()
    written = write_records(output, made)
    left_behind.write_text(json.dumps(refused, ensure_ascii=False), encoding="utf-8")
    return {"records": written, "refused": len(refused), "without_image": missing, **counts}


def _writer(teacher: Judge, verifier: Judge, folder: Path) -> Callable[[Mapping[str, Any]], Any]:
    """`staged_record` with two askers; what is asked again is asked anew."""

    def asking(asker: Judge, seen: Counter[Any], **fields: Any) -> Callable[[str | None, Sequence[str]], str]:
        def ask(image: str | None, texts: Sequence[str]) -> str:
            parts = [{"type": "text", "text": text} for text in texts]
            if image is not None:
                parts.insert(0, {"type": "image", "image": str(folder / image)})
            attempt = seen[asker, *texts]
            seen[asker, *texts] += 1
            answer = asker.answer([{"role": "user", "content": parts}], attempt=attempt, **fields)
            return answer.text or stages_codec().render(answer) if answer.reasoning else answer.content

        return ask

    def write(record: Mapping[str, Any]) -> Any:
        seen: Counter[Any] = Counter()
        return staged_record(record, asking(teacher, seen), asking(verifier, seen, max_new_tokens=VERDICT_TOKENS))

    return write


def _key(value: Any) -> str:
    return json.dumps(value)


def _refused(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, list):
        raise UserError(f"{path}: must be a list of ids; move it away, and its records are asked again")
    return found


def _checked(records: Iterable[Any], file: str, bad: Left) -> Iterable[dict[str, Any]]:
    """Records that a teacher can be asked about; others go to `bad`."""
    for line, record in enumerate(records, 1):
        problem = _problem(record)
        if problem is None:
            yield record
        else:
            bad(RecordError(file, line, *problem))


def _problem(record: Any) -> tuple[str, str] | None:
    if not isinstance(record, Mapping):
        return "record", f"must be an object, not {type(record).__name__}"
    if not isinstance(record.get("id"), (str, int)):
        return "id", "is missing; results are found again by it"
    if not isinstance(record.get("image"), str) or not record["image"]:
        return "image", "must be the name of one picture"
    hints = record.get("hints")
    if hints is not None and not (isinstance(hints, list) and all(isinstance(hint, str) for hint in hints)):
        return "hints", "must be a list of texts"
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        return "conversations", "must be a list of a question and its answer, or several"
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, Mapping) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            return f"conversations.{number}", f"must be a text from {speaker!r}"
    return None
