"""Patients of the thorax world: findings, their places, and how they change.

Findings are drawn first, then the chest around them; a finding gets its place and extent when it is put in. Names of
findings and questions about them are not known here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llavakit.phantom import anatomy
from llavakit.phantom.anatomy import Chest, Ellipsoid, Lung
from llavakit.phantom.base import pick

MODALITIES = ("cardiomegaly", "nodule", "consolidation", "effusion", "pneumothorax")
ZONES = ("upper", "middle", "lower")
SIZES = ("small", "large")
DEPTHS = ("anterior", "posterior")
CHANGES = ("grown", "shrunk", "gone", "unchanged")


@dataclass(frozen=True, slots=True)
class Finding:
    """One abnormal finding.

    Attributes:
        kind: One of `KINDS`.
        side: "left" or "right"; None for the heart.
        zone: "upper", "middle" or "lower" third of the lung; None where it has none.
        size: "small" or "large"; None for the heart and for consolidation.
        depth: "anterior" or "posterior" half of the lung; nodules only.
        center: Centre of a nodule or consolidation, mm.
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
        """The finding as JSON-able data."""
        facts = {key: value for key, value in asdict(self).items() if value}
        if self.center:
            facts["center"] = [round(value, 1) for value in self.center]
        return facts | ({"extent": round(self.extent, 3)} if self.extent else {})

    @property
    def place(self) -> str:
        """ "right upper zone", or "left" where there is no zone."""
        return f"{self.side} {self.zone} zone" if self.zone else str(self.side)


@dataclass(frozen=True, slots=True)
class Setting:
    """How frequent findings are, and how large.

    Attributes:
        prevalence: Share of the patients who have a finding of each kind, by kind; at most one half, see `base.thin`.
        one_sided: Whether all findings of a patient are in the same lung, so that naming the side takes no search.
        nodule, consolidation, effusion, pneumothorax: (low, high) of `Finding.extent`, by size where there are two.
    """

    prevalence: dict[str, float]
    one_sided: bool

    nodule: dict[str, tuple[float, float]]
    consolidation: tuple[float, float]
    effusion: dict[str, tuple[float, float]]
    pneumothorax: dict[str, tuple[float, float]]


_FULL = Setting(
    prevalence={"cardiomegaly": 0.5, "nodule": 0.4, "consolidation": 0.4, "effusion": 0.4, "pneumothorax": 0.35},
    one_sided=False,
    nodule={"small": (2.0, 2.6), "large": (9.0, 14.0)},
    consolidation=(20.0, 30.0),
    effusion={"small": (-14.0, -6.0), "large": (28.0, 55.0)},
    pneumothorax={"small": (0.12, 0.18), "large": (0.30, 0.40)},
)
_EASY = Setting(
    prevalence=dict.fromkeys(MODALITIES, 0.5),
    one_sided=True,
    nodule={"small": (9.0, 10.0), "large": (15.0, 17.0)},
    consolidation=(26.0, 32.0),
    effusion={"small": (0.0, 8.0), "large": (50.0, 65.0)},
    pneumothorax={"small": (0.16, 0.20), "large": (0.34, 0.42)},
)
SETTINGS = {"full": _FULL, "easy": _EASY}


def draw_findings(
    rng: np.random.Generator, kinds: tuple[str, ...], most_nodules: int, setting: Setting
) -> list[Finding]:
    """Which findings of these kinds a patient has; places and extents are filled in by `build_chest`."""
    found: list[Finding] = []
    same_side = pick(rng, anatomy.SIDES) if setting.one_sided else None
    for kind in kinds:
        if rng.random() >= setting.prevalence[kind]:
            continue
        if kind == "cardiomegaly":
            found.append(Finding(kind))
            continue
        for _ in range(1 + int(rng.integers(most_nodules)) if kind == "nodule" else 1):
            side = same_side or pick(rng, anatomy.SIDES)
            if kind == "nodule":
                found.append(Finding(kind, side, pick(rng, ZONES), pick(rng, SIZES), pick(rng, DEPTHS)))
            elif kind == "consolidation":
                found.append(Finding(kind, side, pick(rng, ZONES)))
            else:
                found.append(Finding(kind, side, size=pick(rng, SIZES)))
    return found


def build_chest(rng: np.random.Generator, findings: list[Finding], setting: Setting) -> Chest:
    """A random chest with these findings, whose places and extents are written back into the list.

    As far as the number of findings allows, the same random numbers are drawn in the same order for any findings.
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
        findings[i] = _place(rng, chest, findings[i], setting)
    _grow_vessels(rng, chest)
    return chest


def _place(rng: np.random.Generator, chest: Chest, finding: Finding, setting: Setting) -> Finding:
    """Put a finding into the chest; returns it with place and extent."""
    if finding.kind == "cardiomegaly":
        return finding
    low, high = (
        setting.consolidation if finding.kind == "consolidation" else getattr(setting, finding.kind)[finding.size]
    )
    finding = replace(finding, extent=float(rng.uniform(low, high)))
    if finding.kind in ("consolidation", "nodule"):
        finding = _find_room(rng, chest, finding, setting)
    _insert(chest, finding)
    return finding


def _insert(chest: Chest, finding: Finding) -> None:
    """Add a finding with a place to the anatomy, in place."""
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
        # The lung shrinks towards its root: away from the chest wall, and a little from the apex.
        lung.inner = Ellipsoid((x + medial * a * r, y, z + 0.3 * c * r), (a * keep, b * keep, c * (1.0 - 0.3 * r)))
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


def _find_room(rng: np.random.Generator, chest: Chest, finding: Finding, setting: Setting) -> Finding:
    """A nodule or consolidation in aerated lung, separate from all other parts.

    If its zone has no room, it moves to the other side, and if there is none either, to another zone.
    """
    for attempt in range(480):
        if attempt and attempt % 40 == 0:
            if attempt % 80 == 0 or setting.one_sided:
                finding = replace(finding, zone=pick(rng, ZONES))
            if not setting.one_sided:
                finding = replace(finding, side="left" if finding.side == "right" else "right")
        center = _spot(rng, chest.lungs[finding.side], finding)
        if _is_free(chest, chest.lungs[finding.side], finding, center):
            break
    return replace(finding, center=center)


def _is_free(chest: Chest, lung: Lung, finding: Finding, center: tuple[float, float, float]) -> bool:
    """Whether a nodule fits in whole, or a consolidation for the most part, and touches nothing in the picture."""
    x, y, z = center
    reach = finding.extent + 2.0 if finding.kind == "nodule" else 0.5 * finding.extent
    bottom = lung.dome if lung.fluid is None else min(float(lung.surface(x)), lung.dome)
    if z + reach + 3.0 > bottom:
        return False
    (cx, cy, cz), (a, b, c) = lung.inner.center, lung.inner.axes
    if ((x - cx) / (a - reach)) ** 2 + ((y - cy) / (b - reach)) ** 2 + ((z - cz) / (c - reach)) ** 2 > 1.0:
        return False
    obstacles = [*chest.heart, *([lung.patch] if lung.patch else [])]
    if any(_near(part, x, z, reach) for part in obstacles):
        return False
    others = [n for side in chest.lungs.values() for n in side.nodules]
    return all(math.hypot(x - n.center[0], z - n.center[2]) > n.axes[0] + finding.extent + 8.0 for n in others)


def _near(part: Ellipsoid, x: float, z: float, reach: float) -> bool:
    """Whether a disc in the frontal plane touches the outline of a part (grown by the disc's radius)."""
    cos, sin = math.cos(part.tilt), math.sin(part.tilt)
    dx, dz = x - part.center[0], z - part.center[2]
    a, c = part.axes[0] + reach, part.axes[2] + reach
    return ((dx * cos + dz * sin) / a) ** 2 + ((dz * cos - dx * sin) / c) ** 2 < 1.0


VESSELS_PER_LUNG = 5


def _grow_vessels(rng: np.random.Generator, chest: Chest) -> None:
    """Lung markings that run outwards from the root of each lung and around nodules in front of or behind them."""
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
        changes: The change of each finding (one of `CHANGES`), by its index in the list.
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


def find_boxes(chest: Chest, findings: list[Finding]) -> list[tuple[Finding, tuple[float, float, float, float]]]:
    """Bounding boxes of all findings in fractions of the picture; exact for nodules, to 4 mm for the others."""
    boxes = []
    for finding in findings:
        if finding.kind == "nodule":
            (x, _, z), r = finding.center, finding.extent
            left, top, right, bottom = x - r, z - r, x + r, z + r
            box = (left / anatomy.WIDTH, top / anatomy.HEIGHT, right / anatomy.WIDTH, bottom / anatomy.HEIGHT)
            xyxy = tuple(min(max(v + 0.5, 0.0), 1.0) for v in box)
        else:
            mask = _outline(chest, finding, (_BOX_GRID, _BOX_GRID))
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            xyxy = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            xyxy = tuple(float(v) / _BOX_GRID for v in xyxy)
        boxes.append((finding, xyxy))
    return boxes
