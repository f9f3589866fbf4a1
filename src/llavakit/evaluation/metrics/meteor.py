"""METEOR: COCO's Java program, and NLTK's definition under a name of its own; their figures differ by a factor of two.

Neither is part of llavakit. COCO's needs Java and `meteor-1.5.jar` with its `data` folder, as pycocoevalcap ships
them; NLTK's needs NLTK and WordNet's database files.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.metrics.resampling import Sums
from llavakit.evaluation.packages import need

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def java() -> str:
    """Where Java is.

    Raises:
        UserError: If it is not installed.
    """
    found = shutil.which("java")
    if found is None:
        raise UserError("needs Java; there is no `java` on the path")
    return found


class MeteorProgram:
    """METEOR 1.5 as the COCO caption evaluation runs it: English, its own normalisation, one process for all texts.

    Args:
        jar: `meteor-1.5.jar`; the folder `data` with the paraphrase table lies beside it.

    Raises:
        UserError: If there is no Java or no such file, or the program does not answer.
    """

    def __init__(self, jar: str | Path) -> None:
        self.jar = Path(jar)
        if not self.jar.is_file():
            raise UserError(f"{jar}: no such file; give the path of meteor-1.5.jar")
        command = [java(), "-Xmx2G", "-jar", str(self.jar.resolve()), "-", "-", "-stdio", "-l", "en", "-norm"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, encoding="utf-8", bufsize=1, **pipes)
        self._known: dict[tuple[float, ...], float] = {}

    def __enter__(self) -> MeteorProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the program."""
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()

    def sums(self, texts: Sequence[str], references: Sequence[str]) -> Sums:
        """The metric: its statistics of every text, whose sums the program scores itself."""
        lines = [self._ask(f"SCORE ||| {_line(b)} ||| {_line(a)}") for a, b in zip(texts, references, strict=True)]
        table = np.array([[float(value) for value in line.split()] for line in lines]).reshape(len(lines), -1)
        return Sums(table, self._values)

    def _values(self, sums: np.ndarray) -> np.ndarray:
        rows = sums.reshape(-1, sums.shape[-1])
        return np.array([self._value(tuple(row)) for row in rows.tolist()]).reshape(sums.shape[:-1])

    def _value(self, row: tuple[float, ...]) -> float:
        if row not in self._known:
            self._ask("EVAL ||| " + " ".join(f"{value:.1f}" for value in row), answers=2)
            self._known[row] = self._last
        return self._known[row]

    def _ask(self, line: str, answers: int = 1) -> str:
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            found = ""
            for _ in range(answers):
                found = self._process.stdout.readline()
            if not found:
                raise OSError
        except OSError:
            raise UserError(f"{self.jar}: the program gave no answer; is its folder `data` beside it?") from None
        if answers > 1:
            self._last = float(found)
        return found


def _line(text: str) -> str:
    """A text as the COCO caption evaluation hands it over."""
    return " ".join(text.replace("|||", "").split())


def ptb_words(texts: Sequence[str], jar: str | Path) -> list[str]:
    """Texts as the COCO caption evaluation tokenises them: Stanford's PTBTokenizer, lower case, without punctuation.

    Args:
        jar: `stanford-corenlp-3.4.1.jar`.

    Raises:
        UserError: If there is no Java or no such file, or the program fails.
    """
    jar = Path(jar)
    if not jar.is_file():
        raise UserError(f"{jar}: no such file; give the path of stanford-corenlp-3.4.1.jar")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "texts.txt"
        file.write_text("\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
        command = [java(), "-Dfile.encoding=UTF-8", "-cp", str(jar.resolve()), "edu.stanford.nlp.process.PTBTokenizer"]
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase", str(file)], capture_output=True, text=True, encoding="utf-8"
        )
    lines = done.stdout.split("\n")
    if done.returncode or len(lines) < len(texts):
        raise UserError(f"{jar}: Stanford's tokeniser gave {len(lines)} lines for {len(texts)} texts")
    return [" ".join(word for word in line.split() if word not in PUNCTUATION) for line in lines[: len(texts)]]


def wordnet(folder: str | Path | None = None) -> Any:
    """NLTK's reader of WordNet.

    Args:
        folder: Data folder of NLTK with `corpora/wordnet` in it (`nltk.download("wordnet")` makes one); None looks
            where NLTK keeps its data.

    Raises:
        UserError: If NLTK or the files are missing.
    """
    data = need("nltk.data")
    if folder is not None:
        folder = str(Path(folder).resolve())
        if not any((Path(folder) / "corpora" / name).exists() for name in ("wordnet", "wordnet.zip")):
            raise UserError(f"{folder}: holds no corpora/wordnet; give a data folder of NLTK")
        if folder not in data.path:
            data.path.append(folder)  # NLTK opens no file elsewhere
    words = need("nltk.corpus").wordnet
    try:
        words.ensure_loaded()
    except LookupError:
        raise UserError("needs WordNet in NLTK's data: --weights wordnet=FOLDER, or nltk.download('wordnet')") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: WordNet's files cannot be read: {str(error).splitlines()[0]}") from None
    return words


def nltk_meteor(texts: Sequence[str], references: Sequence[str], words: Any) -> Sums:
    """The mean of NLTK's METEOR, texts split at white space.

    Args:
        words: `wordnet`'s.
    """
    score = need("nltk.translate.meteor_score").single_meteor_score
    pairs = zip(texts, references, strict=True)
    return Sums.mean([float(score(b.split(), a.split(), wordnet=words)) for a, b in pairs])
