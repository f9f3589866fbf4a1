"""AutoAttack's two gradient attacks on a classifier: APGD on the cross entropy, APGD on the targeted DLR loss.

Samples that an attack fools are out; the next attack starts again from the clean pictures of the others. A robust
accuracy always names the attacks that made it: with fewer than four classes the targeted loss does not exist, and
cross entropy alone is used. Source: Croce and Hein (arXiv 2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakit.errors import UserError
from llavakit.registry import nearest
from llavakit.robustness.apgd import Judged, apgd
from llavakit.robustness.balls import at_least_single, check_eps, check_norm, start_on_edge
from llavakit.robustness.losses import FEWEST_FOR_TARGETED_DLR, targeted_dlr

Classifier = Callable[[Tensor], Tensor]  # pictures [pictures, ...] in 0..1 to logits [pictures, classes]
ATTACKS = ("apgd-ce", "apgd-t")


@dataclass(frozen=True)
class AutoAttack:
    """The attack's settings; the defaults are those of AutoAttack's standard version.

    Args:
        eps: Radius, in pixels of 0..1.
        norm: "linf" or "l2".
        attacks: Names, in the order in which they run.
        steps: Iterations of each run.
        first_step: In units of eps.
        restarts: Runs of `apgd-ce`; each has its own random start.
        target_classes: Most likely wrong classes that `apgd-t` aims at; at most all but one.
        target_restarts: Runs of `apgd-t` for every one of them.
        batch: Pictures that are attacked together; None for all.
        leave: Whether a fooled picture leaves the batch at once. The published attack goes on to the end of its run,
            which changes where a fooled picture ends and never whether it is fooled.
        noise: Gives the noise of a random start of a shape, in 0..1; default `torch.rand` with `seed`.
        seed: Of the random starts; every attack of every batch begins with it again, as published.
    """

    eps: float
    norm: str = "linf"
    attacks: Sequence[str] = ATTACKS
    steps: int = 100
    first_step: float = 2.0
    restarts: int = 1
    target_classes: int = 9
    target_restarts: int = 1
    batch: int | None = None
    leave: bool = True
    noise: Callable[[Sequence[int]], Tensor] | None = field(default=None, repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.norm == "linf":  # a Euclidean radius grows with the picture
            check_eps(self.eps)
        for name in self.attacks:
            if name not in ATTACKS:
                raise UserError(f"attacks: unknown attack {name!r}{nearest(name, list(ATTACKS))}")

    def possible(self, classes: int) -> tuple[str, ...]:
        """The attacks that can be made with so many classes."""
        return tuple(name for name in self.attacks if name != "apgd-t" or classes >= FEWEST_FOR_TARGETED_DLR)

    def targets(self, classes: int) -> int:
        """How many wrong classes `apgd-t` aims at, with so many classes."""
        return min(self.target_classes, classes - 1)


@dataclass
class Fooled:
    """What is left of a classifier under attack, per picture.

    Attributes:
        pictures: The attacked picture where an attack succeeded, else the clean one.
        predictions: Classes of these.
        robust: Whether the clean picture was right and every attack failed.
        attacks: Names of the attacks that were made.
    """

    pictures: Tensor
    predictions: Tensor
    robust: Tensor
    attacks: tuple[str, ...]


@torch.no_grad()
def predictions(classify: Classifier, pictures: Tensor, batch: int | None = None) -> Tensor:
    """The most likely class of every picture."""
    pieces = pictures.split(batch or max(len(pictures), 1))
    found = [classify(piece).argmax(-1) for piece in pieces if len(piece)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def autoattack(classify: Classifier, clean: Tensor, labels: Tensor, settings: AutoAttack) -> Fooled:
    """Attack a classifier's right answers until none is left or no attack is.

    Args:
        clean: [pictures, ...] in 0..1.
        labels: [pictures].
    """
    clean = at_least_single(clean)
    found = predictions(classify, clean, settings.batch)
    result = Fooled(clean.clone(), found, found == labels, ())
    for name in settings.attacks:
        rows = result.robust.nonzero().flatten()
        if not len(rows):
            break
        run = apgd_ce if name == "apgd-ce" else apgd_t
        for some in rows.split(settings.batch or len(rows)):
            attacked, made = run(classify, clean[some], labels[some], settings)
            if not made:
                continue
            if name not in result.attacks:
                result.attacks += (name,)
            now = predictions(classify, attacked)
            fooled = now != labels[some]
            result.pictures[some[fooled]] = attacked[fooled]
            result.predictions[some[fooled]] = now[fooled]
            result.robust[some[fooled]] = False
    return result


def apgd_ce(classify: Classifier, clean: Tensor, labels: Tensor, settings: AutoAttack) -> tuple[Tensor, bool]:
    """APGD on the cross entropy, from `restarts` random starts for the pictures that are still right.

    Returns:
        Pictures, each attacked or clean, and True.
    """

    def losses() -> Iterator[Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]]:
        for _ in range(settings.restarts):
            yield lambda rows: lambda logits, some: F.cross_entropy(logits, labels[rows][some], reduction="none")

    return _runs(classify, clean, labels, settings, losses()), True


def apgd_t(classify: Classifier, clean: Tensor, labels: Tensor, settings: AutoAttack) -> tuple[Tensor, bool]:
    """APGD on the targeted DLR loss, towards the most likely wrong classes, one after another.

    Returns:
        Pictures, each attacked or clean, and whether there are classes enough for this loss.
    """
    with torch.no_grad():
        ranked = classify(clean).argsort(-1)  # least likely first, as `sort` orders equal logits
    classes = ranked.shape[-1]
    if classes < FEWEST_FOR_TARGETED_DLR:
        return clean, False

    def losses() -> Iterator[Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]]:
        for rank in range(2, settings.targets(classes) + 2):
            targets = ranked[:, -rank]
            for _ in range(settings.target_restarts):
                yield (
                    lambda rows, targets=targets: (
                        lambda logits, some: targeted_dlr(logits, labels[rows][some], targets[rows][some])
                    )
                )

    return _runs(classify, clean, labels, settings, losses()), True


def _runs(
    classify: Classifier,
    clean: Tensor,
    labels: Tensor,
    settings: AutoAttack,
    losses: Iterator[Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]],
) -> Tensor:
    """One run per loss, each over the pictures that no earlier one fooled."""
    right = predictions(classify, clean) == labels
    pictures, noise = clean.clone(), settings.noise or _seeded(settings)
    for loss_of in losses:
        rows = right.nonzero().flatten()
        if not len(rows):
            break
        loss, own = loss_of(rows), clean[rows]

        def judge(points: Tensor, some: Tensor, loss=loss, rows=rows) -> Judged:
            logits = classify(points)
            return Judged(loss(logits, some), logits.detach().argmax(-1) != labels[rows][some])

        drawn = noise(own.shape).to(own)
        drawn = 2 * drawn - 1 if settings.norm == "linf" else drawn
        run = apgd(
            judge,
            own,
            eps=settings.eps,
            steps=settings.steps,
            norm=settings.norm,
            first_step=settings.first_step,
            start=start_on_edge(drawn, own, settings.norm, settings.eps),
            leave=settings.leave,
        )
        pictures[rows[run.broken]] = run.broken_at[run.broken]
        right[rows[run.broken]] = False
    return pictures


def _seeded(settings: AutoAttack) -> Callable[[Sequence[int]], Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    draw = torch.rand if settings.norm == "linf" else torch.randn
    return lambda shape: draw(tuple(shape), generator=generator)
