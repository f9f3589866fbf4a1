"""Rewards of several answers from judgements of their ordered pairs, for choosing the best one or a preference pair.

A judge favours the place in which an answer is shown. Every ordered pair is judged, and a constant favour cancels.
Source: LLaVA-Critic, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.errors import UserError


def ordered_pairs(answers: int) -> list[tuple[int, int]]:
    """All (first shown, second shown) of so many answers: K (K - 1) judgements."""
    return [(first, second) for first in range(answers) for second in range(answers) if first != second]


def pairwise_rewards(advantages: Sequence[Sequence[float]]) -> list[float]:
    """The reward of every answer; they sum to 0.

    Args:
        advantages: [answers, answers]; `advantages[i][j]` is how much better the second-shown answer j is than the
            first-shown i, on any scale (1, 0, -1 of a verdict, or a difference of scores). The diagonal does not count.

    Raises:
        UserError: If it is not square.
    """
    count = len(advantages)
    if any(len(row) != count for row in advantages):
        raise UserError(f"advantages: must have {count} numbers in each of {count} rows, one per ordered pair")
    return [
        sum(advantages[other][own] - advantages[own][other] for other in range(count) if other != own)
        for own in range(count)
    ]


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """The answers with the highest and the lowest reward, of equal ones the first; None if all are equal."""
    best = max(range(len(rewards)), key=lambda index: rewards[index], default=0)
    worst = min(range(len(rewards)), key=lambda index: rewards[index], default=0)
    return None if not rewards or rewards[best] == rewards[worst] else (best, worst)
