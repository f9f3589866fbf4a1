"""Ratings of models from battles of two: Elo one after another, Bradley-Terry of all together, bootstrap intervals.

A battle is (first model, second model, winner), the winner "a", "b" or "tie". Elo depends on the order of the battles;
Bradley-Terry does not. A tie is half a win for both.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

Battle = tuple[str, str, str]
_POINTS = {"a": 1.0, "b": 0.0, "tie": 0.5}
SCALE = 400.0


def online_elo(
    models: Iterable[str], battles: Iterable[Battle], k: float = 4.0, start: float = 1000.0
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Ratings after all battles in their order, and both ratings after every battle.

    Args:
        k: Most points that a battle moves.
    """
    ratings, history = dict.fromkeys(models, float(start)), []
    for first, second, winner in battles:
        expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / SCALE))
        step = k * (_POINTS[winner] - expected)
        ratings[first] += step
        ratings[second] -= step
        history.append((ratings[first], ratings[second]))
    return ratings, history


def win_rates(models: Iterable[str], battles: Iterable[Battle]) -> dict[str, float | None]:
    """(Wins + half of the ties) / battles of every model; None without a battle."""
    points: dict[str, list[float]] = defaultdict(list)
    for first, second, winner in battles:
        points[first].append(_POINTS[winner])
        points[second].append(1 - _POINTS[winner])
    return {model: sum(points[model]) / len(points[model]) if points[model] else None for model in models}


def bradley_terry(
    models: Sequence[str], battles: Iterable[Battle], start: float = 1000.0, *, steps: int = 100_000
) -> dict[str, float] | None:
    """Maximum-likelihood ratings: 400 x log10 of a model's strength + `start`; the strengths' geometric mean is 1.

    Returns:
        None where there is no maximum: a group of models never lost (or never won) a point against the others.
    """
    wins: dict[tuple[str, str], float] = defaultdict(float)
    for first, second, winner in battles:
        wins[first, second] += _POINTS[winner]
        wins[second, first] += 1 - _POINTS[winner]
    if not _connected(models, wins):
        return None
    rivals = {model: [other for other in models if other != model] for model in models}
    played = {(a, b): wins[a, b] + wins[b, a] for a in models for b in rivals[a]}
    total = {model: sum(wins[model, other] for other in rivals[model]) for model in models}
    strengths = dict.fromkeys(models, 1.0)
    for _ in range(steps):  # Hunter's minorisation: every step raises the likelihood
        found = {
            model: total[model]
            / sum(played[model, other] / (strengths[model] + strengths[other]) for other in rivals[model])
            for model in models
        }
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        found = {model: strength / mean for model, strength in found.items()}
        moved = max(abs(math.log(found[model] / strengths[model])) for model in models)
        strengths = found
        if moved < 1e-14:
            break
    return {model: SCALE * math.log10(strength) + start for model, strength in strengths.items()}


def _connected(models: Sequence[str], wins: dict[tuple[str, str], float]) -> bool:
    """Whether every model has, over others, won a point against every other."""
    if len(models) < 2:
        return False
    for forward in (True, False):
        reached, waiting = {models[0]}, [models[0]]
        while waiting:
            own = waiting.pop()
            for other in models:
                if other not in reached and wins[(own, other) if forward else (other, own)] > 0:
                    reached.add(other)
                    waiting.append(other)
        if len(reached) < len(models):
            return False
    return True


def bootstrap(
    models: Sequence[str], battles: Sequence[Battle], samples: int = 200, seed: int = 0, confidence: float = 0.95
) -> dict[str, tuple[float, float]] | None:
    """Intervals of the Bradley-Terry ratings over battles drawn with replacement.

    Returns:
        None if fewer than half of the draws have ratings.
    """
    draw, found = random.Random(seed), []
    for _ in range(samples):
        ratings = bradley_terry(models, draw.choices(battles, k=len(battles)), steps=2_000)
        if ratings is not None:
            found.append(ratings)
    if 2 * len(found) < samples:
        return None
    cut = (1 - confidence) / 2
    intervals = {}
    for model in models:
        values = sorted(ratings[model] for ratings in found)
        places = (int(cut * (len(values) - 1)), math.ceil((1 - cut) * (len(values) - 1)))
        intervals[model] = (values[places[0]], values[places[1]])
    return intervals
