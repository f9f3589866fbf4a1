"""LLaVA-o1's claims, small: answers in stages are learned where answers alone are not, and searched stage by stage.

(A) A decoder of three layers sees nine cells of a picture (see `arrows`) and learns, in the same number of steps, the
answer alone, the answer behind its stages, or the same in other arrangements; a further arm learns captions and
reasonings as tasks of their own, so that it gets the supervision without the chain.
(B) Searches over the replies of the staged model, sampled, with the same number of candidates and a judge that picks
the right one of a right and a wrong text with some probability; and over replies whose stages are right with given
probabilities, for which the product's own searches run. Spec section 11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from llavakit.generation.request import Request, SamplingParams
from llavakit.generation.search import Branch
from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.systems.llava_o1.arrows import CELL, END, NUMBERS, PAD, PLACES, SIDE, STEPS, TASKS, WORDS, Board, reply
from llavakit.systems.llava_o1.judging import ALL
from llavakit.systems.llava_o1.searching import DESCRIBE, SEARCHES, Retracing, by_stage, knock_out, swires
from llavakit.systems.llava_o1.stages import NAMES, end_of, sections

WIDTH, LAYERS, BATCH, RATE = 64, 3, 16, 3e-3
CELLS, LONGEST = SIDE * SIDE, 90
LEARNED = {"tasks": ("direct", "CAPTION", "REASONING")}
TESTED, SEARCHED, CANDIDATES, RELIABLE, TEMPERATURE = 200, 100, 4, 0.8, 1.5  # at 1 hardly any sample is wrong
CHANCES = {"SUMMARY": 0.9, "CAPTION": 0.8, "REASONING": 0.75, "CONCLUSION": 0.95}  # of stages without a model


# (A) Training


class Reader(nn.Module):
    """A decoder whose first nine positions are the cells of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Linear(CELL * CELL * 3, WIDTH)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=CELLS + LONGEST + 2,
                initializer_range=0.1,
                attn_implementation="sdpa",
            )
        )
        self.places = nn.Parameter(0.3 * torch.randn(CELLS + LONGEST, WIDTH))  # beside the rotary ones
        self.head = nn.Linear(WIDTH, len(WORDS), bias=False)

    def forward(self, embeds: Tensor, places: Tensor, **options: Any) -> Tensor:
        """Hidden states [rows, positions, width] of embeddings at their places [rows, positions]."""
        embeds = embeds + self.places[places]
        return self.decoder(inputs_embeds=embeds, position_ids=places, **options).last_hidden_state


def cells_of(boards: Sequence[Board], random: np.random.Generator) -> Tensor:
    """Pixels of all cells [boards, 9, 8 * 8 * 3]."""
    pictures = torch.from_numpy(np.stack([board.pixels(random) for board in boards]))
    return pictures.unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(3).flatten(1, 2)


def question(board: Board, task: str = "whole") -> tuple[str, str]:
    """Words of what is asked."""
    return TASKS[task], PLACES[board.start]


def lost(model: Reader, cells: Tensor, boards: Sequence[Board], arm: str) -> Tensor:
    """Mean cross entropy of an arm's replies."""
    asks = [question(board, arm if arm in TASKS else "whole") for board in boards]
    asked = torch.tensor([[NUMBERS[word] for word in own] for own in asks])
    said = torch.tensor([[NUMBERS[word] for word in reply(board, arm)] for board in boards])
    embeds = torch.cat([model.cells(cells), model.decoder.embed_tokens(torch.cat([asked, said[:, :-1]], 1))], 1)
    places = torch.arange(embeds.shape[1])[None]
    hidden = model(embeds, places, use_cache=False)[:, -said.shape[1] :]
    return F.cross_entropy(model.head(hidden).flatten(0, 1), said.flatten())


def trained(arm: str, seed: int, steps: int) -> Reader:
    """A model of an arm."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = Reader()
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, functools.partial(share_of_rate, steps=steps))
    for _ in range(steps):
        boards = [Board.draw(random) for _ in range(BATCH)]
        cells = cells_of(boards, random)
        loss = sum(lost(model, cells, boards, own) for own in (LEARNED.get(arm, (arm,))))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
    return model.eval()


def share_of_rate(step: int, steps: int, warm: int = 40, falling: float = 0.3) -> float:
    """It rises, stays, and falls to 0: at a constant one some seeds learned to follow arrows, others hardly began."""
    return min(1.0, (step + 1) / warm, (steps - step) / (falling * steps))


@torch.no_grad()
def continued(
    model: Reader,
    cells: Tensor,
    prefixes: Sequence[str],
    stops: Sequence[str],
    generator: torch.Generator | None = None,
) -> list[tuple[str, float]]:
    """What a model writes behind prefixes, up to a stop word or the end, which is part of it, and its mean log
    probability.

    Args:
        cells: Of every row [rows, 9, pixels].
        prefixes: Words behind the cells.
        generator: Samples; None takes the likeliest words.
    """
    ids = [[NUMBERS[word] for word in own.split()] for own in prefixes]
    longest = max(map(len, ids))
    gaps = torch.tensor([longest - len(own) for own in ids])
    padded = torch.tensor([[NUMBERS[PAD]] * (longest - len(own)) + own for own in ids])
    place = torch.arange(CELLS + longest)[None] - gaps[:, None]  # cells follow the padding
    embeds = model.decoder.embed_tokens(F.pad(padded, (CELLS, 0)))
    embeds[(place >= 0) & (place < CELLS)] = model.cells(cells).flatten(0, 1)
    mask, cache, place = (place >= 0).long(), DynamicCache(), place.clamp(min=0)
    ends = torch.tensor([NUMBERS[word] for word in (*stops, END)])
    left, written, sums = torch.ones(len(ids), dtype=torch.bool), [], torch.zeros(len(ids))
    for _ in range(LONGEST - min(map(len, ids))):
        hidden = model(embeds, place, attention_mask=mask, past_key_values=cache)[:, -1]
        logps = (model.head(hidden) / TEMPERATURE).log_softmax(-1)
        if generator is None:
            chosen = logps.argmax(-1)
        else:
            chosen = torch.multinomial(logps.exp(), 1, generator=generator)[:, 0]
        written.append(torch.where(left, chosen, NUMBERS[PAD]))
        sums += torch.where(left, logps.gather(1, chosen[:, None])[:, 0], 0.0)
        left &= ~torch.isin(chosen, ends) & (place[:, -1] < CELLS + LONGEST - 2)
        if not left.any():
            break
        embeds, place = model.decoder.embed_tokens(chosen)[:, None], (place[:, -1:] + 1).clamp(max=CELLS + LONGEST - 1)
        mask = F.pad(mask, (0, 1), value=1)
    found = torch.stack(written, 1).tolist() if written else [[]] * len(ids)
    words = [[WORDS[number] for number in row if number != NUMBERS[PAD]] for row in found]
    return [(" ".join(own), float(total) / max(len(own), 1)) for own, total in zip(words, sums, strict=True)]


def tests(seed: int, count: int) -> tuple[list[Board], Tensor]:
    """Boards that no arm was trained on, and their cells."""
    random = np.random.default_rng(10_000 + seed)
    boards = [Board.draw(random) for _ in range(count)]
    return boards, cells_of(boards, random)


def accuracy(model: Reader, seed: int) -> float:
    """Share of right answers, the likeliest words taken."""
    boards, cells = tests(seed, TESTED)
    said = continued(model, cells, [" ".join(question(board)) for board in boards], ())
    return float(np.mean([board.answered(text) for board, (text, _) in zip(boards, said, strict=True)]))


# (B) Searches over what the staged model says


@dataclass(frozen=True)
class Candidate:
    """A reply so far.

    Attributes:
        text: Its words.
        right: Whether the judge should prefer it.
        likelihood: Mean log probability of the newest words.
    """

    text: str
    right: bool
    likelihood: float


def judged(rule: str, first: Candidate, second: Candidate, random: np.random.Generator) -> int:
    """0 if the first candidate is kept: by likelihood, or by a judge that mostly prefers right ones."""
    if rule == "likelihood":
        return int(second.likelihood > first.likelihood)
    if first.right == second.right:
        return int(random.integers(2))
    return int(second.right) if random.random() < RELIABLE else int(first.right)


def searched(model: Reader, seed: int, search: str, rule: str = "judge", count: int = CANDIDATES) -> dict[str, float]:
    """Accuracy, words written and comparisons made per question."""
    boards, cells = tests(seed, SEARCHED)
    generator, random = torch.Generator().manual_seed(20_000 + seed), np.random.default_rng(30_000 + seed)
    kept, words, games = [""] * len(boards), 0, 0

    def step(stops: Sequence[str], right: Callable[[Board, str], bool], open_: Sequence[int]) -> None:
        """Candidates of some boards up to a stop word, of which one is kept."""
        nonlocal words, games
        if not open_:
            return
        rows = [place for place in open_ for _ in range(count)]
        prefixes = [" ".join((*question(boards[place]), kept[place])) for place in rows]
        said = continued(model, cells[rows], prefixes, stops, generator)
        words += sum(len(text.split()) for text, _ in said)
        for number, place in enumerate(open_):
            own = [
                Candidate(whole := f"{kept[place]} {text}".strip(), right(boards[place], whole), likelihood)
                for text, likelihood in said[number * count : (number + 1) * count]
            ]
            games += count - 1
            won = knock_out(own, lambda a, b: judged(rule, a, b, random), lambda n: int(random.integers(n)))
            kept[place] = won.text

    everywhere = range(len(boards))
    if search == "best_of_n":
        step((), Board.answered, everywhere)

    def unfinished(*ends: str) -> list[int]:
        return [n for n, text in enumerate(kept) if not text.endswith((END, *ends)) and len(text.split()) < LONGEST - 8]

    for name in NAMES if search == "stage" else ():
        open_ = unfinished()
        step((end_of(name),), lambda board, text, name=name: board.right(name, sections(text)[name] or ""), open_)
    for _ in range(2 * STEPS + 6 if search == "sentence" else 0):
        if open_ := unfinished(end_of(NAMES[-1])):
            step((".", end_of(NAMES[-1])), Board.begun_right, open_)
    right = float(np.mean([board.answered(text) for board, text in zip(boards, kept, strict=True)]))
    return {"accuracy": right, "words": words / len(boards), "comparisons": games / len(boards)}


# Searches without a model


class Odds:
    """Replies whose stages are right by chance, and judges of given reliability; for the product's own searches.

    Args:
        reliable: Probability that of a right and a wrong text the right one is kept: of a stage, and of a whole reply.
        chances: Of every stage; reasoning behind a wrong caption is wrong if `linked`.
    """

    def __init__(
        self, random: np.random.Generator, reliable: tuple[float, float], chances: Mapping[str, float], linked: bool
    ) -> None:
        self.random, self.reliable, self.chances, self.linked = random, reliable, chances, linked
        self.calls = 0

    def expand(self, branches: Sequence[Branch], sampling: SamplingParams) -> list[list[Branch]]:
        """What `Chat.expand` does."""
        self.calls += sampling.n * len(branches)
        return [
            [Branch(own.request, text=self._longer(own.text, sampling.stop)) for _ in range(sampling.n)]
            for own in branches
        ]

    def _longer(self, text: str, stop: Sequence[str]) -> str:
        for name in NAMES[text.count("</") :]:
            right = self.random.random() < self.chances[name]
            if self.linked and name == "REASONING" and "<CAPTION>wrong" in text:
                right = False
            text += f"<{name}>{'right' if right else 'wrong'}{end_of(name)}"
            if end_of(name) in stop:
                break
        return text

    def compare(self, kind: str, first: str, second: str) -> int:
        """What `judging.Judge` does."""
        rights = [self.right(kind, text) for text in (first, second)]
        if rights[0] == rights[1]:
            return int(self.random.integers(2))
        found = self.random.random() < self.reliable[kind == ALL]
        return int(rights[1] == found)

    def reward(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """Captions are hard to rate, reasonings and whole replies easy."""
        spread = 2.0 if DESCRIBE in prompt else 0.3
        return [float("wrong" not in text) + spread * self.random.normal() for text in texts]

    def by_reward(self, kind: str, first: str, second: str) -> int:
        """The same as a comparison of what was written last."""
        name = next(name for name in reversed(NAMES) if f"<{name}>" in first)
        shown = [sections(text)[name] or "" for text in (first, second)]
        scores = self.reward(DESCRIBE if name == "CAPTION" else "", shown)
        return int(scores[1] > scores[0])

    @staticmethod
    def right(kind: str, text: str) -> bool:
        """Whether a stage, or all of a reply, is right."""
        return "wrong" not in (text if kind == ALL else sections(text)[kind] or "wrong")

    def draw(self, count: int) -> int:
        """A number below `count`."""
        return int(self.random.integers(count))


ROOT, PLAIN = Branch(Request(input_ids=[0])), SamplingParams(temperature=1.0)
LINKED = {"SUMMARY": 0.9, "CAPTION": 0.4, "REASONING": 0.8, "CONCLUSION": 0.95}


def chance_of(search: str, count: int, reliable: tuple[float, float], seed: int, trials: int) -> float:
    """Share of right replies of a search whose stages are independent."""
    odds = Odds(np.random.default_rng(seed), reliable, CHANCES, linked=False)
    sampling = replace(PLAIN, n=count)
    texts = [last(SEARCHES[search](odds.expand, ROOT, sampling, odds.compare, odds.draw)) for _ in range(trials)]
    return float(np.mean([odds.right(ALL, text) for text in texts]))


def last(branches: Iterable[Branch]) -> str:
    """Text of the whole reply of a search."""
    *_, reply = branches
    return reply.text


def retraced(seed: int, trials: int) -> dict[str, float]:
    """Share of right replies, and calls per reply, where a wrong caption makes the reasoning wrong: stage by stage with
    five candidates, and going back to new captions."""
    found = {}
    for name in ("stage", "swires"):
        odds = Odds(np.random.default_rng(seed), (1.0, 1.0), LINKED, linked=True)
        if name == "stage":
            sampling = replace(PLAIN, n=5)
            texts = [last(by_stage(odds.expand, ROOT, sampling, odds.by_reward, odds.draw)) for _ in range(trials)]
        else:
            settings = Retracing(rounds=3, cutoff=0.5)
            texts = [last(swires(odds.expand, ROOT, PLAIN, odds.reward, "", settings)) for _ in range(trials)]
        found[name] = float(np.mean([odds.right(ALL, text) for text in texts]))
        found[f"{name} calls"] = odds.calls / trials
    return found


# Everything


CHANCE = "chance"
PARTS = ("staged", "tasks", "answer first", "no tags", "no caption", CHANCE, "direct")  # the longest first
RELIABILITIES = {"0.8": (0.8, 0.8), "0.6": (0.6, 0.6), "0.7, whole 0.8": (0.7, 0.8)}


def one_part(seed: int, part: str, steps: int = 500, trials: int = 600) -> dict[str, float]:
    """An arm, with all searches over the staged one; or what needs no model.

    Args:
        part: An arm, or `CHANCE`.
    """
    if part == CHANCE:
        found = {
            f"{search} {count} at {label}": chance_of(search, count, reliable, seed, trials)
            for label, reliable in RELIABILITIES.items()
            for count in (2, 4, 8)
            for search in ("best_of_n", "stage")
        }
        return found | {f"linked {name}": value for name, value in retraced(seed, trials).items()}
    model = trained(part, seed, steps)
    found = {part: accuracy(model, seed)}
    if part != "staged":
        return found
    single = searched(model, seed, "best_of_n", count=1)
    found |= {f"one sample {key}": value for key, value in single.items()}
    for search in SEARCHES:
        for rule in ("judge", *(("likelihood",) if search != "sentence" else ())):
            found |= {f"{search} {rule} {key}": value for key, value in searched(model, seed, search, rule).items()}
    return found


def run(seeds: Sequence[int] = (0, 1, 2), progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """Both parts under every seed.

    Args:
        budget: Other numbers of steps and trials, see `one_part`.
    """
    found = run_seeds(functools.partial(one_part, **budget), seeds, progress, parts=PARTS)

    def compare(metric: str, idea: str, baseline: str, names: tuple[str, str], threshold: float = 0.0) -> Comparison:
        sides = (found.arm(key, name) for key, name in zip((idea, baseline), names, strict=True))
        return Comparison(metric=metric, **dict(zip(("idea", "baseline"), sides, strict=True)), threshold=threshold)

    def mean(key: str) -> float:
        return found.arm(key, key).mean

    def both(key: str) -> str:
        return f"{mean(f'best_of_n {key}'):.2f} and {mean(f'stage {key}'):.2f}"

    greedy, wins = "accuracy, likeliest words", ("stage by stage", "whole replies")
    sampled = f"accuracy, {CANDIDATES} sampled candidates, judge right at {RELIABLE}"
    comparisons = (
        compare(greedy, "staged", "direct", ("answer behind its stages", "answer alone"), 0.1),
        compare(greedy, "staged", "tasks", ("answer behind its stages", "stages as tasks of their own"), 0.1),
        compare(greedy, "staged", "answer first", ("answer behind its stages", "answer in front of them"), 0.1),
        compare(sampled, "stage judge accuracy", "best_of_n judge accuracy", wins),
        compare("the same without a model", "stage 4 at 0.8", "best_of_n 4 at 0.8", wins),
        compare("right replies, linked stages", "linked swires", "linked stage", ("retracing", "stage by stage")),
    )
    counts = "; ".join(
        f"{search} {mean(f'{search} judge words'):.0f} and {mean(f'{search} judge comparisons'):.0f}"
        for search in SEARCHES
    )
    return Verdict(
        system="llava-o1",
        claim="Answers in stages are learned where answers alone are not, and choosing stage by stage beats choosing "
        "among whole replies.",
        paper="average of six benchmarks: 59.0 trained on answers, 62.4 in stages, 65.5 with retracing; MMVet 60.3, "
        "best of ten 60.9, stage by stage 62.9",
        comparisons=comparisons,
        seeds=tuple(seeds),
        seconds=found.seconds,
        notes=" ".join(
            (
                f"Chance is 0.25. Other arms: no caption {mean('no caption'):.2f}, no tags {mean('no tags'):.2f}.",
                f"One sample at temperature {TEMPERATURE} {mean('one sample accuracy'):.2f}, sentence by sentence",
                f"{mean('sentence judge accuracy'):.2f}; judged by the model's own likelihood, whole replies and",
                f"stages {both('likelihood accuracy')}. Words and comparisons a question: {counts}.",
                f"Without a model, whole replies and stages: judge 0.8, two candidates {both('2 at 0.8')}, eight",
                f"{both('8 at 0.8')}; judge 0.6, four {both('4 at 0.6')}; stages judged at 0.7, replies at 0.8, four",
                f"{both('4 at 0.7, whole 0.8')}. Calls with linked stages: {mean('linked stage calls'):.0f} stage by",
                f"stage, {mean('linked swires calls'):.0f} retracing. The staged arm gets more supervision than the",
                "answer alone, and as much as stages as tasks of their own.",
            )
        ),
    )
