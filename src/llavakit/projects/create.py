"""`llavakit new`: examples to a folder with records, held-out questions and a recipe that fits.

    OUT/
      train.jsonl      records in LLaVA's form, one per example
      heldout.jsonl    questions with answers, for `llavakit eval`
      recipe.yaml      what `llavakit train` runs; writes to OUT/run, and asks the held-out questions
      project.json     what was assumed, and the commands to go on with

Held out is a fifth of the subjects, or of the pictures where nothing names subjects; equal pictures under two names
stay together. The folder appears whole or not at all, and nothing that exists is written over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llavakit.data.records import BadRecords
from llavakit.errors import MediaError, RecordError, UserError
from llavakit.evaluation.benchmarks.base import SHORT_ANSWER
from llavakit.media.image import load_image
from llavakit.projects.examples import FEW_ANSWERS, Example, Found, classes_of, find
from llavakit.projects.fitting import Fit, fit_to, recipe_text
from llavakit.training.fingerprint import spread

SHARE = 5  # one of so many groups is held out
MOST_HELD_OUT = 1000  # groups
OPENED = 256_000_000  # bytes of pictures that are opened; of more some are
SOME = 256
_ENDS = 1 << 16  # bytes at either end by which pictures of equal size are compared
WORDS = 5  # of a short answer


@dataclass
class Project:
    """What was written.

    Attributes:
        folder: The project's folder.
        train, heldout: Records, and held-out questions.
        task: Benchmark that scores the answers.
        said: What was assumed, in words.
        left_out: Rows that were left out, in words.
        commands: What to type next.
    """

    folder: str
    train: int
    heldout: int
    task: str
    said: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def create(
    source: str | Path,
    out: str | Path | None = None,
    *,
    system: str | None = None,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_record: str = "stop",
) -> Project:
    """Make a project of pictures.

    Args:
        source: Folder of pictures, or a table of them; see `llavakit.projects.examples`.
        out: Folder to write; default `runs/NAME` after the source.
        system: Slug of a published system, whose released weights are the start.
        model: Checkpoint to start from instead.
        columns: Names of columns by meaning, where they are not to be guessed.
        on_bad_record: "stop" at a broken row, or "skip" it.

    Raises:
        UserError: One line; nothing was written then.
    """
    source = Path(source).expanduser()
    out = Path(out) if out is not None else Path("runs", source.resolve().stem)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists, and nothing is written over; name another folder with --out")
    bad = BadRecords() if on_bad_record == "skip" else None
    found = find(source, dict(columns or {}), bad)
    fit = fit_to(system, model)  # before pictures are opened
    found.examples = _readable(found, bad)
    _check_answers(found)
    train, heldout = split(found)
    short = sum(len(e.answer.split()) <= WORDS for e in found.examples) >= 0.95 * len(found.examples)
    asks = _questions(found, short)
    project = Project(
        str(out), len(train), len(heldout), "exact_match" if short else "text_overlap", found.said + fit.said
    )
    project.left_out = [] if bad is None else [str(error) for error in bad.errors()]
    _note_split(project, found, train, heldout)
    _write(project, found.root.resolve(), [asks(e) for e in train], [asks(e) for e in heldout], fit)
    return project


# checks


def _readable(found: Found, bad: BadRecords | None) -> list[Example]:
    """The examples whose pictures can be opened: all of a small set are, some of a large one."""
    first: dict[str, Example] = {}
    for example in found.examples:
        for path in example.media:
            first.setdefault(path, example)
    names = list(first)
    sizes = [_size(found.root / name) for name in names]
    chosen = range(len(names)) if sum(sizes) <= OPENED else spread(len(names), SOME)
    broken = set()
    for number in chosen:
        name = names[number]
        if os.path.splitext(name)[1].lower() in (".mp4", ".avi", ".mkv", ".mov", ".webm", ".npy", ".gz", ".nii", ""):
            continue  # clips and volumes are opened when training checks its records
        try:
            load_image(found.root / name)
        except MediaError as error:
            problem = RecordError(*first[name].place, "image", str(error))
            if bad is None:
                raise problem from None
            broken.add(name)
            for example in found.examples:
                if name in example.media:
                    bad.add(RecordError(*example.place, "image", str(error)))
    opened = "all" if len(chosen) == len(names) else f"{len(chosen):,}"
    found.said.append(f"{opened} of {len(names):,} pictures were opened")
    return [example for example in found.examples if broken.isdisjoint(example.media)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _check_answers(found: Found) -> None:
    examples = found.examples
    if not examples:
        raise UserError("no usable row is left; each needs a picture that exists and an answer")
    classes = classes_of(examples)
    if len(classes) == 1:
        raise UserError(
            f"all {len(examples):,} answers are {examples[0].answer!r}, so there is nothing to tell apart; add "
            "pictures with other answers"
        )


# splitting


def split(found: Found) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and those held out, in their order.

    Every fifth group of examples is held out, ordered by their first answer and a digest of their name, so that all
    answers are in both parts and the order of the file does not matter.

    Raises:
        UserError: If there is one group.
    """
    groups = _groups(found)
    if len(set(groups)) < 2:
        what = "subject" if found.examples[0].subject is not None else "picture"
        raise UserError(f"there is one {what} alone, so none can be held out; add others")
    answer: dict[str, str] = {}
    for group, example in zip(groups, found.examples, strict=True):
        answer.setdefault(group, example.answer)
    order = sorted(answer, key=lambda group: (answer[group], hashlib.sha256(group.encode()).digest()))
    step = max(SHARE, -(-len(order) // MOST_HELD_OUT))
    held = set(order[min(step // 2, len(order) - 1) :: step])
    train = [e for group, e in zip(groups, found.examples, strict=True) if group not in held]
    return train, [e for group, e in zip(groups, found.examples, strict=True) if group in held]


def _groups(found: Found) -> list[str]:
    """The group of every example: its subject or picture, joined with others that have an equal picture."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    names = {path: None for example in found.examples for path in example.media}
    sizes = {name: _size(found.root / name) for name in names}
    shared = {size for size, count in Counter(sizes.values()).items() if count > 1}
    content = {n: _ends(found.root / n, size) if size in shared else n for n, size in sizes.items()}
    keys = []
    for example in found.examples:
        own = [f"subject {example.subject}"] if example.subject is not None else []
        own += [f"picture {content[path]}" for path in example.media] or [f"line {example.place[1]}"]
        keys.append(own[0])
        for other in own[1:]:
            parent[root(other)] = root(own[0])
    return [root(key) for key in keys]


def _ends(path: Path, size: int) -> str:
    """A digest of a file's size and ends."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_ENDS))
        if size > _ENDS:
            stream.seek(max(_ENDS, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def _note_split(project: Project, found: Found, train: Sequence[Example], heldout: Sequence[Example]) -> None:
    subjects = found.examples[0].subject is not None
    project.said.append(
        f"{len(train):,} records to learn from, {len(heldout):,} questions held out, split by "
        f"{'subject' if subjects else 'picture'}"
    )
    classes = classes_of(found.examples)
    unseen = sorted(set(classes_of(heldout)) - set(classes_of(train)))
    if len(classes) <= FEW_ANSWERS and unseen:
        project.said.append(f"held out alone, so never learned: {', '.join(map(repr, unseen[:5]))}")
    if len(classes) <= FEW_ANSWERS and found.examples[0].question is None:
        answer, count = classes.most_common(1)[0]
        project.said.append(f"{len(classes)} classes; {answer!r} alone is {100 * count / len(found.examples):.0f} %")


# writing


def _questions(found: Found, short: bool) -> Any:
    """Makes of an example its record, question and type.

    Examples without a question get one: classes are named in it, other pictures are to be described.
    """
    classes = sorted(classes_of(found.examples))
    few = len(classes) <= FEW_ANSWERS
    texts = {example.question for example in found.examples}
    default = "Describe the picture."
    if short:
        default = "What does the picture show?"
        if few and sum(map(len, classes)) < 300:
            default += f" It is one of: {', '.join(classes)}."
    if None in texts:
        found.said.append(f"the question is {default!r}")
    if short:
        found.said.append(f"answers are short, so questions end with {SHORT_ANSWER!r}")
    else:
        found.said.append("answers are running text, scored by the overlap of their words with the truth")

    def made(example: Example) -> tuple[dict[str, Any], dict[str, Any]]:
        text = example.question or default
        if example.record is None and short and SHORT_ANSWER not in text:
            text = f"{text}\n{SHORT_ANSWER}"
        media = {} if example.record is not None else {"image": example.media[0]}
        kind = example.question if 1 < len(texts) <= FEW_ANSWERS else example.answer if few else None
        subject = {} if example.subject is None else {"subject": example.subject}
        turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": example.answer}]
        record = dict(example.record or {"id": example.id, **media, **subject, "conversations": turns})
        if example.record is not None:
            media = {key: record[key] for key in ("image", "video", "volume") if record.get(key) is not None}
            media = media or ({"image": list(example.media)} if example.media else {})
        question = {"question_id": example.id, **media, "text": text, "answer": example.answer, **subject}
        return record, question | ({} if kind is None else {"type": kind})

    return made


def _write(project: Project, root: Path, train: Sequence[Any], heldout: Sequence[Any], fit: Fit) -> None:
    from llavakit.checkpoints.files import atomic_folder

    out = Path(project.folder)
    question = heldout[0][1]
    picture = question["image"] if isinstance(question.get("image"), str) else None
    project.commands = [
        f"llavakit train {_shell(out / 'recipe.yaml')}",
        f"llavakit eval {_shell(out / 'run' / 'final')} --task {project.task} "
        f"--questions {_shell(out / 'heldout.jsonl')} --images {_shell(root)}",
        f"llavakit chat {_shell(out / 'run' / 'final')}"
        + (f" --image {_shell(root / picture)}" if picture else "")
        + f" --prompt {_shell(question['text'].splitlines()[0])}",
    ]
    text = recipe_text(fit, out.resolve(), root, project.task, len(train), project.commands)
    with atomic_folder(out) as scratch:
        _lines(scratch / "train.jsonl", (record for record, _ in train))
        _lines(scratch / "heldout.jsonl", (question for _, question in heldout))
        (scratch / "recipe.yaml").write_text(text, encoding="utf-8")
        facts = json.dumps(project.facts(), indent=1, ensure_ascii=False)
        (scratch / "project.json").write_text(facts + "\n", encoding="utf-8")


def _lines(path: Path, rows: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _shell(word: Any) -> str:
    import shlex

    return shlex.quote(str(word))
