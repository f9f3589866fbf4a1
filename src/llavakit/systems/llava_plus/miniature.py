"""LLaVA-Plus's claim, small: learning to call tools helps, all results at once help more, tools at test alone hurt.

Scenes of the phantom world: one to four coloured shapes and perhaps a word on a sign. The model sees, noisily, which
shape is in which cell; where exactly it begins, only the detector knows, and what the sign says, only the reader. It is
asked where a shape begins ("0.34"), what is in a cell, what the sign says, or for place and word together, and writes
the real three lines, in symbols that are stretches of their text. Its calls are read by the system's own grammar and
run by the real detector on the picture; the reader is given the word, since reading takes a second.

Arms: no tools; the same model with all results before the question at test alone; all results in training and test (All
Tools); tools on demand, one call a turn (Fly). Question types, scenes and steps are the same in all. Spec section 11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llavakit.phantom.canvas import COLOURS, SHAPES
from llavakit.phantom.scene import SIGNS, Scene
from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.systems.llava_plus.grammar import ACTIONS, THOUGHTS, VALUE, decode, split, the_action
from llavakit.systems.llava_plus.results import cleaned
from llavakit.tools.artefacts import Artefacts
from llavakit.tools.shapes import shapes_skill
from llavakit.tools.skill import Outcome, Skill, parameters, picture
from llavakit.tools.toolbox import Toolbox, mismatch

CELLS, SIDE, PIXELS = 9, 3, 96
NAMES = [f"{colour} {shape}" for colour in tuple(COLOURS)[:6] for shape in SHAPES[:4]]
PLACES = [f"{number / 100:.2f}" for number in range(101)]
KINDS = {"where": 0.3, "what": 0.35, "sign": 0.15, "both": 0.2}
# What the model writes, as stretches of the real text.
GRAMMAR = {
    "need": f"{THOUGHTS} A tool will help.\n",
    "thanks": f"{THOUGHTS} Thanks to the tool.\n",
    "know": f"{THOUGHTS} No tool is needed.\n",
    "detect": f'{ACTIONS} [{{"API_name": "detect_shapes", "API_params": {{"caption": "',
    "detected": '"}}]\n',
    "read": f'{ACTIONS} [{{"API_name": "ocr", "API_params": {{}}}}]\n',
    "none": f"{ACTIONS} []\n",
    "wait": f"{VALUE} I will use a tool.",
    "value": f"{VALUE} ",
    "end": "",
}
# What it is told, and never writes.
TOLD = ("found", "says", "failed", *(f"ask {kind}" for kind in KINDS), *(f"cell {number}" for number in range(CELLS)))
SYMBOLS = [*GRAMMAR, *TOLD, *NAMES, *PLACES, *SIGNS]
TEXT = GRAMMAR | {name: f" {name}" for name in (*PLACES, *SIGNS)} | {name: name for name in NAMES}
ID = {symbol: number for number, symbol in enumerate(SYMBOLS)}
RATE = 4e-3
NOISE = 0.2  # of what is seen in a cell
# Arms, and as what each is tested in which form.
TESTED = {
    "all": {"all": "all"},
    "fly": {"fly": "fly"},
    "none": {"none": "none", "test only": "all"},
    "fly without plain answers": {"unmixed": "fly"},
}


class Sight(NamedTuple):
    """A scene: its picture, what is in its cells, where every shape begins, and its sign."""

    image: Image.Image | None
    cells: tuple[int | None, ...]
    places: dict[str, str]
    word: str | None


class Asked(NamedTuple):
    """A question, its subject, and its answer in symbols, which names the subject again."""

    kind: str
    subject: str
    answer: tuple[str, ...]

    def symbols(self) -> list[str]:
        """The question as the model reads it."""
        return [f"ask {self.kind}", *([self.subject] if self.subject else [])]


@functools.cache
def detector() -> Skill:
    """The real detector."""
    return shapes_skill()


def found_by(result: Mapping[str, Any]) -> dict[str, str]:
    """Where shapes begin, from a detector's result as the model is told it."""
    told = cleaned("detect_shapes", result)
    return {name: f"{box[0]:.2f}" for name, box in zip(told["phrases"], told["boxes"], strict=True)}


def sights(seed: int, count: int, first: int = 0) -> list[Sight]:
    """Scenes in which every name occurs once, with what the detector finds in them."""
    world = Scene(size=PIXELS, difficulty="easy", types=("colour", "text"), most=4, scale=0.45)
    made: list[Sight] = []
    number = first
    while len(made) < count:
        case = world.sample(seed, number)
        number += 1
        things = case.facts["things"]
        names = [f"{thing['colour']} {thing['shape']}" for thing in things]
        image = Image.fromarray(case.items[0].media[0])
        places = found_by(detector()(image=image).data)
        if len(set(names)) < len(names) or not set(names) <= set(places):
            continue
        cells: list[int | None] = [None] * CELLS
        for thing, name in zip(things, names, strict=True):
            cells[thing["cell"][0] * SIDE + thing["cell"][1]] = NAMES.index(name)
        made.append(Sight(image, tuple(cells), {name: places[name] for name in names}, case.facts.get("text")))
    return made


def drawn(rng: np.random.Generator) -> Sight:
    """A scene in facts alone, for training: so many that none can be learned by heart."""
    count = int(rng.integers(1, 5))
    names = rng.choice(len(NAMES), count, replace=False).tolist()
    cells: list[int | None] = [None] * CELLS
    places = {}
    for cell, name in zip(rng.choice(CELLS, count, replace=False).tolist(), names, strict=True):
        cells[cell] = name
        places[NAMES[name]] = PLACES[int(100 * (cell % SIDE / SIDE + 0.2 * rng.random()))]
    return Sight(None, tuple(cells), places, SIGNS[int(rng.integers(len(SIGNS)))] if rng.random() < 0.5 else None)


def question(sight: Sight, kind: str, rng: np.random.Generator) -> Asked:
    """A question of a kind; scenes without a sign are asked where something is instead."""
    if sight.word is None and kind in ("sign", "both"):
        kind = "where"
    if kind == "sign":
        return Asked(kind, "", (sight.word or "",))
    if kind == "what":
        full = [number for number, name in enumerate(sight.cells) if name is not None]
        cell = full[int(rng.integers(len(full)))]
        return Asked(kind, f"cell {cell}", (f"cell {cell}", NAMES[sight.cells[cell] or 0]))
    name = list(sight.places)[int(rng.integers(len(sight.places)))]
    return Asked(kind, name, (name, sight.places[name], *([sight.word or ""] if kind == "both" else [])))


def all_results(sight: Sight) -> list[str]:
    """What both tools find."""
    found = ["found", *(symbol for pair in sight.places.items() for symbol in pair)]
    return found + (["says", sight.word] if sight.word else [])


def dialogue(sight: Sight, asked: Asked, arm: str) -> list[tuple[list[str], list[str]]]:
    """(told, written) of every turn in training."""
    answer = [*asked.answer, "end"]
    if arm in ("none", "all"):
        told = all_results(sight) if arm == "all" else []
        return [([*told, *asked.symbols()], ["know", "none", "value", *answer])]
    if asked.kind == "what":
        return [(asked.symbols(), ["know", "none", "value", *answer])]
    if asked.kind == "sign":
        call, told = ["read"], ["says", sight.word or ""]
    else:
        call, told = ["detect", asked.subject, "detected"], ["found", asked.subject, sight.places[asked.subject]]
    return [(asked.symbols(), ["need", *call, "wait", "end"]), (told, ["thanks", "none", "value", *answer])]


class Decoder(nn.Module):
    """A decoder of a few layers over cells and symbols.

    What is seen comes in the words' own space, cells carry the names by which questions call them, and every symbol
    knows the one before it: all of this shortens training, in all arms alike.
    """

    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4, longest: int = 48) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(width))
        self.embed = nn.Embedding(len(SYMBOLS), width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)  # it also gives the logits
        self.before = nn.Linear(width, width, bias=False)
        self.place = nn.Parameter(torch.randn(longest, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, seen: Tensor, ids: Tensor) -> Tensor:
        """Logits [rows, symbols, vocabulary]; `seen` is [rows, cells, names + 1]."""
        names = self.embed.weight[ID["cell 0"] : ID["cell 0"] + CELLS]
        shapes = self.embed.weight[ID[NAMES[0]] : ID[NAMES[0]] + len(NAMES)]
        cells = seen[..., :-1] @ shapes + seen[..., -1:] * self.empty
        symbols = self.embed(ids)
        symbols = symbols + self.before(F.pad(symbols, (0, 0, 1, -1)))
        x = torch.cat([cells + names, symbols], dim=1)
        x = x + self.place[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.norm(x)[:, CELLS:] @ self.embed.weight.T


def view(sight: Sight, rng: np.random.Generator) -> np.ndarray:
    """What is seen of a scene [cells, names + 1]."""
    seen = np.zeros((CELLS, len(NAMES) + 1), np.float32)
    for cell, name in enumerate(sight.cells):
        seen[cell, len(NAMES) if name is None else name] = 1
    return seen + NOISE * rng.standard_normal(seen.shape).astype(np.float32)


def trained(arm: str, seed: int, steps: int, batch: int = 32) -> Decoder:
    """A model of one arm."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Decoder()
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    form = "fly" if arm.startswith("fly") else arm
    kinds, shares = list(KINDS), list(KINDS.values())
    for _ in range(steps):
        rows, seen = [], []
        for _ in range(batch):
            sight = drawn(rng)
            asked = question(sight, str(rng.choice(kinds, p=shares)), rng)
            if arm == "fly without plain answers" and asked.kind == "what":
                asked = question(sight, "where", rng)
            rows.append(dialogue(sight, asked, form))
            seen.append(view(sight, rng))
        ids, targets = _tensors(rows)
        logits = model(torch.from_numpy(np.stack(seen)), ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def _tensors(rows: Sequence[list[tuple[list[str], list[str]]]]) -> tuple[Tensor, Tensor]:
    """Ids and targets [rows, longest]; only what the model writes is learned."""
    longest = max(sum(len(told) + len(written) for told, written in row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for number, row in enumerate(rows):
        place = 0
        for told, written in row:
            for symbols, learned in ((told, False), (written, True)):
                own = torch.tensor([ID[symbol] for symbol in symbols], dtype=torch.long)
                ids[number, place : place + len(own)] = own
                if learned:
                    targets[number, place : place + len(own)] = own
                place += len(own)
    return ids, targets


@torch.no_grad()
def write(model: Decoder, seen: Tensor, told: list[str], most: int = 12) -> list[str]:
    """What the model writes, up to its end."""
    written: list[str] = []
    while len(written) < most:
        ids = torch.tensor([[ID[symbol] for symbol in (*told, *written)]])
        symbol = SYMBOLS[int(model(seen, ids)[0, -1].argmax())]
        written.append(symbol)
        if symbol == "end":
            break
    return written


def said(written: Sequence[str]) -> str:
    """The text of what was written."""
    return "".join(TEXT.get(symbol, f" {symbol} ") for symbol in written)


def tools_for(sight: Sight) -> Toolbox:
    """The detector, and a reader that knows the scene's word."""

    def read(image: Image.Image) -> Outcome:
        return Outcome({"texts": [sight.word] if sight.word else []})

    reader = Skill(name="ocr", description="Read.", parameters=parameters(image=picture()), function=read, needs=())
    return Toolbox([detector(), reader])


class Score(NamedTuple):
    """What became of one question."""

    right: bool
    calls: bool
    right_call: bool
    valid: bool


def answered(model: Decoder, sight: Sight, asked: Asked, arm: str, rng: np.random.Generator) -> Score:
    """One held-out question; calls of the text that was written run on the picture."""
    seen = torch.from_numpy(view(sight, rng))[None]
    told = [*(all_results(sight) if arm == "all" else []), *asked.symbols()]
    written = write(model, seen, told)
    lines = split(said(written))
    action = None if lines is None else the_action(decode(lines.actions))
    calls = lines is not None and lines.actions.strip() != "[]"
    right_call = valid = False
    if arm == "fly" and action is not None:
        box = tools_for(sight)
        skill = box.skills.get(action.name)
        valid = skill is not None and mismatch(action.params, skill.tool().parameters or {}) is None
        wanted = ("ocr", {}) if asked.kind == "sign" else ("detect_shapes", {"caption": asked.subject})
        right_call = asked.kind != "what" and tuple(action) == wanted
        result = box.call(action.name, action.params, Artefacts(sight.image))
        if result.error is not None:
            back = ["failed"]
        elif action.name == "ocr":
            back = ["says", *result.data["texts"]]
        else:
            back = ["found", *(symbol for pair in found_by(result.data).items() for symbol in pair)]
        written = write(model, seen, [*told, *written, *[symbol for symbol in back if symbol in ID]])
        lines = split(said(written))
    value = "" if lines is None else lines.value.split()
    right = lines is not None and list(value) == " ".join(asked.answer).split()
    return Score(right, calls, right_call, valid)


def one_part(seed: int, arm: str, steps: int = 700, questions: int = 160) -> dict[str, float]:
    """An arm on the scenes that all arms are tested on; that without tools also with results at test alone."""
    held_out = sights(seed, 80)
    model = trained(arm, seed, steps // 2 if "without" in arm else steps)  # whether it calls without need shows early
    found: dict[str, float] = {}
    for name, form in TESTED[arm].items():
        rng = np.random.default_rng(10_000 + seed)
        kinds = list(KINDS)
        scores: dict[str, list[Score]] = {kind: [] for kind in kinds}
        for number in range(questions):
            sight = held_out[number % len(held_out)]
            asked = question(sight, str(rng.choice(kinds, p=list(KINDS.values()))), rng)
            scores[asked.kind].append(answered(model, sight, asked, form, rng))
        everything = [score for own in scores.values() for score in own]
        found[name] = float(np.mean([score.right for score in everything]))
        for kind, own in scores.items():
            found[f"{name} {kind}"] = float(np.mean([score.right for score in own]))
        if form == "fly":
            needing = [score for kind, own in scores.items() if kind != "what" for score in own]
            made = [score for score in everything if score.calls]
            found[f"{name} right call"] = float(np.mean([score.right_call for score in needing]))
            found[f"{name} valid"] = float(np.mean([score.valid for score in made])) if made else 1.0
            found[f"{name} needless"] = float(np.mean([score.calls for score in scores["what"]]))
    return found


def run(seeds: Sequence[int] = (0, 1, 2), progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """All arms under every seed.

    Args:
        budget: Other numbers of steps or questions, see `one_part`.
    """
    measured = run_seeds(functools.partial(one_part, **budget), seeds, progress, parts=tuple(TESTED))

    def compare(metric: str, idea: str, baseline: str, names: tuple[str, str], threshold: float) -> Comparison:
        return Comparison(
            metric=metric,
            idea=measured.arm(idea, names[0]),
            baseline=measured.arm(baseline, names[1]),
            threshold=threshold,
        )

    def mean(name: str) -> float:
        return measured.arm(name, name).mean

    kinds = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {mean(f'{name} {kind}'):.2f}" for kind in KINDS)
        for name in ("none", "test only", "all", "fly")
    )
    return Verdict(
        system="llava-plus",
        claim="Tools that a model learned to use help; all results at once help more; tools at test alone hurt.",
        paper="LLaVA-Bench (Tools) 82.3 All Tools, 76.5 Fly, 58.7 without tools, 48.5 with tools at test alone",
        comparisons=(
            compare("right answers", "fly", "none", ("on the fly", "no tools"), 0.2),
            compare("right answers", "all", "fly", ("all tools", "on the fly"), 0.0),
            compare("right answers", "none", "test only", ("no tools", "tools at test alone"), 0.0),
        ),
        seeds=tuple(seeds),
        seconds=measured.seconds,
        notes=f"On the fly, {100 * mean('fly right call'):.1f} % of the questions that need a tool get the right call, "
        f"{100 * mean('fly valid'):.1f} % of the calls fit their schema, and {100 * mean('fly needless'):.0f} % of the "
        f"others get a needless one ({100 * mean('unmixed needless'):.0f} % without plain answers in training). Of two "
        f"facts one call brings one, which is where all tools at once can gain. By kind - {kinds}.",
    )
