"""LLaVA-o1's searches at test time: best of N, sentence by sentence, stage by stage, and retracing with a reward
(SWIRES).

They are written on `llavakit.generation.search`: candidates fork from a shared prefix, so picture and prompt are
computed once. Every search gives what is certain of the reply as soon as it is: branches of which each continues the
one before. Sources: paper 2411.10440 (first and final version); spec section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llavakit.generation.request import SamplingParams
from llavakit.generation.sampling import call_seed
from llavakit.generation.search import Branch, Expand, search_steps
from llavakit.systems.llava_o1.judging import ALL, SENTENCE
from llavakit.systems.llava_o1.stages import NAMES, end_of, sections

T = TypeVar("T")
SAMPLING = SamplingParams(temperature=0.6, top_p=0.9, max_new_tokens=2048)
DONE = end_of(NAMES[-1])
SENTENCE_ENDS = (". ", ".\n")  # not the point of a decimal number
PUBLISHED_CANDIDATES = {"best_of_n": 10, "stage": 10, "sentence": 5}

Compare = Callable[[str, str, str], int]  # `judging.Judge`
Draw = Callable[[int], int]  # a number below the given one


def knock_out(candidates: Sequence[T], compare: Callable[[T, T], int], draw: Draw) -> T:
    """The candidate that is left when two at a time are drawn and the winner goes to the end of the list."""
    left = list(candidates)
    while len(left) > 1:
        pair = left.pop(draw(len(left))), left.pop(draw(len(left)))
        left.append(pair[compare(*pair)])
    return left[0]


def _judged(compare: Compare, kind: str, draw: Draw, candidates: Sequence[Branch]) -> Branch:
    return knock_out(candidates, lambda a, b: compare(kind, a.text, b.text), draw)


def best_of_n(expand: Expand, root: Branch, sampling: SamplingParams, compare: Compare, draw: Draw) -> Iterator[Branch]:
    """`sampling.n` whole replies, the best kept."""
    (candidates,) = expand([root], replace(sampling, stop=(DONE,)))
    yield _judged(compare, ALL, draw, candidates)


def by_sentence(
    expand: Expand, root: Branch, sampling: SamplingParams, compare: Compare, draw: Draw
) -> Iterator[Branch]:
    """The best of `sampling.n` next sentences, until the reply is done."""

    def until(branch: Branch) -> tuple[str, ...] | None:
        return None if DONE in branch.text else (*SENTENCE_ENDS, DONE)

    return search_steps(expand, root, sampling, until, lambda found: _judged(compare, SENTENCE, draw, found))


def by_stage(expand: Expand, root: Branch, sampling: SamplingParams, compare: Compare, draw: Draw) -> Iterator[Branch]:
    """The best of `sampling.n` next stages, four times."""
    left = list(NAMES)

    def until(branch: Branch) -> tuple[str, ...] | None:
        return (end_of(left[0]),) if left else None

    return search_steps(expand, root, sampling, until, lambda found: _judged(compare, left.pop(0), draw, found))


SEARCHES: dict[str, Callable[..., Iterator[Branch]]] = {
    "best_of_n": best_of_n,
    "sentence": by_sentence,
    "stage": by_stage,
}

# Retracing

DESCRIBE = "\nPlease provide a detailed description of this image based on the question and the image itself."
REASON = (
    "\nPlease reason based on the question and the image, providing a detailed reasoning process to solve the problem."
)
Reward = Callable[[str, Sequence[str]], Sequence[float]]  # (what the user says, texts) -> higher is better


@dataclass(frozen=True)
class Retracing:
    """Settings of SWIRES.

    Attributes:
        captions: Captions sampled in a round.
        kept: Captions that get reasonings.
        reasonings: Reasonings of each.
        conclusions: Best reasonings that get a conclusion.
        rounds: Most rounds.
        cutoff: A round is the last if the second-best reasoning so far has a higher reward; the published figure is the
            mean and spread of one reward model's scores.
    """

    captions: int = 4
    kept: int = 2
    reasonings: int = 2
    conclusions: int = 3
    rounds: int = 5
    cutoff: float = -0.77 + 0.2533 * 2.08


def descending(scores: Sequence[float]) -> list[int]:
    """Numbers of scores from the highest down; of equals the later comes first."""
    return np.argsort(scores)[::-1].tolist()


def swires(
    expand: Expand,
    root: Branch,
    sampling: SamplingParams,
    reward: Reward,
    question: str,
    settings: Retracing | None = None,
) -> Iterator[Branch]:
    """Stage by stage with rewards; poor reasonings send the search back to new captions."""
    settings, steps = settings or Retracing(), 0

    def grow(branch: Branch, name: str, count: int) -> list[Branch]:
        nonlocal steps
        left = sampling.max_new_tokens - (len(branch.ids) - len(root.ids))
        if branch.ended or left <= 0:
            return [branch]
        seed = None if sampling.seed is None else call_seed(sampling.seed, steps)
        steps += 1
        return expand([branch], replace(sampling, n=count, stop=(end_of(name),), seed=seed, max_new_tokens=left))[0]

    def text_of(name: str, branch: Branch, before: Branch) -> str:
        found = sections(branch.text)[name]
        return branch.text[len(before.text) :] if found is None else found

    (summary,) = grow(root, "SUMMARY", 1)
    yield summary
    pool: list[tuple[Branch, float]] = []
    for _ in range(settings.rounds):
        captions = grow(summary, "CAPTION", settings.captions)
        scores = reward(question + DESCRIBE, [text_of("CAPTION", caption, summary) for caption in captions])
        for place in descending(scores)[: settings.kept]:
            for _ in range(settings.reasonings):
                (reasoning,) = grow(captions[place], "REASONING", 1)
                (score,) = reward(question + REASON, [text_of("REASONING", reasoning, captions[place])])
                pool.append((reasoning, score))
        best = sorted((score for _, score in pool), reverse=True)
        if len(best) > 1 and best[1] > settings.cutoff:
            break
    order = descending([score for _, score in pool])[: settings.conclusions]
    replies = [grow(pool[place][0], "CONCLUSION", 1)[0] for place in order]
    yield replies[descending(reward(question, [reply.text for reply in replies]))[0]]
