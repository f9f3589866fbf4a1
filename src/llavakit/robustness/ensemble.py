"""The order in which published evaluations attack: stage after stage, and only what is not broken yet.

Captions: no attack, then five references one after another in half precision from the clean picture, then the one that
did most harm in single precision, from where it led. A picture whose score fell below a threshold is left alone.
Questions: the same with the most frequent answers, then fixed strings as targets. Source: Robust CLIP
(arXiv 2402.12336), section 4.1 and appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WORST = "worst"  # the reference that did most harm so far, from where it led
THRESHOLDS = {"coco": 10.0, "flickr": 2.0, "vqa": 0.0}
VQA_TARGETS = ("maybe", "Word")
REFERENCES = 5


@dataclass(frozen=True)
class Stage:
    """One pass over the pictures.

    Attributes:
        attack: Whether pictures are attacked at all.
        half: Whether in half precision.
        reference: Number of the reference to lead away from, or `WORST`.
        target: The string to lead to, instead of a reference.
    """

    attack: bool = True
    half: bool = True
    reference: int | str = 0
    target: str | None = None


CAPTION_STAGES = (
    Stage(attack=False),
    *(Stage(reference=number) for number in range(REFERENCES)),
    Stage(half=False, reference=WORST),
)
VQA_STAGES = (*CAPTION_STAGES, *(Stage(half=False, target=target) for target in VQA_TARGETS))


@dataclass(frozen=True)
class Job:
    """What a stage does to a picture.

    Attributes:
        reference: Number of the reference; None for a target.
        start: The stage whose attacked picture it starts from; None for the clean one.
    """

    reference: int | None
    start: int | None


@dataclass
class Schedule:
    """Who is attacked next, and how, given what earlier stages left.

    Args:
        pictures: Names, in order.
        stages: The ensemble.
        threshold: Scores below it need no further attack; with `exact` those at it.
        exact: See `threshold`.
        references: How many references each picture has; stages beyond that pass it by. None for enough.
    """

    pictures: Sequence[Hashable]
    stages: Sequence[Stage] = CAPTION_STAGES
    threshold: float = THRESHOLDS["coco"]
    exact: bool = False
    references: Mapping[Hashable, int] | None = None
    last: dict[Hashable, float] = field(default_factory=dict)
    best: dict[Hashable, float] = field(default_factory=dict)
    best_stage: dict[Hashable, int] = field(default_factory=dict)
    worst_reference: dict[Hashable, int] = field(default_factory=dict)
    broken: set[Hashable] = field(default_factory=set)

    def jobs(self, number: int) -> dict[Hashable, Job]:
        """The pictures that a stage attacks or, in the first, answers about."""
        stage = self.stages[number]
        found = {}
        for name in self.pictures:
            if name in self.broken:
                continue
            if stage.target is not None:
                found[name] = Job(None, None)
            elif stage.reference == WORST:
                begun = self.best_stage.get(name, 0)
                found[name] = Job(self.worst_reference.get(name, 0), begun if self.stages[begun].attack else None)
            elif self.references is None or not stage.attack or stage.reference < self.references[name]:
                found[name] = Job(int(stage.reference), None)
        return found

    def note(self, number: int, scores: Mapping[Hashable, float]) -> None:
        """Take the scores of a stage's pictures; of the others the last one stands."""
        jobs = self.jobs(number)
        for name, score in scores.items():
            self.last[name] = score
            if score < self.best.get(name, math.inf):
                self.best[name], self.best_stage[name] = score, number
                if jobs[name].reference is not None:
                    self.worst_reference[name] = jobs[name].reference
        for name in scores:
            if self.last[name] < self.threshold or (self.exact and self.last[name] == self.threshold):
                self.broken.add(name)

    @property
    def left(self) -> list[Hashable]:
        """Pictures that are not broken."""
        return [name for name in self.pictures if name not in self.broken]

    def mean_last(self) -> float:
        """Mean over all pictures of their last score."""
        return mean_of(self.last[name] for name in self.pictures)

    def mean_best(self) -> float:
        """Mean over all pictures of their lowest score: the attacked score."""
        return mean_of(self.best[name] for name in self.pictures)


def mean_of(values: Iterable[float]) -> float:
    """The mean as NumPy prints it."""
    import numpy as np

    return float(np.mean(list(values)))


def success_rate(target: str, replies: Sequence[str]) -> float:
    """Percentage of replies that contain the target, whatever the case of letters."""
    return 100 * sum(contains(reply, target) for reply in replies) / len(replies)


def contains(reply: str, target: str) -> bool:
    """Whether a reply contains the target, whatever the case of letters."""
    return target.lower() in reply.lower()
