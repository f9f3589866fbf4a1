"""The procedure world: an operation under an endoscope, with phases in order, instruments, verbs and targets.

An operation is a gallbladder removal in miniature. Its phases follow each other in the order of `PHASES`; every phase
is made of segments in which one instrument (and sometimes a grasper that helps) does one thing to one kind of tissue.
What is done can be seen from the motion: a still frame does not tell grasping from retracting. What the main instrument
does belongs to one phase alone, so phases can be told from what is seen.

Answers are balanced by thinning: a question is asked the more rarely, the more likely its answer is among questions
of the same text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from llavakit.phantom import words
from llavakit.phantom.base import (
    Box,
    Case,
    Item,
    Question,
    World,
    check_choice,
    check_range,
    generator,
    pick,
    select_types,
    split_of,
    thin,
)
from llavakit.phantom.endoscope import METAL, SIDES, TISSUE, Action, box_of, frame, lay_out

INSTRUMENTS, TARGETS = tuple(METAL), tuple(TISSUE)
PHASES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "preparation": (
        ("grasper", "grasp", "gallbladder"),
        ("scissors", "cut", "adhesion"),
        ("hook", "dissect", "adhesion"),
    ),
    "calot triangle dissection": (
        ("hook", "dissect", "cystic duct"),
        ("bipolar", "dissect", "cystic duct"),
        ("scissors", "dissect", "cystic duct"),
        ("grasper", "retract", "gallbladder"),
    ),
    "clipping cutting": (("clipper", "clip", "cystic duct"), ("scissors", "cut", "cystic duct")),
    "gallbladder dissection": (
        ("hook", "dissect", "gallbladder"),
        ("bipolar", "coagulate", "gallbladder"),
        ("scissors", "dissect", "gallbladder"),
    ),
    "gallbladder packaging": (("grasper", "pack", "gallbladder"), ("grasper", "grasp", "specimen bag")),
    "cleaning coagulation": (
        ("bipolar", "coagulate", "liver"),
        ("hook", "coagulate", "liver"),
        ("irrigator", "aspirate", "fluid"),
        ("irrigator", "irrigate", "liver"),
    ),
    "gallbladder retraction": (("grasper", "retract", "specimen bag"),),
}
FORMS = {
    "grasp": "grasps",
    "retract": "retracts",
    "pack": "packs",
    "dissect": "dissects",
    "cut": "cuts",
    "clip": "clips",
    "coagulate": "coagulates",
    "aspirate": "aspirates",
    "irrigate": "irrigates",
}
VERBS = tuple(FORMS)
HELP = Action("grasper", "retract", "gallbladder")

IMAGE_TYPES = ("tool", "side", "target", "exist", "count")
EASY_TYPES = ("tool", "side", "target", "exist")
VIDEO_TYPES = ("phase", "first", "last", "verb", "change")
TYPES = (*IMAGE_TYPES, *VIDEO_TYPES)
FRAMES_PER_SECOND = 4  # of clips as `phantom.write` encodes them


@dataclass(frozen=True)
class Segment:
    """A stretch of an operation: its phase, and what is done; the first action is the main one."""

    phase: str
    actions: tuple[Action, ...]


class Procedure(World):
    """Clips and frames of operations under an endoscope.

    Args:
        size: Pixels along each side.
        difficulty: "full", or "easy": one instrument at a time.
        types: Question types about a frame, of `IMAGE_TYPES`; None for those of the difficulty.
        frames: Frames of a clip, at least 4.
        videos: Add an item with a clip of one or two segments, and questions about phases, order and verbs.
        segments: Segments of a clip, 1 to 7; None for one or two, as `change` needs.
    """

    name = "procedure"

    def __init__(
        self,
        *,
        size: int = 48,
        difficulty: str = "full",
        types: Any = None,
        frames: int = 8,
        videos: bool = True,
        segments: int | None = None,
    ) -> None:
        self.size = int(check_range("size", size, 24, 2048))
        self.difficulty = check_choice("difficulty", difficulty, ("full", "easy"))
        self.types = select_types(types, IMAGE_TYPES, EASY_TYPES if difficulty == "easy" else IMAGE_TYPES)
        self.frames = int(check_range("frames", frames, 4, 10_000))
        self.videos = videos
        self.segments = None if segments is None else int(check_range("segments", segments, 1, len(PHASES)))
        if self.segments is not None and self.segments > self.frames:
            check_range("segments", self.segments, 1, self.frames)
        self.helps = 0.0 if difficulty == "easy" else 0.5

    def sample(self, seed: int, index: int) -> Case:
        """Operation number `index`; see `World.sample`."""
        rng = generator(seed, index, "procedure/operation")
        segments, main = self._operation(rng)
        view = lay_out(rng, [action.target for segment in segments for action in segment.actions])
        case_id = f"procedure-{seed}-{index:07d}"
        noise = generator(seed, index, "procedure/noise")
        shown = segments[main]
        items = [
            Item(
                id=case_id,
                kind="image",
                media=(frame(view, shown.actions, 0.5, self.size, noise),),
                questions=self._ask(generator(seed, index, "procedure/questions"), shown),
                caption=_sentence(shown),
                caption_prompt=words.CAPTION,
                boxes=[Box(a.instrument, a.instrument, box_of(a, view, 0.5)) for a in shown.actions],
            )
        ]
        bounds = np.linspace(0, self.frames, len(segments) + 1).round().astype(int).tolist()
        if self.videos:
            pictures = [
                frame(view, segment.actions, (number - start) / max(end - start - 1, 1), self.size, noise)
                for segment, start, end in zip(segments, bounds, bounds[1:], strict=False)
                for number in range(start, end)
            ]
            items.append(
                Item(
                    id=f"{case_id}-clip",
                    kind="video",
                    media=(np.stack(pictures),),
                    questions=self._ask_clip(generator(seed, index, "procedure/clip"), segments, main),
                    caption=_story(segments),
                    caption_prompt="Describe the video.",
                )
            )
        return Case(
            id=case_id,
            split=split_of(index),
            items=items,
            facts={
                "fps": FRAMES_PER_SECOND,
                "segments": [
                    {
                        "start": start / FRAMES_PER_SECOND,
                        "end": end / FRAMES_PER_SECOND,
                        "phase": segment.phase,
                        "triplets": [list(action.triplet) for action in segment.actions],
                    }
                    for segment, start, end in zip(segments, bounds, bounds[1:], strict=False)
                ],
            },
            triples=[action.triplet for segment in segments for action in segment.actions],
        )

    def _operation(self, rng: np.random.Generator) -> tuple[list[Segment], int]:
        """Segments of phases that follow each other, and the number of the one that is asked about.

        Its phase is drawn first, so that all phases are equally likely there.
        """
        count = self.segments if self.segments is not None else 1 + int(rng.integers(2))
        names = tuple(PHASES)
        phase = int(rng.integers(len(names)))
        first = int(rng.integers(max(0, phase - count + 1), min(phase, len(names) - count) + 1))
        return [self._segment(rng, name) for name in names[first : first + count]], phase - first

    def _segment(self, rng: np.random.Generator, phase: str) -> Segment:
        sides = rng.permutation(len(SIDES))
        side, other = (tuple(SIDES)[int(place)] for place in sides[:2])
        main = Action(*pick(rng, PHASES[phase]), side=side)
        helped = main.instrument != "grasper" and main.target != "gallbladder" and rng.random() < self.helps
        return Segment(phase, (main, replace(HELP, side=other)) if helped else (main,))

    # -- what is asked -----------------------------------------------------------------------------------------

    def _ask(self, rng: np.random.Generator, segment: Segment) -> list[Question]:
        """Questions about a still frame; what names give away is asked first, or not at all."""
        main, alone = segment.actions[0], len(segment.actions) == 1
        first, rest = [], []
        if "exist" in self.types and rng.random() < 0.6:
            name = pick(rng, INSTRUMENTS)
            there = any(action.instrument == name for action in segment.actions)
            if thin(rng, there, float(self._share(name))):
                first.append(_exist(name, there))
        if "count" in self.types and rng.random() < 0.5 and self._fair(rng, self._counts(), len(segment.actions)):
            first.append(_count(len(segment.actions)))
        if "tool" in self.types and alone and rng.random() < 0.6 and self._fair(rng, self._mains(), main.instrument):
            rest.append(_tool(main))
        else:  # "the hook" in a question would answer which instrument is at work
            if "side" in self.types:
                rest.append(_side(main))
            if "target" in self.types and self._fair(rng, self._prior(main.instrument, 2), main.target):
                rest.append(_target(main))
        return [*first, *(rest[i] for i in rng.permutation(len(rest)))]

    def _ask_clip(self, rng: np.random.Generator, segments: list[Segment], main: int) -> list[Question]:
        """Questions about a clip: one about phases, one about what an instrument does."""
        questions = []
        if self.segments is None and rng.random() < 0.3:
            questions.append(_change(len(segments) > 1))
        elif len(segments) == 1:
            questions.append(_phase("phase", segments[0].phase))
        else:
            which = pick(rng, ("first", "last"))
            questions.append(_phase(which, segments[0 if which == "first" else -1].phase))
        action = segments[main].actions[0]
        named = Counter(other.instrument for segment in segments for other in segment.actions)
        if named[action.instrument] == 1 and self._fair(rng, self._prior(action.instrument, 1), action.verb):
            questions.append(_verb(action))
        return questions

    # -- how likely answers are --------------------------------------------------------------------------------

    @staticmethod
    def _mains() -> Counter[str]:
        """Share of every instrument among main actions."""
        shares: Counter[str] = Counter()
        for triplets in PHASES.values():
            for instrument, *_ in triplets:
                shares[instrument] += Fraction(1, len(PHASES) * len(triplets))
        return shares

    @staticmethod
    def _prior(instrument: str, part: int) -> Counter[str]:
        """Weight of every verb (part 1) or target (part 2) of an instrument."""
        weights: Counter[str] = Counter()
        for triplets in PHASES.values():
            for triplet in triplets:
                if triplet[0] == instrument:
                    weights[triplet[part]] += Fraction(1, len(triplets))
        return weights

    def _helped(self) -> Fraction:
        """Share of segments with a grasper that helps."""
        fit = (
            Fraction(1, len(PHASES) * len(triplets))
            for triplets in PHASES.values()
            for instrument, _, target in triplets
            if instrument != "grasper" and target != "gallbladder"
        )
        return Fraction(self.helps) * sum(fit)

    def _share(self, instrument: str) -> Fraction:
        """Share of frames that show an instrument."""
        return self._mains()[instrument] + (self._helped() if instrument == "grasper" else 0)

    def _counts(self) -> Counter[int]:
        return Counter({1: 1 - self._helped(), 2: self._helped()})

    @staticmethod
    def _fair(rng: np.random.Generator, weights: Counter[Any], answer: Any) -> bool:
        """Whether to ask, such that all answers to the question come out equally often; never if there is one alone."""
        likely = [weight for weight in weights.values() if weight]
        return len(likely) > 1 and rng.random() < min(likely) / weights[answer]

    def texts(self) -> list[str]:
        """Every sentence form with every word in it; see `World.texts`."""
        questions = [_count(1), _count(2), _change(True), _change(False)]
        questions += [_exist(name, there) for name in INSTRUMENTS for there in (True, False)]
        questions += [_phase(which, phase) for which in ("phase", "first", "last") for phase in PHASES]
        captions = []
        for phase, triplets in PHASES.items():
            for triplet in triplets:
                action = Action(*triplet)
                questions += [_tool(action), _target(action), _verb(action)]
                questions += [_side(replace(action, side=side)) for side in SIDES]
                segments = [Segment(phase, (action,)), Segment(phase, (action, HELP))]
                captions += [_sentence(segments[0]), _sentence(segments[1]), _story(segments), " ".join(triplet)]
        out = words.shared_texts() + captions + [f"{q.text} {q.answer} {q.sentence}" for q in questions]
        out += [f"{words.capital(name)}. The {name}." for name in (*INSTRUMENTS, *VERBS, *TARGETS, *PHASES, *SIDES)]
        return [*out, "Describe the video."]

    def knowledge(self) -> list[tuple[str, str, str]]:
        """Which phase follows which, and what belongs to it."""
        names = tuple(PHASES)
        order = [(earlier, "comes_before", later) for earlier, later in itertools.pairwise(names)]
        return order + [(phase, "uses", name) for phase in names for name in sorted({t[0] for t in PHASES[phase]})]


# ---------------------------------------------------------------------------------------------------------------
# Sentences


def clause(instrument: str, verb: str, target: str) -> str:
    """A triplet in words: "the hook dissects the cystic duct"."""
    return f"the {instrument} {_agree(instrument, verb, FORMS[verb])} the {target}"


def _agree(instrument: str, plural: str, singular: str) -> str:
    """The form of a verb that agrees with the name of an instrument; scissors are a plural."""
    return plural if instrument == "scissors" else singular


def _sentence(segment: Segment) -> str:
    return words.capital(words.listing([clause(*action.triplet) for action in segment.actions])) + "."


def _story(segments: list[Segment]) -> str:
    told = [f"{s.phase}, in which {words.listing([clause(*a.triplet) for a in s.actions])}" for s in segments]
    return f"The clip shows {', then '.join(told)}."


def _capitals(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(words.capital, names))


def _exist(name: str, there: bool) -> Question:
    verb, noun = _agree(name, "are", "is"), _agree(name, name, words.article(name))
    sentence = f"There {verb} {noun}." if there else f"There {verb} no {name}."
    text = f"{words.capital(verb)} there {noun} in the picture?"
    return Question("exist", text, "Yes" if there else "No", sentence, ("Yes", "No"))


def _count(number: int) -> Question:
    word = words.NUMBERS[number]
    sentence = f"There {'is' if number == 1 else 'are'} {word.lower()} instrument{'s' * (number > 1)}."
    return Question("count", "How many instruments are there?", word, sentence, words.NUMBERS[1:3])


def _tool(action: Action) -> Question:
    sentence = f"The {action.instrument} {_agree(action.instrument, 'are', 'is')} at work."
    answer = words.capital(action.instrument)
    return Question("tool", "Which instrument is at work?", answer, sentence, _capitals(INSTRUMENTS))


def _side(action: Action) -> Question:
    name = action.instrument
    sentence = f"The {name} {_agree(name, 'come', 'comes')} from the {action.side}."
    text = f"From which side {_agree(name, 'do', 'does')} the {name} come?"
    return Question("side", text, words.capital(action.side), sentence, _capitals(tuple(SIDES)))


def _target(action: Action) -> Question:
    name = action.instrument
    sentence = f"The {name} {_agree(name, 'work', 'works')} on the {action.target}."
    text = f"What {_agree(name, 'do', 'does')} the {name} work on?"
    return Question("target", text, words.capital(action.target), sentence, _capitals(TARGETS))


def _verb(action: Action) -> Question:
    name = action.instrument
    text = f"Which action {_agree(name, 'do', 'does')} the {name} perform?"
    sentence = f"The {name} {_agree(name, 'perform', 'performs')} the action {action.verb}."
    return Question("verb", text, words.capital(action.verb), sentence, _capitals(VERBS))


def _phase(which: str, phase: str) -> Question:
    text, sentence = {
        "phase": ("Which phase is shown?", f"The phase is {phase}."),
        "first": ("Which phase is shown first?", f"The first phase is {phase}."),
        "last": ("Which phase is shown last?", f"The last phase is {phase}."),
    }[which]
    return Question(which, text, words.capital(phase), sentence, _capitals(tuple(PHASES)))


def _change(changes: bool) -> Question:
    sentence = "The phase changes." if changes else "The phase does not change."
    return Question("change", "Does the phase change?", "Yes" if changes else "No", sentence, ("Yes", "No"))
