"""Files of VQA-RAD, SLAKE and PathVQA, as their authors publish them and as LLaVA-Med's code converts them.

    llavakit prepare medical_vqa "VQA_RAD Dataset Public.json" train.json split=train
    llavakit prepare medical_vqa Slake1.0/train.json train.json
    llavakit prepare medical_vqa pvqa/qas/train/train_qa.pkl train.json

A question is `question_id`, `image`, `text`, `answer` and `answer_type` (OPEN or CLOSED). Ids that repeat, as in the
converted files of VQA-RAD, are numbered in order: `synpic100`, `synpic100#2`.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.records import Record, as_records, choose, read_records

OPEN, CLOSED = "OPEN", "CLOSED"
IMAGE = "<image>"
CONVERSATIONS = ("conversations", "conversatons")  # the second is a spelling of released files
ENGLISH = "en"
SPLITS = ("all", "train", "test")
IMAGES_OF_SLAKE, SUFFIX_OF_PATHVQA = "imgs", ".jpg"

Field = tuple[type, ...]
WRITTEN: Field = (str, int)


def read_questions(path: str | Path, split: str = "all", language: str = ENGLISH) -> list[Record]:
    """The questions of a file in any of the forms.

    Args:
        split: "train" or "test" of VQA-RAD's one file, whose records say which they are; else "all".
        language: Of SLAKE, whose files hold two ("en", "zh"); "all" for both.

    Raises:
        RecordError: If a record lacks what its form has.
    """
    choose(split, "split", SPLITS)
    records = read_pickled(path) if Path(path).suffix == ".pkl" else read_records(path)
    if not records:
        raise UserError(f"{path}: holds no question")
    found = [record for record in records if _wanted(record, split, language)]
    if not found:
        raise UserError(f"{path}: holds no question of split {split} and language {language}")
    return numbered([replace(record, data=question_of(record)) for record in found])


def _wanted(record: Record, split: str, language: str) -> bool:
    if "q_lang" in record.data and language != "all" and record.get("q_lang", str) != language:
        return False
    if split == "all":
        return True
    if "phrase_type" not in record.data:
        raise UserError(
            f"split={split}: {record.file} has no phrase_type, by which VQA-RAD says it; name a file of one split"
        )
    return record.get("phrase_type", str).startswith("test") == (split == "test")


def question_of(record: Record) -> dict[str, Any]:
    """What a record asks; other fields of it are left out.

    Raises:
        RecordError: It names the first field that is missing.
    """
    data = record.data
    name = next((name for name in CONVERSATIONS if data.get(name) is not None), None)
    if name is not None:
        return _converted(record, name)
    if "img_name" in data:  # SLAKE
        own = {"question_id": record.get("qid", WRITTEN), "image": f"{IMAGES_OF_SLAKE}/{record.get('img_name', str)}"}
        return own | _asked(record, "question")
    if "image_name" in data:  # VQA-RAD
        own = {"question_id": record.get("qid", WRITTEN), "image": record.get("image_name", str)}
        return own | _asked(record, "question")
    if "text" in data:
        return {"question_id": record.id, "image": record.get("image", str, None)} | _asked(record, "text")
    image = record.get("image" if "image" in data else "img_id", str)  # PathVQA
    own = {"question_id": data.get("question_id", image), "image": f"{image.removesuffix(SUFFIX_OF_PATHVQA)}.jpg"}
    return own | _asked(record, "question" if "question" in data else "sent")


def _converted(record: Record, name: str) -> dict[str, Any]:
    turns = record.get(name, list)
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    if len(values) < 2 or not all(isinstance(value, WRITTEN) and not isinstance(value, bool) for value in values):
        raise record.error(name, "must hold a question and its answer, each with a value")
    question = str(values[0]).replace(IMAGE, "").strip()
    field = "id" if "id" in record.data else "question_id"
    own = {"question_id": str(record.get(field, WRITTEN)), "image": record.get("image", str, None), "text": question}
    return own | {"answer": str(values[1]), "answer_type": _type(record, None)}


def _asked(record: Record, name: str) -> dict[str, Any]:
    answer = record.data.get("answer")
    if answer is None and isinstance(record.data.get("label"), dict) and record.data["label"]:
        answer = max(record.data["label"], key=record.data["label"].get)  # PathVQA: answers with a weight
    if answer is None:
        answer = record.get("answer", WRITTEN)
    text = record.get(name, str).replace(IMAGE, "").strip()
    return {"text": text, "answer": str(answer), "answer_type": _type(record, str(answer))}


def _type(record: Record, answer: str | None) -> str:
    """OPEN or CLOSED; PathVQA names neither, there it follows from the answer.

    Args:
        answer: None where the file must say it.
    """
    said = record.get("answer_type", str, "").strip().upper()
    if said in (OPEN, CLOSED):
        return said
    if answer is None or (said and said not in ("YES/NO", "NUMBER", "OTHER")):
        raise record.error("answer_type", f"must be {OPEN} or {CLOSED}")
    return CLOSED if answer.strip().lower() in ("yes", "no") else OPEN


def numbered(records: Iterable[Record], field: str = "question_id") -> list[Record]:
    """Records whose ids are unique: the second of the same id gets `#2` behind it, and so on."""
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        name = str(record.get(field, WRITTEN))
        seen[name] += 1
        own = name if seen[name] == 1 else f"{name}#{seen[name]}"
        found.append(replace(record, data={**record.data, field: own}))
    return found


class _Plain(pickle.Unpickler):
    """Reads texts, numbers, lists and mappings, and no object of a class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


def read_pickled(path: str | Path) -> list[Record]:
    """The records of a pickled list, as PathVQA comes; nothing in it is executed.

    Raises:
        UserError: If it is anything but a list of plain objects.
    """
    try:
        with Path(path).open("rb") as file:
            rows = _Plain(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a pickle may be broken in any way
        raise UserError(f"{path}: is no pickled list of plain values ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a pickled list, is {type(rows).__name__}")
    return as_records(path, rows)


def medical_vqa(
    source: Path, output: Path, bad: Left, *, split: str = "all", language: str = ENGLISH
) -> dict[str, Any]:
    """Questions of a benchmark as training records, the picture in front of the question.

    Args:
        split: "train" or "test" of VQA-RAD's one file.
        language: Of SLAKE: "en", "zh" or "all".
    """
    choose(split, "split", SPLITS)
    questions = numbered(_readable(source, split, language, bad))
    if not questions:
        raise UserError(f"{source}: holds no question of split {split} and language {language}")
    pictured = []
    for question in questions:
        if question.data["image"]:
            pictured.append(training_record(question))
        else:
            bad(question.error("image", "is missing; a training record needs the name of its picture"))
    return {"records": len(questions), "written": write_records(output, pictured)}


def _readable(source: Path, split: str, language: str, bad: Left) -> Iterator[Record]:
    """What `read_questions` reads, without the records that it would refuse."""
    for record in read_pickled(source) if source.suffix == ".pkl" else read_records(source, bad):
        try:
            if _wanted(record, split, language):
                yield replace(record, data=question_of(record))
        except RecordError as error:
            bad(error)


def training_record(question: Record) -> dict[str, Any]:
    """A question and its answer as LLaVA's record."""
    data = question.data
    turns = [{"from": "human", "value": f"{IMAGE}\n{data['text']}"}, {"from": "gpt", "value": data["answer"]}]
    return {
        "id": data["question_id"],
        "image": data["image"],
        "answer_type": data["answer_type"],
        "conversations": turns,
    }
