"""Surgical visual question answering in its three published formats (spec section 7.1).

Questions and answers are lines of text files, `question|answer`, or `image|question|answer` in PSI-AVA-VQA. An answer
is one of a fixed list of classes; a reply in free text is mapped to one of them, or is invalid. An invalid reply is
wrong, and belongs to no class of the averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llavakit.errors import RecordError, UserError, quoted
from llavakit.evaluation.benchmarks.base import Question, image_of, media_parts, need_gold, text_of
from llavakit.evaluation.benchmarks.classes import Classes
from llavakit.evaluation.cases import Cases, Metrics
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.overlap import Overlap
from llavakit.evaluation.metrics.text import coco_cider, corpus_bleu
from llavakit.evaluation.records import Record, pair, read_answers, read_records, read_text

ENDOVIS_18 = (
    *("kidney", "Idle", "Grasping", "Retraction", "Tissue_Manipulation", "Tool_Manipulation", "Cutting"),
    *("Cauterization", "Suction", "Looping", "Suturing", "Clipping", "Staple", "Ultrasound_Sensing"),
    *("left-top", "right-top", "left-bottom", "right-bottom"),
)
CHOLEC_80 = (
    *("no", "calot triangle dissection", "yes", "1", "2", "gallbladder dissection", "clipping cutting"),
    *("gallbladder retraction", "0", "cleaning coagulation", "gallbladder packaging", "preparation", "3"),
)
PSI_AVA = (
    *("top left", "top right", "bottom left", "bottom right"),
    *("Complejo_venoso_dorsal", "Control_Pediculos", "Espacio_de_Retzius", "Fascia_Denonvilliers"),
    *("Id_Cuello_Vesical", "LPAD", "LPAI", "Rec_Cuello_Vesical", "Separacion_Prostata_Uretra", "Tiempo_muerto"),
    *("Vesículas_Seminales", "Anudar", "Clip_Pediculos", "Corte", "Corte_Prostata", "Corte_Vejiga"),
    *("Diseccion_Denon", "Diseccion_Ganglios_Iliacos", "Diseccion_Ganglios_Obturadores", "Diseccion_Prevesical"),
    *("Diseccion_Prostata", "Diseccion_Seminal", "Empacar_Ganglios", "Empacar_Prostata", "Halar_sutura"),
    *("Id_Vena_Arteria_Iliaca", "Pasar_Aguja_Cuello", "Pasar_Aguja_Cvdp", "Pasar_Aguja_Uretra", "Succion"),
    "Sujetar_Prostata",
)
FORMS = ("Classification", "Sentence")  # folders of both data sets that have sentences
BLEU_WEIGHTS = ((1.0,), (0.5, 0.5), (0.33, 0.33, 0.33), (0.25,) * 4)  # the third as published


def read_lines(path: Path, fields: Sequence[str], folder: Path) -> Iterator[Record]:
    """The lines of a text file as records with an id of file and line; blank lines are none.

    Args:
        fields: Names of what the bars separate.
        folder: Ids name the file from here on.

    Raises:
        RecordError: If a line has another number of fields, or an empty one.
    """
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        parts = line.split("|")
        if len(parts) != len(fields):
            form = "|".join(fields)
            raise RecordError(str(path), number, "(line)", f"is {quoted(line)}, it should be {form}")
        for field, part in zip(fields, parts, strict=True):
            if not part.strip():
                raise RecordError(str(path), number, field, "is empty")
        data = {"question_id": f"{name}:{number}", **dict(zip(fields, parts, strict=True))}
        yield Record(str(path), number, data)


class SurgicalVQA(Classes):
    """What the three data sets share.

    Attributes:
        splits: Split -> what names its folders.
        fields: What the bars of a line separate.
    """

    splits: ClassVar[dict[str, tuple[Any, ...]]]
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")

    def files(self, folder: Path, place: Any, form: str) -> list[Path]:
        """The text files of one folder of a split.

        Args:
            form: "Classification" or "Sentence".
        """
        raise NotImplementedError(f"{type(self).__name__} must define files")

    def picture(self, record: Record) -> Path:
        """The picture that a line of the data set asks about, from the data set's folder on."""
        raise NotImplementedError(f"{type(self).__name__} must define picture")

    def lines(self, path: str | Path, split: str, form: str, every: int | None = None) -> list[Record]:
        """The lines of a split of the data set's folder, or of one text file; records of another file as they are.

        Raises:
            UserError: If the folder holds no file of the split.
            RecordError: If a line cannot be read.
        """
        path = Path(path)
        if path.is_file():
            return list(read_lines(path, self.fields, path.parent)) if path.suffix == ".txt" else read_records(path)
        for name, value, known in (("split", split, tuple(self.splits)), ("form", form, FORMS)):
            if value not in known:
                raise UserError(f"{name}={value}: must be {' or '.join(known)}")
        files = [file for place in self.splits[split] for file in self.files(path, place, form)]
        if every is not None:
            files = [file for file in files if frame_number(file) % every == 0]
        if not files:
            raise UserError(f"{path}: holds no text file of the split {split!r} ({form}) of {self.title}")
        return [record for file in files for record in read_lines(file, self.fields, path)]

    def questions(
        self,
        path: str | Path,
        images: str | Path | None = None,
        *,
        choices: bool = False,
        split: str = "val",
        form: str = "Classification",
        every: int | None = None,
    ) -> list[Question]:
        """The questions of the data set's folder, or of one of its text files.

        Args:
            path: Folder of the data set, a text file, or JSONL of `question_id`, `question`, `answer` and `image`.
            images: Folder that the data set's pictures are in; default: that of `path`.
            choices: Whether a question names the classes.
            split: "train" or "val".
            form: "Classification" or "Sentence", as the data set's folders are called.
            every: Keep frames whose number is a multiple of this (SurgicalGPT keeps every 100th of Cholec80-VQA).
        """
        folder = Path(images) if images is not None else Path(path) if Path(path).is_dir() else Path(path).parent
        named = self.labels if choices else ()

        def media(record: Record) -> Any:
            published = record.file.endswith(".txt")
            return (image_of(folder / self.picture(record)),) if published else media_parts(record, folder)

        return [self.ask(record, media(record), named) for record in self.lines(path, split, form, every)]

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        labels: list[str] | None = None,
        zero_division: float = 1.0,
        split: str = "val",
        form: str = "Classification",
        every: int | None = None,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Accuracy, macro precision, recall and F in percent; of sentences BLEU-1 to 4 and CIDEr.

        Args:
            gold, split, form, every: As for `questions`.
            labels: Other classes than the published ones.
            zero_division: Precision of a class that is never predicted; 1 as published.
        """
        records = self.lines(need_gold(gold, self.title, "folder of the data set"), split, form, every)
        pairs = list(pair(records, read_answers(predictions), missing=missing, extra=extra))
        if form != "Sentence":
            return self.score_pairs(pairs, labels or self.labels, zero_division)
        references, candidates = (
            [record.get("answer", str) for record, _ in pairs],
            [text_of(a) or "" for _, a in pairs],
        )
        found = sentence_scores(references, candidates)
        measures = sentence_measures(references, candidates)
        return Metrics(found, self.cases(pairs, measures))

    def cases(self, pairs: Any, *rest: Any, **options: Any) -> Cases:
        """Many questions are about one frame."""
        pairs = list(pairs)
        return super().cases(pairs, *rest, **options, pictures=[self._frame(record) for record, _ in pairs])

    def _frame(self, record: Record) -> str:
        """What tells a record's picture apart."""
        return str(self.picture(record)) if record.file.endswith(".txt") else str(record.data.get("image", record.id))


def sentence_scores(references: Sequence[str], candidates: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU-1 to 4 in percent and CIDEr (0 to 10) on lower-cased words, hyphens of references set off by spaces.

    CIDEr of a single text is not defined.
    """
    wanted = [[reference.replace("-", " - ").lower().split()] for reference in references]
    found = [candidate.lower().split() for candidate in candidates]
    scores: dict[str, Any] = {
        f"bleu_{len(weights)}": 100 * corpus_bleu(found, wanted, weights) for weights in BLEU_WEIGHTS
    }
    texts = [[" ".join(words) for words in own] for own in wanted]
    several = len(found) > 1
    return scores | {
        "cider": coco_cider([" ".join(words) for words in found], texts).value if several else None,
        "count": len(found),
    }


def sentence_measures(references: Sequence[str], candidates: Sequence[str]) -> dict[str, Measure]:
    """The metrics of `sentence_scores` as measures; without BLEU-3, whose published weights do not sum to 1."""
    wanted = [" ".join(reference.replace("-", " - ").lower().split()) for reference in references]
    overlap = Overlap([" ".join(candidate.lower().split()) for candidate in candidates], wanted)
    sums = {f"bleu_{order}": overlap.sums(f"nltk_corpus_bleu_{order}") for order in (1, 2, 4)}
    found = {name: Measure(own.table, own.value) for name, own in sums.items()}
    cider = overlap.sums("coco_cider")
    return found | {"cider": Measure(cider.table, cider.value, 1.0)}


def frame_number(file: Path) -> int:
    """The number of a frame, from the name of its text file.

    Raises:
        UserError: If the name begins with none.
    """
    number = file.name.partition("_")[0].partition(".")[0].removeprefix("frame")
    if not number.isdecimal():
        raise UserError(f"{file}: its name should begin with the number of a frame")
    return int(number)


def folder_above(file: Path, levels: int) -> str:
    """Name of the folder that a file of a data set is in, or of one above it, however its path is written.

    Args:
        levels: 1 for the folder that holds the file.

    Raises:
        UserError: If there is none.
    """
    parts = file.absolute().parts[1:]
    if len(parts) <= levels:
        raise UserError(f"{file}: should be {levels} folder(s) deep, as the data set has it; its pictures are named so")
    return parts[-1 - levels]


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"), key=lambda file: (len(file.name), file.name))


class EndoVis18(SurgicalVQA):
    """EndoVis-18-VQA: `seq_{k}/vqa/{form}/{frame}_*.txt`, pictures `seq_{k}/left_frames/{frame}.png`."""

    title = "EndoVis-18-VQA"
    labels = ENDOVIS_18
    splits: ClassVar = {"train": (2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15), "val": (1, 5, 16)}

    def files(self, folder: Path, place: Any, form: str) -> list[Path]:
        return _sorted(folder / f"seq_{place}" / "vqa" / form)

    def picture(self, record: Record) -> Path:
        file = Path(record.file)
        return Path(folder_above(file, 3), "left_frames", f"{file.name.partition('_')[0]}.png")


class Cholec80(SurgicalVQA):
    """Cholec80-VQA: `{form}/{video}/{frame}_*.txt`, pictures `cropped_image/{video}/{frame}.png`."""

    title = "Cholec80-VQA"
    labels = CHOLEC_80
    splits: ClassVar = {
        "train": (*range(1, 5), *range(6, 11), *range(13, 17), 18, *range(20, 26), *range(28, 31), *range(32, 41)),
        "val": (5, 11, 12, 17, 19, 26, 27, 31),
    }

    def files(self, folder: Path, place: Any, form: str) -> list[Path]:
        return _sorted(folder / form / str(place))

    def picture(self, record: Record) -> Path:
        file = Path(record.file)
        return Path("cropped_image", folder_above(file, 1), f"{file.stem.partition('_')[0]}.png")


class PsiAva(SurgicalVQA):
    """PSI-AVA-VQA: `Train` and `Val` with a text file for locations, phases and steps, pictures in `keyframes`."""

    title = "PSI-AVA-VQA"
    labels = PSI_AVA
    fields = ("image", "question", "answer")
    splits: ClassVar = {"train": ("Train",), "val": ("Val",)}

    def files(self, folder: Path, place: Any, form: str) -> list[Path]:
        names = ("C1_location.txt", "C3_phase.txt", "C4_step.txt")  # C2_action is not evaluated
        return [folder / place / name for name in names if (folder / place / name).is_file()]

    def picture(self, record: Record) -> Path:
        return Path("keyframes", record.data["image"])
