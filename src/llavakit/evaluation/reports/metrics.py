"""The metrics of reports: what there is, what each group needs, and its values for one file of predictions.

A group that cannot be computed is not skipped: `Missing` says why, and the result lists it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.metrics import condition_rules, meteor
from llavakit.evaluation.metrics import reports as measures
from llavakit.evaluation.metrics.overlap import COCO, OVERLAP, Overlap
from llavakit.evaluation.metrics.resampling import Sums
from llavakit.evaluation.packages import need
from llavakit.evaluation.reports.files import Reports
from llavakit.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = {
    "chexbert": "folder or hub id with chexbert.pth (StanfordAIMI/RRG_scorers)",
    "bert_vocabulary": "vocab.txt of BERT for CheXbert, a file or hub id",
    "radgraph": "folder that holds radgraph/ or radgraph-xl/, the unpacked model of the package radgraph",
    "bertscore": "folder or hub id of an encoder",
    "meteor": "meteor-1.5.jar, as pycocoevalcap has it",
    "ptb": "stanford-corenlp-3.4.1.jar, as pycocoevalcap has it",
    "wordnet": "data folder of NLTK with corpora/wordnet",
}
_F1 = {
    **{f"{average}_{'5' if five else '14'}{plus}": (average, five, bool(plus))
       for plus in ("", "_plus") for average in ("micro", "macro", "present") for five in (False, True)},
}  # fmt: skip


class Missing(Exception):
    """Why a group of metrics is not computed."""


@dataclass
class Sources:
    """What metrics may use beside the texts.

    Attributes:
        weights: Place of weights and programs by name, of `WEIGHTS`.
        bertscore_layer: Hidden states that BERTScore compares; None takes the published layer.
        features: Embeddings of pictures and texts for retrieval, `[pairs, width]` each, by "images" and "texts".
        loaded: What was loaded, for the second file.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    bertscore_layer: int | None = None
    features: Mapping[str, Any] | None = None
    loaded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in WEIGHTS:
                raise UserError(f"weights: {name!r} is nothing that a metric needs{nearest(name, list(WEIGHTS))}")

    def need(self, name: str, instead: str = "") -> str:
        """The place of weights.

        Args:
            instead: What would do as well, for the message.

        Raises:
            Missing: If it was not given.
        """
        if name not in self.weights:
            raise Missing(f"needs --weights {name}=PATH: {WEIGHTS[name]}{instead}")
        return str(self.weights[name])

    def once(self, name: str, load: Callable[[], Any]) -> Any:
        """What `load` gives, loaded at the first use."""
        if name not in self.loaded:
            self.loaded[name] = load()
        return self.loaded[name]

    def close(self) -> None:
        """End programs that were started."""
        for value in self.loaded.values():
            if isinstance(value, meteor.MeteorProgram):
                value.close()


Compute = Callable[[Reports, Reports, Sources], Mapping[str, Sums]]


@dataclass(frozen=True)
class Group:
    """Metrics that are computed together.

    Attributes:
        names: Of the metrics.
        compute: Values of predictions against references, in the same order.
        needs: What it needs, for listings; empty for texts alone.
    """

    names: tuple[str, ...]
    compute: Compute
    needs: str = ""


# Texts


def _overlap(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    both = Overlap(predictions.texts, references.texts)
    return {name: both.sums(name) for name in OVERLAP}


def _ptb(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    jar = sources.need("ptb")
    ours = meteor.ptb_words(predictions.texts, jar)
    theirs = sources.once("ptb references", lambda: meteor.ptb_words(references.texts, jar))
    both = Overlap(ours, theirs)
    return {_of_ptb(name): both.sums(name) for name in COCO}


def _of_ptb(name: str) -> str:
    return name.replace("coco_", "coco_ptb_")


def _coco_meteor(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    jar = sources.need("meteor")
    program = sources.once("meteor", lambda: meteor.MeteorProgram(jar))
    return {"coco_meteor": program.sums(predictions.texts, references.texts)}


def _ptb_meteor(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    jar, stanford = sources.need("meteor"), sources.need("ptb")
    program = sources.once("meteor", lambda: meteor.MeteorProgram(jar))
    theirs = sources.once("ptb references", lambda: meteor.ptb_words(references.texts, stanford))
    return {"coco_ptb_meteor": program.sums(meteor.ptb_words(predictions.texts, stanford), theirs)}


def _nltk_meteor(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    try:
        words = sources.once("wordnet", lambda: meteor.wordnet(sources.weights.get("wordnet")))
    except UserError as error:
        if "wordnet" in sources.weights:
            raise
        raise Missing(str(error)) from None
    return {"nltk_meteor": meteor.nltk_meteor(predictions.texts, references.texts, words)}


def _bertscore(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    place = sources.need("bertscore")
    from llavakit.evaluation.metrics.bertscore import BertScore

    model = sources.once("bertscore", lambda: BertScore(place, sources.bertscore_layer))
    found = model.score(predictions.texts, references.texts)
    return {f"bertscore_{name}": Sums.mean(list(values), low=-1.0) for name, values in found._asdict().items()}


# Labels


def _rules(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    wanted = sources.once("rules", lambda: condition_rules.labels(references.texts))
    return _label_sums("rules", condition_rules.labels(predictions.texts), wanted)


def _chexbert(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    given = _given(predictions, references, "labels", "labels")
    if given is not None:
        found, wanted = (np.array(own, int).T for own in given)
    else:
        model = sources.once("chexbert", lambda: _load_chexbert(sources))
        found = model(predictions.texts)
        wanted = sources.once("chexbert references", lambda: model(references.texts))
    return _label_sums("chexbert", found, wanted)


def _label_sums(prefix: str, found: np.ndarray, wanted: np.ndarray) -> dict[str, Sums]:
    sums = {
        f"{prefix}_f1_{name}": measures.f1_sums(found, wanted, average, five=five, uncertain=uncertain)
        for name, (average, five, uncertain) in _F1.items()
    }
    return sums | {f"{prefix}_kappa_14": measures.kappa_sums(found, wanted)}


def _label_names(prefix: str) -> tuple[str, ...]:
    return (*(f"{prefix}_f1_{name}" for name in _F1), f"{prefix}_kappa_14")


def _load_chexbert(sources: Sources) -> Callable[[Sequence[str]], np.ndarray]:
    place = sources.need("chexbert", "; or labels in both files, with --coding")
    from llavakit.checkpoints.files import read_file
    from llavakit.checkpoints.opening import local_file
    from llavakit.evaluation.metrics.chexbert import CheXbert, word_pieces

    weights = local_file(place, "chexbert.pth")
    words = sources.weights.get("bert_vocabulary", place if Path(place).is_dir() else "google-bert/bert-base-uncased")
    tokenizer = word_pieces(local_file(words, "vocab.txt"))
    model = CheXbert.published(read_file(weights), str(weights))
    return lambda texts: model.label(texts, tokenizer).numpy()


# Graphs


def _radgraph(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    given = _given(predictions, references, "graphs", "graph")
    if given is None:
        annotate = sources.once("radgraph", lambda: _load_radgraph(sources))
        given = annotate(predictions.texts), sources.once("radgraph references", lambda: annotate(references.texts))
    pairs = list(zip(*given, strict=True))
    return {
        f"radgraph_{kind}{level}": Sums.mean(
            [measures.radgraph_f1(own, other, level, lower=bool(kind))[0] for own, other in pairs]
        )
        for kind, level in _GRAPHS
    }


_GRAPHS = [(kind, level) for kind in ("", "lower_") for level in measures.LEVELS]
_RADGRAPHS = ("radgraph", "radgraph-xl", "modern-radgraph-xl")


def _load_radgraph(sources: Sources) -> Callable[[Sequence[str]], list[Mapping[str, Any]]]:
    """The package radgraph as a labeller."""
    place = sources.need("radgraph", "; or a graph of every report in both files")
    try:
        package = need("radgraph")
    except UserError:
        raise Missing("needs the package radgraph for its weights; or give graphs in both files (graph)") from None
    except Exception as error:  # it pins releases of transformers, and breaks on others while it is imported
        raise Missing(f"the package radgraph cannot be imported: {str(error).splitlines()[0]}") from None
    kind = next((name for name in _RADGRAPHS if (Path(place) / name / "weights.th").is_file()), None)
    if kind is None:
        raise UserError(f"{place}: holds no radgraph/weights.th or radgraph-xl/weights.th; unpack the model there")
    with contextlib.redirect_stdout(sys.stderr):  # it prints, and our output is read by programs
        model = package.RadGraph(model_type=kind, model_cache_dir=place, cuda=-1)

    def annotate(texts: Sequence[str]) -> list[Mapping[str, Any]]:
        asked = [text for text in texts if text.strip()]  # the package would read "None" for an empty text
        with contextlib.redirect_stdout(sys.stderr):
            found = model(asked) if asked else {}
        graphs = iter([found[str(n)]["entities"] for n in range(len(asked))])
        return [next(graphs) if text.strip() else {} for text in texts]

    return annotate


def _given(predictions: Reports, references: Reports, column: str, name: str) -> tuple[list[Any], list[Any]] | None:
    """What labellers left in both files; None if they did not.

    Raises:
        UserError: If only some reports have it.
    """
    own, other = list(getattr(predictions, column)), list(getattr(references, column))
    lacking = [
        (reports.file, identity)
        for reports, values in ((predictions, own), (references, other))
        for identity, value in zip(reports.ids, values, strict=True)
        if value is None
    ]
    if not lacking:
        return own, other
    if len(lacking) < len(own) + len(other):
        file, identity = lacking[0]
        raise UserError(
            f"{file}: report {identity!r} has no {name}, others have; give it for all reports of both files"
        )
    return None


# Retrieval


def read_features(path: str | Path) -> dict[str, Tensor]:
    """Embeddings of pictures and texts, as unit vectors.

    Raises:
        UserError: If the file does not hold `images` and `texts` of equal shape [pairs, width].
    """
    from torch.nn.functional import normalize

    from llavakit.checkpoints.files import read_file

    state = read_file(Path(path))
    for name in ("images", "texts"):
        if name not in state:
            raise UserError(f"{path}: holds no {name}; features are images and texts [pairs, width]")
    found = {name: state[name] for name in ("images", "texts")}
    shapes = {tuple(tensor.shape) for tensor in found.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise UserError(f"{path}: images and texts have shapes {sorted(shapes)}; both must be [pairs, width]")
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} hold values that are not finite")
    return {name: normalize(tensor.double(), dim=-1) for name, tensor in found.items()}


def _retrieval(predictions: Reports, references: Reports, sources: Sources) -> dict[str, Sums]:
    if sources.features is None:
        raise Missing("needs --features FILE: safetensors with images and texts [pairs, width]")
    ranks = measures.match_ranks(*(sources.features[name] for name in ("images", "texts")))
    return {f"{way}_R@{k}": Sums.mean(list((own < k).astype(float))) for way, own in ranks.items() for k in _AT}


_AT = (1, 5, 10)
_WAYS = ("image_to_text", "text_to_image")

GROUPS: tuple[Group, ...] = (
    Group(OVERLAP, _overlap),
    Group(_label_names("rules"), _rules),
    Group(tuple(map(_of_ptb, COCO)), _ptb, "ptb"),
    Group(("coco_meteor",), _coco_meteor, "meteor"),
    Group(("coco_ptb_meteor",), _ptb_meteor, "meteor, ptb"),
    Group(("nltk_meteor",), _nltk_meteor, "wordnet"),
    Group(tuple(f"bertscore_{part}" for part in ("precision", "recall", "f1")), _bertscore, "bertscore"),
    Group(_label_names("chexbert"), _chexbert, "chexbert, or labels in both files"),
    Group(tuple(f"radgraph_{kind}{level}" for kind, level in _GRAPHS), _radgraph, "radgraph, or graphs in both files"),
    Group(tuple(f"{way}_R@{k}" for way in _WAYS for k in _AT), _retrieval, "features"),
)
NAMES = tuple(name for group in GROUPS for name in group.names)


def check_names(names: Sequence[str]) -> None:
    """Refuse names of no metric.

    Raises:
        UserError: For the first one.
    """
    for name in names:
        if name not in NAMES:
            raise UserError(f"metrics: there is no {name!r}{nearest(name, list(NAMES))}")


def computed(
    predictions: Reports, references: Reports, sources: Sources, wanted: Sequence[str] | None = None
) -> tuple[dict[str, Sums], dict[str, str]]:
    """Every metric that can be computed, and the reason for each of the others.

    Args:
        wanted: Names of metrics; None takes all.

    Raises:
        UserError: If what was given for a metric is wrong.
    """
    found: dict[str, Sums] = {}
    missing: dict[str, str] = {}
    for group in GROUPS:
        names = [name for name in group.names if wanted is None or name in wanted]
        if not names:
            continue
        try:
            sums = group.compute(predictions, references, sources)
        except Missing as reason:
            missing |= dict.fromkeys(names, str(reason))
        else:
            found |= {name: sums[name] for name in names}
    return found, missing
