"""The thorax world: patients with radiograph, CT volume, report, questions, knowledge and a follow-up study.

A patient is a set of numbers (`anatomy.Chest`) plus a list of findings. The same numbers give every picture and every
sentence, so what the text says is true of the pixels, up to what physics hides: one projection does not show depth,
and a nodule of a few millimetres drowns in the noise of a small matrix.

Answers are balanced by construction: without the picture no question can be answered better than by guessing among
its possible answers. Sides are the patient's; the patient's right is at the left edge of the picture.

This module knows what findings are called and what is asked about them; the geometry and the physics are in `anatomy`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llavakit.phantom import anatomy, words
from llavakit.phantom.anatomy import Chest, Ellipsoid, Lung
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

KINDS = ("cardiomegaly", "nodule", "consolidation", "effusion", "pneumothorax")
NAMES = {
    "cardiomegaly": "cardiomegaly",
    "nodule": "nodule",
    "consolidation": "consolidation",
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
}
ZONES = ("upper", "middle", "lower")
SIZES = ("small", "large")
DEPTHS = ("anterior", "posterior")
CHANGES = ("grown", "shrunk", "gone", "unchanged")

PREVALENCE = {"cardiomegaly": 0.5, "nodule": 0.4, "consolidation": 0.4, "effusion": 0.4, "pneumothorax": 0.35}

IMAGE_TYPES = ("presence", "side", "zone", "size", "count")
EASY_TYPES = ("presence", "side", "zone", "size")
VOLUME_TYPES = ("depth", "presence", "side", "zone")
TYPES = (*IMAGE_TYPES, "depth", "change")

KNOWLEDGE = (
    ("enlarged heart", "suggestive_of", "cardiomegaly"),
    ("cardiomegaly", "suggestive_of", "heart failure"),
    ("pleural effusion", "suggestive_of", "heart failure"),
    ("consolidation", "suggestive_of", "pneumonia"),
    ("pneumothorax", "suggestive_of", "collapsed lung"),
    ("nodule", "suggestive_of", "granuloma"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: One of `KINDS`.
        side: "left" or "right"; None for the heart.
        zone: "upper", "middle" or "lower" third of the lung; None where it has none.
        size: "small" or "large"; None for the heart and for consolidation.
        depth: "anterior" or "posterior" half of the lung; nodules only.
        center: Where a nodule or consolidation lies, mm.
        extent: Radius of a nodule, semi-axis of a consolidation, height of an effusion above the dome of the
            diaphragm, width of the gap of a pneumothorax as a share of the lung; mm except for the last.
    """

    kind: str
    side: str | None = None
    zone: str | None = None
    size: str | None = None
    depth: str | None = None
    center: tuple[float, float, float] | None = None
    extent: float = 0.0

    def facts(self) -> dict[str, Any]:
        """What is known of it, as JSON-able data."""
        facts = {key: value for key, value in asdict(self).items() if value}
        if self.center:
            facts["center"] = [round(value, 1) for value in self.center]
        return facts | ({"extent": round(self.extent, 3)} if self.extent else {})

    @property
    def place(self) -> str:
        """ "right upper zone", or "left" where there is no zone."""
        return f"{self.side} {self.zone} zone" if self.zone else str(self.side)


@dataclass(frozen=True, slots=True)
class _Extents:
    """How large findings are, by size: (low, high) of `Finding.extent`."""

    nodule: dict[str, tuple[float, float]]
    consolidation: tuple[float, float]
    effusion: dict[str, tuple[float, float]]
    pneumothorax: dict[str, tuple[float, float]]


_FULL = _Extents(
    nodule={"small": (2.0, 2.6), "large": (9.0, 14.0)},
    consolidation=(20.0, 30.0),
    effusion={"small": (-14.0, -6.0), "large": (28.0, 55.0)},
    pneumothorax={"small": (0.12, 0.18), "large": (0.30, 0.40)},
)
_EASY = _Extents(
    nodule={"small": (9.0, 10.0), "large": (15.0, 17.0)},
    consolidation=(26.0, 32.0),
    effusion={"small": (0.0, 8.0), "large": (50.0, 65.0)},
    pneumothorax={"small": (0.16, 0.20), "large": (0.34, 0.42)},
)
_EXTENTS = {"full": _FULL, "easy": _EASY}
_EASY_KINDS = ("cardiomegaly", "consolidation", "effusion", "pneumothorax")


class Thorax(World):
    """Chest radiographs and CT volumes with reports and questions.

    Args:
        size: Pixels along each side of the radiograph.
        difficulty: "full", or "easy": larger findings, no nodules, no counting; learnable by a tiny model at 32 to
            64 pixels.
        types: Question types about the radiograph, of `IMAGE_TYPES`; None for those of the difficulty.
        findings: Kinds of findings that occur, of `KINDS`; None for those of the difficulty.
        volumes: Add an item with the CT volume and a question that only depth answers.
        grid: Voxels along each axis of the volume.
        followups: Add an item with a second study in which findings have grown, shrunk or gone.
        masks: Add the outline of every finding to the radiograph.
        noise: Photon and detector noise.
    """

    name = "thorax"
    version = 1

    def __init__(
        self,
        *,
        size: int = 64,
        difficulty: str = "full",
        types: Any = None,
        findings: Any = None,
        volumes: bool = False,
        grid: int = 48,
        followups: bool = False,
        masks: bool = False,
        noise: bool = True,
    ) -> None:
        self.size = int(check_range("size", size, 16, 2048))
        self.difficulty = check_choice("difficulty", difficulty, tuple(_EXTENTS))
        easy = difficulty == "easy"
        self.types = select_types(types, IMAGE_TYPES, EASY_TYPES if easy else IMAGE_TYPES)
        kinds = select_types(findings, KINDS, _EASY_KINDS if easy else KINDS)
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.volumes = volumes
        self.grid = int(check_range("grid", grid, 8, 512))
        self.followups = followups
        self.masks = masks
        self.noise = noise

    def sample(self, seed: int, index: int) -> Case:
        """Patient number `index`; see `World.sample`."""
        rng = generator(seed, index, "thorax/patient")
        findings = self._findings(rng)
        chest = build_chest(rng, findings, _EXTENTS[self.difficulty])
        case_id = f"thorax-{seed}-{index:07d}"
        image = self._radiograph(chest, generator(seed, index, "thorax/noise") if self.noise else None)
        asking = generator(seed, index, "thorax/questions")
        report = write_report(findings, self.kinds)
        items = [
            Item(
                id=case_id,
                kind="image",
                media=(image,),
                questions=ask(asking, findings, self.types, self.kinds),
                caption=report["findings"],
                caption_prompt="Describe the findings in this radiograph.",
                boxes=find_boxes(chest, findings),
                masks=find_masks(chest, findings, (self.size, self.size)) if self.masks else {},
            )
        ]
        if self.volumes:
            items.append(self._volume_item(case_id, chest, findings, generator(seed, index, "thorax/volume"), report))
        if self.followups:
            items.append(self._followup_item(case_id, chest, findings, image, seed, index))
        return Case(
            id=case_id,
            split=split_of(index),
            items=items,
            facts={
                "findings": [finding.facts() for finding in findings],
                "labels": {kind: any(f.kind == kind for f in findings) for kind in self.kinds},
            },
            report=report,
            triples=statements(findings),
        )

    def _radiograph(self, chest: Chest, noise: np.random.Generator | None) -> np.ndarray:
        return anatomy.expose(anatomy.line_integrals(chest, (self.size, self.size)), noise)

    def _findings(self, rng: np.random.Generator) -> list[Finding]:
        """Which findings a patient has; places and extents are filled in by `build_chest`."""
        found: list[Finding] = []
        for kind in self.kinds:
            if rng.random() >= PREVALENCE[kind]:
                continue
            if kind == "cardiomegaly":
                found.append(Finding(kind))
            elif kind == "nodule":
                count = 1 + int(rng.integers(3)) if "count" in self.types else 1
                found += [
                    Finding(kind, pick(rng, anatomy.SIDES), pick(rng, ZONES), pick(rng, SIZES), pick(rng, DEPTHS))
                    for _ in range(count)
                ]
            elif kind == "consolidation":
                found.append(Finding(kind, pick(rng, anatomy.SIDES), pick(rng, ZONES)))
            else:
                found.append(Finding(kind, pick(rng, anatomy.SIDES), size=pick(rng, SIZES)))
        return found

    def _volume_item(
        self, case_id: str, chest: Chest, findings: list[Finding], rng: np.random.Generator, report: dict[str, str]
    ) -> Item:
        hounsfield, spacing = anatomy.volume(chest, (self.grid, self.grid, self.grid))
        questions = ask(rng, findings, VOLUME_TYPES, self.kinds, picture="scan")
        return Item(
            id=f"{case_id}-ct",
            kind="volume",
            media=(hounsfield,),
            questions=questions,
            caption=report["findings"],
            caption_prompt="Describe the findings in this scan.",
            spacing=spacing,
        )

    def _followup_item(
        self, case_id: str, chest: Chest, findings: list[Finding], first: np.ndarray, seed: int, index: int
    ) -> Item:
        rng = generator(seed, index, "thorax/followup")
        changes = {i: pick(rng, CHANGES) for i, f in enumerate(findings) if f.kind != "cardiomegaly"}
        later = progress(chest, findings, changes)
        second = self._radiograph(later, rng if self.noise else None)
        questions, sentences = [], []
        for i, change in changes.items():
            finding = findings[i]
            name = describe(finding, findings)
            sentence = words.capital(f"the {name} {_CHANGE_PHRASES[change]}.")
            sentences.append(sentence)
            text = f"How has the {name} changed since the first radiograph?"
            questions.append(
                Question("change", text, words.capital(change), sentence, tuple(map(words.capital, CHANGES)))
            )
        return Item(
            id=f"{case_id}-followup",
            kind="images",
            media=(first, second),
            questions=questions,
            caption=" ".join(sentences) or "There is no change.",
            caption_prompt="Compare the second radiograph with the first.",
        )

    def texts(self) -> list[str]:
        """Every sentence form with every word in it; see `World.texts`."""
        rng = np.random.default_rng(0)
        out = words.shared_texts()
        out += ["Describe the findings in this radiograph.", "Describe the findings in this scan."]
        out += ["Compare the second radiograph with the first.", "There is no change."]
        everything = [Finding("cardiomegaly")]
        for side in anatomy.SIDES:
            for size in SIZES:
                everything += [Finding("effusion", side, size=size), Finding("pneumothorax", side, size=size)]
                everything += [Finding("nodule", side, zone, size, depth) for zone in ZONES for depth in DEPTHS]
            everything += [Finding("consolidation", side, zone) for zone in ZONES]
        for picture in ("radiograph", "scan"):
            for findings in [[], *([f] for f in everything), everything[:9], everything[9:18]]:
                for question in ask(rng, findings, TYPES, KINDS, picture=picture, everything=True):
                    out.append(f"{question.text} {question.answer} {question.sentence}")
                report = write_report(findings, KINDS)
                out += [f"Findings: {report['findings']} Impression: {report['impression']}"]
                out += [" ".join(t) for t in statements(findings)]
        for finding in everything[1:]:
            name = describe(finding, everything)
            out += [f"How has the {name} changed since the first radiograph?"]
            out += [f"{words.capital(c)} The {name} {_CHANGE_PHRASES[c]}." for c in CHANGES]
        out += [" ".join(statement) for statement in KNOWLEDGE]
        return out

    def knowledge(self) -> list[tuple[str, str, str]]:
        """What the findings of this world suggest."""
        return list(KNOWLEDGE)


_CHANGE_PHRASES = {
    "grown": "has grown",
    "shrunk": "has shrunk",
    "gone": "has gone",
    "unchanged": "is unchanged",
}


# ---------------------------------------------------------------------------------------------------------------
# Patients


def build_chest(rng: np.random.Generator, findings: list[Finding], extents: _Extents) -> Chest:
    """A random chest with these findings. Their places and extents are written back into the list.

    The same random numbers are drawn in the same order whatever the findings are, as far as their number allows.
    """
    u = rng.random(12).tolist()
    stature = 0.94 + 0.10 * u[0]
    width = 68.0 + 6.0 * u[1]
    reach = (50.0 + 5.0 * u[2]) * stature
    depth = (80.0 + 8.0 * u[3]) * stature
    lungs = {}
    for side, sign, dome in (("right", -1.0, 68.0), ("left", 1.0, 78.0)):
        outer = Ellipsoid((sign * width, 0.0, 38.0), (reach, depth, 160.0 * stature))
        lungs[side] = Lung(outer, outer, dome + 10.0 * (u[4] - 0.5), 38.0)
    enlarged = any(f.kind == "cardiomegaly" for f in findings)
    heart_width = 73.0 + 7.0 * u[5] if enlarged else 48.0 + 6.0 * u[5]
    heart = Ellipsoid(
        (16.0 + 6.0 * u[6] + (4.0 if enlarged else 0.0), -18.0, 64.0),
        (heart_width, 46.0 + (10.0 if enlarged else 0.0), 42.0 + (6.0 if enlarged else 0.0)),
        0.35 + 0.15 * u[7],
    )
    knob = Ellipsoid((24.0 + 5.0 * u[8], 8.0, -44.0), (18.0, 18.0, 20.0))
    chest = Chest(
        body=((165.0 + 10.0 * u[9]) * stature, (100.0 + 8.0 * u[10]) * stature),
        lungs=lungs,
        heart=[heart, knob],
        bones=[
            Ellipsoid((0.0, 62.0, 0.0), (15.0, 16.0, 420.0)),
            Ellipsoid((-62.0, -30.0, -100.0), (52.0, 6.0, 5.0), -0.22),
            Ellipsoid((62.0, -30.0, -100.0), (52.0, 6.0, 5.0), 0.22),
        ],
        cage=(
            Ellipsoid((0.0, 0.0, 0.0), (width + reach + 9.0, depth + 7.0, 185.0)),
            Ellipsoid((0.0, 0.0, 0.0), (width + reach + 4.0, depth + 2.0, 180.0)),
        ),
        ribs=[-132.0 + 6.0 * u[11] + 27.0 * k for k in range(10)],
        trachea=Ellipsoid((0.0, 5.0, -92.0), (7.5, 7.5, 80.0)),
    )
    order = {"effusion": 0, "pneumothorax": 0, "consolidation": 1, "nodule": 2, "cardiomegaly": 3}
    for i in sorted(range(len(findings)), key=lambda i: order[findings[i].kind]):
        findings[i] = _place(rng, chest, findings[i], extents)
    _grow_vessels(rng, chest)
    return chest


def _place(rng: np.random.Generator, chest: Chest, finding: Finding, extents: _Extents) -> Finding:
    """Put a finding into the chest; returns it with place and extent."""
    if finding.kind == "cardiomegaly":
        return finding
    low, high = (
        extents.consolidation if finding.kind == "consolidation" else getattr(extents, finding.kind)[finding.size]
    )
    finding = replace(finding, extent=float(rng.uniform(low, high)))
    if finding.kind == "consolidation":
        finding = replace(finding, center=_spot(rng, chest.lungs[finding.side], finding))
    elif finding.kind == "nodule":
        finding = _place_nodule(rng, chest, finding)
    _insert(chest, finding)
    return finding


def _insert(chest: Chest, finding: Finding) -> None:
    """Add a finding that knows its place to the anatomy, in place."""
    if finding.kind == "cardiomegaly":
        return
    lung = chest.lungs[finding.side]
    r = finding.extent
    if finding.kind == "effusion":
        lung.fluid = lung.dome - r
    elif finding.kind == "pneumothorax":
        (x, y, z), (a, b, c) = lung.outer.center, lung.outer.axes
        medial = -1.0 if finding.side == "left" else 1.0
        keep = 1.0 - r
        # The lung shrinks towards its root: away from the chest wall and from the apex.
        lung.inner = Ellipsoid((x + medial * a * r, y, z + 0.7 * c * r), (a * keep, b * keep, c * keep))
    elif finding.kind == "consolidation":
        lung.patch = Ellipsoid(finding.center, (r, 1.6 * r, 0.8 * r), 0.3)
    else:
        lung.nodules.append(Ellipsoid(finding.center, (r, r, r)))


def zone_limits(lung: Lung) -> tuple[float, float]:
    """z of the top of the upper and of the bottom of the lower zone; each zone is a third of the way."""
    return lung.outer.center[2] - lung.outer.axes[2], lung.dome


def _spot(rng: np.random.Generator, lung: Lung, finding: Finding) -> tuple[float, float, float]:
    """A place in the finding's zone, clear of the borders of the zone and of the edge of the lung in the picture."""
    top, bottom = zone_limits(lung)
    third = (bottom - top) / 3.0
    u = rng.random(3).tolist()
    k = ZONES.index(finding.zone)
    z = top + third * (k + (0.45 + 0.4 * u[0] if k == 0 else 0.2 + 0.6 * u[0]))
    (cx, cy, cz), (a, b, c) = lung.inner.center, lung.inner.axes
    ring = math.sqrt(max(1.0 - ((z - cz) / c) ** 2, 0.05))
    outward = 1.0 if cx > 0 else -1.0
    x = cx + outward * a * ring * (0.1 + 0.55 * u[1])
    lateral = math.sqrt(max(ring**2 - ((x - cx) / a) ** 2, 0.0))
    half = 1.0 if finding.depth == "posterior" else -1.0
    y = cy + half * b * lateral * (0.3 + 0.4 * u[2]) if finding.depth else cy + 10.0 * (u[2] - 0.5)
    return x, y, z


def _place_nodule(rng: np.random.Generator, chest: Chest, finding: Finding) -> Finding:
    """A nodule in aerated lung, apart from all else. If its zone has no room, it moves to another zone or side."""
    for attempt in range(400):
        if attempt and attempt % 40 == 0:
            finding = replace(finding, side=pick(rng, anatomy.SIDES), zone=pick(rng, ZONES))
        lung = chest.lungs[finding.side]
        center = _spot(rng, lung, finding)
        if _is_free(chest, lung, center, finding.extent):
            return replace(finding, center=center)
    return replace(finding, center=center)


def _is_free(chest: Chest, lung: Lung, center: tuple[float, float, float], radius: float) -> bool:
    x, y, z = center
    bottom = lung.dome if lung.fluid is None else min(float(lung.surface(x)), lung.dome)
    if z + radius + 3.0 > bottom:
        return False
    (cx, cy, cz), (a, b, c) = lung.inner.center, lung.inner.axes
    reach = radius + 2.0
    if ((x - cx) / (a - reach)) ** 2 + ((y - cy) / (b - reach)) ** 2 + ((z - cz) / (c - reach)) ** 2 > 1.0:
        return False
    obstacles = [*chest.heart, *([lung.patch] if lung.patch else [])]
    if any(_near(part, x, z, reach) for part in obstacles):
        return False
    others = [n for side in chest.lungs.values() for n in side.nodules]
    return all(math.hypot(x - n.center[0], z - n.center[2]) > n.axes[0] + radius + 8.0 for n in others)


def _near(part: Ellipsoid, x: float, z: float, reach: float) -> bool:
    """Whether a disc in the frontal plane touches the outline of a part (grown by the disc's radius)."""
    cos, sin = math.cos(part.tilt), math.sin(part.tilt)
    dx, dz = x - part.center[0], z - part.center[2]
    a, c = part.axes[0] + reach, part.axes[2] + reach
    return ((dx * cos + dz * sin) / a) ** 2 + ((dz * cos - dx * sin) / c) ** 2 < 1.0


VESSELS_PER_LUNG = 5


def _grow_vessels(rng: np.random.Generator, chest: Chest) -> None:
    """Lung markings that run from the root of each lung outwards, around nodules in front of or behind them."""
    for side, lung in chest.lungs.items():
        outward = 1.0 if side == "left" else -1.0
        u = rng.random((VESSELS_PER_LUNG, 4)).tolist()
        for k in range(VESSELS_PER_LUNG):
            angle = (k + u[k][0]) / VESSELS_PER_LUNG * 2.6 - 1.3
            length = 16.0 + 12.0 * u[k][1]
            distance = 8.0 + length
            radius = 1.4 + 0.9 * u[k][2]
            x = outward * (34.0 + distance * math.cos(angle))
            z = 6.0 + distance * math.sin(angle)
            y = 36.0 * (u[k][3] - 0.5)
            vessel = Ellipsoid((x, y, z), (length, radius, radius), outward * angle)
            for nodule in lung.nodules:
                if abs(nodule.center[1] - y) < nodule.axes[1] + radius + 1.0:
                    y = nodule.center[1] - math.copysign(1.0, nodule.center[1]) * (nodule.axes[1] + radius + 2.0)
                    vessel = Ellipsoid((x, y, z), vessel.axes, vessel.tilt)
            lung.vessels.append(vessel)


def progress(chest: Chest, findings: list[Finding], changes: dict[int, str]) -> Chest:
    """The same chest at a later date.

    Args:
        changes: What became of each finding, by its place in the list, of `CHANGES`.
    """
    lungs = {
        side: Lung(lung.outer, lung.outer, lung.dome, lung.slope, vessels=lung.vessels)
        for side, lung in chest.lungs.items()
    }
    later = replace(chest, lungs=lungs)
    for i, finding in enumerate(findings):
        change = changes.get(i, "unchanged")
        if change != "gone":
            _insert(later, replace(finding, extent=_later_extent(finding, change)))
    return later


def _later_extent(finding: Finding, change: str) -> float:
    if change == "unchanged":
        return finding.extent
    grown = change == "grown"
    if finding.kind == "effusion":
        return finding.extent + (35.0 if grown else -(14.0 if finding.size == "small" else 35.0))
    if finding.kind == "pneumothorax":
        return finding.extent * (1.5 if grown else 0.55)
    return finding.extent * (1.5 if grown else 0.6)


# ---------------------------------------------------------------------------------------------------------------
# Language


def describe(finding: Finding, findings: list[Finding]) -> str:
    """The name of a finding, with its place where there are several of its kind."""
    name = NAMES[finding.kind]
    several = sum(f.kind == finding.kind for f in findings) > 1
    return f"{finding.side} {finding.zone} {name}" if several and finding.zone else name


def write_report(findings: list[Finding], kinds: tuple[str, ...]) -> dict[str, str]:
    """ "findings" (what is and what is not there, by organ) and "impression" (what matters)."""
    lines, impression = [], []
    for kind in kinds:
        found = [f for f in findings if f.kind == kind]
        if kind == "cardiomegaly":
            lines.append("The heart is enlarged." if found else "The heart size is normal.")
        elif not found:
            lines.append(f"There is no {NAMES[kind]}.")
        elif len(found) > 1:
            lines.append(f"There are {words.NUMBERS[len(found)].lower()} nodules.")
            lines += [f"There is {words.article(f.size)} nodule in the {f.place}." for f in found]
        elif kind == "nodule":
            lines.append(f"There is {words.article(found[0].size)} nodule in the {found[0].place}.")
        elif kind == "consolidation":
            lines.append(f"There is consolidation in the {found[0].place}.")
        else:
            lines.append(f"There is {words.article(found[0].size)} {found[0].side} {NAMES[kind]}.")
        if len(found) > 1:
            impression.append("nodules")
        elif found:
            f = found[0]
            impression.append(f"{f.place} {NAMES[kind]}" if f.side else NAMES[kind])
    text = words.capital(words.listing(impression)) + "." if impression else "No acute findings."
    return {"findings": " ".join(lines), "impression": text}


def statements(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """What holds for this patient, in the relations of RadGraph (modify, located_at, suggestive_of)."""
    suggests = {subject: t for t in KNOWLEDGE for subject in [t[0]]}
    out = []
    for finding in findings:
        name = NAMES[finding.kind]
        if finding.size:
            out.append((finding.size, "modify", name))
        if finding.side:
            out.append((name, "located_at", f"{finding.place}" if finding.zone else f"{finding.side} lung"))
        out.append(suggests[name])
    return list(dict.fromkeys(out))


def ask(
    rng: np.random.Generator,
    findings: list[Finding],
    types: tuple[str, ...],
    kinds: tuple[str, ...],
    *,
    picture: str = "radiograph",
    everything: bool = False,
) -> list[Question]:
    """Questions about one patient, presence first, so that no question of a dialogue gives away a later answer.

    Args:
        types: Which types to ask, of `TYPES`.
        kinds: Findings that occur in this world.
        picture: "radiograph" or "scan".
        everything: Ask all that can be asked instead of balancing yes and no.
    """
    questions = []
    if "presence" in types:
        for kind in kinds:
            present = any(f.kind == kind for f in findings)
            if thin(rng, present, PREVALENCE[kind]) or everything:
                questions.append(_presence(kind, present, picture))
        order = rng.permutation(len(questions))
        questions = [questions[i] for i in order]
    nodules = [f for f in findings if f.kind == "nodule"]
    if "count" in types and nodules:
        n = len(nodules)
        verb, noun = ("is", "nodule") if n == 1 else ("are", "nodules")
        number = words.NUMBERS[min(n, 9)]
        questions.append(
            Question(
                "count",
                "How many nodules are there?",
                number,
                f"There {verb} {number.lower()} {noun}.",
                ("One", "Two", "Three"),
            )
        )
    for kind in kinds:
        found = [f for f in findings if f.kind == kind]
        if len(found) != 1 or kind == "cardiomegaly":
            continue
        finding, name = found[0], NAMES[kind]
        for type_, value, options in (
            ("side", finding.side, anatomy.SIDES),
            ("zone", finding.zone, ZONES),
            ("size", finding.size, SIZES),
            ("depth", finding.depth, DEPTHS),
        ):
            if type_ in types and value:
                questions.append(
                    Question(
                        type_,
                        _ATTRIBUTE_QUESTIONS[type_].format(name=name),
                        words.capital(value),
                        _ATTRIBUTE_ANSWERS[type_].format(name=name, value=value),
                        tuple(map(words.capital, options)),
                    )
                )
    return questions


_ATTRIBUTE_QUESTIONS = {
    "side": "On which side is the {name}?",
    "zone": "In which zone is the {name}?",
    "size": "Is the {name} small or large?",
    "depth": "Is the {name} in the anterior or the posterior half of the lung?",
}
_ATTRIBUTE_ANSWERS = {
    "side": "The {name} is on the {value} side.",
    "zone": "The {name} is in the {value} zone.",
    "size": "The {name} is {value}.",
    "depth": "The {name} is in the {value} half of the lung.",
}


def _presence(kind: str, present: bool, picture: str) -> Question:
    answer = "Yes" if present else "No"
    if kind == "cardiomegaly":
        sentence = "The heart is enlarged." if present else "The heart is not enlarged."
        return Question("presence", "Is the heart enlarged?", answer, sentence, ("Yes", "No"))
    name = NAMES[kind]
    noun = name if kind == "consolidation" else words.article(name)
    there = f"there is {noun}." if present else f"there is no {name}."
    return Question("presence", f"Is there {noun} in this {picture}?", answer, words.capital(there), ("Yes", "No"))


# ---------------------------------------------------------------------------------------------------------------
# Where the findings are in the picture


def _outline(chest: Chest, finding: Finding, size: tuple[int, int]) -> np.ndarray:
    """Pixels that show a finding, bool `[rows, columns]`."""
    z = anatomy.axis(size[0], anatomy.HEIGHT)[:, None]
    x = anatomy.axis(size[1], anatomy.WIDTH)[None, :]
    if finding.kind == "cardiomegaly":
        return chest.heart[0].half_depth(x, z) > 0
    lung = chest.lungs[finding.side]
    if finding.kind == "nodule":
        r = finding.extent
        return Ellipsoid(finding.center, (r, r, r)).half_depth(x, z) > 0
    cavity = (lung.outer.half_depth(x, z) > 0) & (z < lung.floor(x))
    if finding.kind == "effusion":
        return cavity & (z >= lung.surface(x))
    dry = cavity if lung.fluid is None else cavity & (z < lung.surface(x))
    aerated = lung.inner.half_depth(x, z) > 0
    if finding.kind == "pneumothorax":
        return dry & ~aerated
    return dry & aerated & (lung.patch.half_depth(x, z) > 0)


def find_masks(chest: Chest, findings: list[Finding], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Outline of every finding as bool `[rows, columns]`, under its kind and a running number."""
    return {f"{finding.kind}-{i}": _outline(chest, finding, size) for i, finding in enumerate(findings)}


_BOX_GRID = 90


def find_boxes(chest: Chest, findings: list[Finding]) -> list[Box]:
    """Bounding boxes of all findings in fractions of the picture; exact for nodules, to 4 mm for the others."""
    boxes = []
    for finding in findings:
        name = describe(finding, findings)
        if finding.kind == "nodule":
            (x, _, z), r = finding.center, finding.extent
            left, top, right, bottom = x - r, z - r, x + r, z + r
            box = (left / anatomy.WIDTH, top / anatomy.HEIGHT, right / anatomy.WIDTH, bottom / anatomy.HEIGHT)
            xyxy = tuple(min(max(v + 0.5, 0.0), 1.0) for v in box)
        else:
            mask = _outline(chest, finding, (_BOX_GRID, _BOX_GRID))
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if not len(rows):
                continue
            xyxy = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            xyxy = tuple(float(v) / _BOX_GRID for v in xyxy)
        boxes.append(Box(finding.kind, name if finding.kind != "cardiomegaly" else "heart", xyxy))
    return boxes
