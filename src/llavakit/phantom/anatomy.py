"""Anatomy and physics of the thorax world: geometry of the chest, CT volumes and radiographs.

One description of a chest yields both its CT volume and its radiograph. All parts are ellipsoids with one axis along
the depth direction, or regions bounded by curves in the frontal plane. A ray parallel to the depth axis therefore meets
each part in one interval with a closed form, and the radiograph needs no voxels: `line_integrals`
adds interval lengths, `volume` fills a grid by the same rules, and the two agree up to the size of a voxel.

Coordinates are millimetres from the centre of the chest: x towards the patient's left, y towards the back, z
downwards. Images follow the radiological convention: the patient's right is at the left edge of the image.

This module draws no random numbers, and knows nothing of questions, reports and files.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np

WIDTH, DEPTH, HEIGHT = 340.0, 240.0, 340.0
"""Field of view in mm along x, y, z."""

AIR, LUNG, FLUID, SOFT, SOLID, PATCH, VESSEL = -1000.0, -770.0, 15.0, 40.0, 80.0, -60.0, 40.0
"""Hounsfield units: outside and pneumothorax, aerated lung, effusion, soft tissue, nodule, consolidation, vessel."""

BONE = 600.0
"""Hounsfield units that bone has above the soft tissue around it."""

MU_WATER = 0.0206
"""Attenuation of water per mm at about 60 keV."""

MENISCUS = 14.0
"""How much higher the surface of an effusion is at the edge of the lung than at its middle, in mm."""

SIDES = ("right", "left")


@dataclass(frozen=True, slots=True)
class Ellipsoid:
    """Centre and semi-axes in mm; `tilt` turns it about the depth axis, in radians.

    Numbers are Python floats: NumPy scalars would turn every float32 grid into float64.
    """

    center: tuple[float, float, float]
    axes: tuple[float, float, float]
    tilt: float = 0.0

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in the frontal plane."""
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        half_x = math.hypot(self.axes[0] * c, self.axes[2] * s)
        half_z = math.hypot(self.axes[0] * s, self.axes[2] * c)
        return self.center[0] - half_x, self.center[2] - half_z, self.center[0] + half_x, self.center[2] + half_z

    def half_depth(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Half the length of a ray inside, by position in the frontal plane; 0 where it misses. Broadcasts x and z."""
        a, b, c = self.axes
        dx, dz = x - self.center[0], z - self.center[2]
        if self.tilt:
            # As a quadratic form, so that only the mixed term costs two-dimensional products.
            cos, sin = math.cos(self.tilt), math.sin(self.tilt)
            p, r = cos * cos / (a * a) + sin * sin / (c * c), sin * sin / (a * a) + cos * cos / (c * c)
            rest = (1.0 - p * dx**2) - r * dz**2
            rest -= dx * ((2.0 * sin * cos * (1.0 / (a * a) - 1.0 / (c * c))) * dz)
        else:
            rest = (1.0 - (dx * (1.0 / a)) ** 2) - (dz * (1.0 / c)) ** 2
        np.maximum(rest, 0.0, out=rest)
        np.sqrt(rest, out=rest)
        rest *= b
        return rest

    def span(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Depths at which rays enter and leave; equal where they miss."""
        half = self.half_depth(x, z)
        return self.center[1] - half, self.center[1] + half

    def contains(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Whether points are inside. Broadcasts."""
        half = self.half_depth(x, z)
        return (np.abs(y - self.center[1]) < half) & (half > 0)

    def mirrored(self) -> Ellipsoid:
        """The ellipsoid with front and back exchanged."""
        return Ellipsoid((self.center[0], -self.center[1], self.center[2]), self.axes, self.tilt)


@dataclass(slots=True)
class Lung:
    """One lung: an ellipsoid cut off below by the dome of the diaphragm, with its contents.

    Attributes:
        outer: The chest cavity of this side.
        inner: The aerated lung; smaller than `outer` when air (pneumothorax) has entered between the two.
        dome: Height of the diaphragm at its top, z in mm.
        slope: How much the diaphragm falls from its top to the edge of the lung, in mm.
        fluid: z of the surface of an effusion at the middle of the lung, or None.
        patch: A consolidation, or None.
        nodules: Solid nodules.
        vessels: Lung markings.
    """

    outer: Ellipsoid
    inner: Ellipsoid
    dome: float
    slope: float
    fluid: float | None = None
    patch: Ellipsoid | None = None
    nodules: list[Ellipsoid] = field(default_factory=list)
    vessels: list[Ellipsoid] = field(default_factory=list)

    def floor(self, x: np.ndarray) -> np.ndarray:
        """z of the diaphragm."""
        return self.dome + self.slope * ((x - self.outer.center[0]) / self.outer.axes[0]) ** 2

    def surface(self, x: np.ndarray) -> np.ndarray:
        """z of the surface of the effusion: a meniscus that rises towards the chest wall."""
        return self.fluid - MENISCUS * ((x - self.outer.center[0]) / self.outer.axes[0]) ** 2


@dataclass(slots=True)
class Chest:
    """All parts of a chest that attenuate rays.

    Attributes:
        body: Semi-axes (x, y) of the trunk in mm.
        lungs: Right and left lung by side.
        heart: Heart and aortic knob; they push the lungs aside.
        bones: Spine and clavicles; denser than the tissue around them.
        cage: Outer and inner surface of the rib cage.
        ribs: z at the middle of each rib.
        trachea: The windpipe.
        mirrored: Whether front and back are exchanged.
    """

    body: tuple[float, float]
    lungs: dict[str, Lung]
    heart: list[Ellipsoid]
    bones: list[Ellipsoid]
    cage: tuple[Ellipsoid, Ellipsoid]
    ribs: list[float]
    trachea: Ellipsoid
    mirrored: bool = False


RIB_HALF_HEIGHT = 4.5
_RIB_SLOPES = (0.12, 0.42)
"""Slopes of the back and the front arcs of the ribs, downwards from the spine."""


@functools.lru_cache(maxsize=64)
def axis(count: int, extent: float) -> np.ndarray:
    """Centres of `count` cells that fill `extent` mm around 0, float32, read-only."""
    cells = ((np.arange(count, dtype=np.float32) + 0.5) / count - 0.5) * np.float32(extent)
    cells.flags.writeable = False
    return cells


def _trunk(chest: Chest, z: np.ndarray) -> np.ndarray:
    """Half width of the trunk: narrower towards the neck."""
    return chest.body[0] * np.clip(1.0 - ((-87.0 - z) / 110.0).clip(0.0) ** 2, 0.35, 1.0)


def _coverage(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Share of a pixel on the positive side of an edge at `distance` mm."""
    return np.clip(distance / pixel + 0.5, 0.0, 1.0)


def _rib_bands(chest: Chest, x: np.ndarray, z: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of each pixel covered by ribs of the back and of the front."""
    bands = []
    first, step = chest.ribs[0], chest.ribs[1] - chest.ribs[0]
    for slope in _RIB_SLOPES:
        level = (z - slope * np.abs(x) - first) / step
        number = np.clip(np.rint(level), 0, len(chest.ribs) - 1)
        bands.append(_coverage(RIB_HALF_HEIGHT - np.abs(level - number) * step, pixel))
    return bands[0], bands[1]


def _overlap(*spans: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Length of the intersection of several intervals."""
    low, high = spans[0]
    for other_low, other_high in spans[1:]:
        low, high = np.maximum(low, other_low), np.minimum(high, other_high)
    return np.maximum(high - low, 0.0)


class _Window:
    """The part of an image that a shape can touch, sampled several times per pixel where the shape is small."""

    def __init__(self, bounds: tuple[float, float, float, float], size: tuple[int, int], fineness: float) -> None:
        rows, columns = size
        px, pz = WIDTH / columns, HEIGHT / rows
        self.left = min(max(int((bounds[0] + WIDTH / 2) / px), 0), columns - 1)
        self.right = min(max(int((bounds[2] + WIDTH / 2) / px) + 1, self.left + 1), columns)
        self.top = min(max(int((bounds[1] + HEIGHT / 2) / pz), 0), rows - 1)
        self.bottom = min(max(int((bounds[3] + HEIGHT / 2) / pz) + 1, self.top + 1), rows)
        self.factor = f = max(1, math.ceil(pz / fineness))
        self.shape = (self.bottom - self.top, f, self.right - self.left, f)
        self.z = axis(rows * f, HEIGHT)[self.top * f : self.bottom * f, None]
        self.x = axis(columns * f, WIDTH)[None, self.left * f : self.right * f]
        self.pixel = pz / f

    @property
    def place(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Pixel means of values on the fine grid."""
        if self.factor == 1:
            return values
        return np.einsum("afbg->ab", values.reshape(self.shape)) * np.float32(1.0 / self.factor**2)


def attenuation(hounsfield: float | np.ndarray) -> float | np.ndarray:
    """Linear attenuation per mm of a tissue with these Hounsfield units."""
    return MU_WATER * (1.0 + hounsfield / 1000.0)


def line_integrals(chest: Chest, size: tuple[int, int]) -> np.ndarray:
    """Attenuation summed along the depth, from interval lengths.

    Returns:
        Float32 `[rows, columns]`, the mean over the area of each pixel for small parts and the value at its centre
        for large ones.
    """
    rows, columns = size
    z, x = axis(rows, HEIGHT)[:, None], axis(columns, WIDTH)[None, :]
    pixel = HEIGHT / rows
    half = _trunk(chest, z)
    body = 2.0 * chest.body[1] * np.sqrt(np.maximum(1.0 - (x / half) ** 2, 0.0))
    total = (body * attenuation(SOFT)).astype(np.float32)

    outer, inner = (surface.half_depth(x, z) for surface in chest.cage)
    back, front = _rib_bands(chest, x, z, pixel)
    total += (back + front) * (outer - inner) * (MU_WATER * BONE / 1000.0)
    for bone in chest.bones:
        window = _Window(bone.bounds(), size, 3.0)
        length = window.mean(2.0 * bone.half_depth(window.x, window.z))
        total[window.place] += length * (MU_WATER * BONE / 1000.0)
    window = _Window(chest.trachea.bounds(), size, 2.0)
    total[window.place] += window.mean(2.0 * chest.trachea.half_depth(window.x, window.z)) * (
        attenuation(AIR) - attenuation(SOFT)
    )
    for lung in chest.lungs.values():
        _add_lung(total, chest, lung, size)
    return total


def _add_lung(total: np.ndarray, chest: Chest, lung: Lung, size: tuple[int, int]) -> None:
    """Replace soft tissue by the contents of one lung, in place."""
    window = _Window(lung.outer.bounds(), size, 1e9)
    x, z = window.x, window.z
    outer, inner = lung.outer.span(x, z), lung.inner.span(x, z)
    heart = [part.span(x, z) for part in chest.heart]
    collapsed = lung.inner is not lung.outer
    free = _overlap(outer) - _heart_overlap(outer, heart)
    aerated = _overlap(outer, inner) - _heart_overlap(outer, heart, inner) if collapsed else free
    air = attenuation(AIR) - attenuation(SOFT)
    tissue = attenuation(LUNG) - attenuation(SOFT)
    dry = free * air + aerated * (tissue - air)
    if lung.patch is not None:
        patch = lung.patch.span(x, z)
        dry += (_overlap(outer, inner, patch) - _heart_overlap(outer, heart, inner, patch)) * (
            attenuation(PATCH) - attenuation(LUNG)
        )
    above = _coverage(lung.floor(x) - z, window.pixel)
    if lung.fluid is not None:
        clear = np.minimum(_coverage(lung.surface(x) - z, window.pixel), above)
        total[window.place] += clear * dry + (above - clear) * free * (attenuation(FLUID) - attenuation(SOFT))
    else:
        total[window.place] += above * dry
    for parts, hounsfield in ((lung.vessels, VESSEL), (lung.nodules, SOLID)):
        for part in parts:
            _add_small(total, chest, lung, part, size, attenuation(hounsfield) - attenuation(LUNG))


def _add_small(
    total: np.ndarray, chest: Chest, lung: Lung, part: Ellipsoid, size: tuple[int, int], contrast: float
) -> None:
    """Add a nodule or vessel in aerated lung, in place.

    Parts never leave the chest cavity sideways. Other parts that can hide them are considered only where they can.
    """
    bounds = part.bounds()
    window = _Window(bounds, size, max(1.5, part.axes[2]))
    x, z = window.x, window.z
    span = part.span(x, z)
    inside = () if lung.inner is lung.outer else (lung.inner.span(x, z),)
    length = _overlap(span, *inside)
    heart = [p.span(x, z) for p in chest.heart if _meets(p.bounds(), bounds)]
    if heart:
        length = length - _heart_overlap(span, heart, *inside)
    if lung.patch is not None and _meets(lung.patch.bounds(), bounds):
        patch = lung.patch.span(x, z)
        length = length - _overlap(span, patch, *inside)
        if heart:
            length = length + _heart_overlap(span, heart, patch, *inside)
    if bounds[3] > lung.dome:
        length = length * _coverage(lung.floor(x) - z, window.pixel)
    if lung.fluid is not None and bounds[3] > lung.fluid - MENISCUS:
        length = length * _coverage(lung.surface(x) - z, window.pixel)
    total[window.place] += window.mean(length) * contrast


def _meets(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _heart_overlap(
    span: tuple[np.ndarray, np.ndarray], heart: list[tuple[np.ndarray, np.ndarray]], *others: tuple
) -> np.ndarray:
    """Length of a span (within the other spans) inside heart and aorta, which never overlap each other."""
    return sum(_overlap(span, part, *others) for part in heart)


def volume(chest: Chest, grid: tuple[int, int, int]) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The CT volume of a chest.

    Args:
        grid: Slices (top to bottom), rows (front to back), columns (patient's right to left).

    Returns:
        Int16 `[slices, rows, columns]` in Hounsfield units and the size of a voxel in mm along each axis.
    """
    slices, rows, columns = grid
    z = axis(slices, HEIGHT)[:, None, None]
    y = axis(rows, DEPTH)[None, :, None]
    x = axis(columns, WIDTH)[None, None, :]
    spacing = (HEIGHT / slices, DEPTH / rows, WIDTH / columns)
    out = np.full(grid, AIR, np.float32)
    out[(x / _trunk(chest, z)) ** 2 + (y / chest.body[1]) ** 2 < 1.0] = SOFT
    out[chest.trachea.contains(x, y, z)] = AIR
    for lung in chest.lungs.values():
        place = _voxels(lung.outer, grid)
        _fill_lung(out[place], chest, lung, x[:, :, place[2]], y[:, place[1]], z[place[0]])
    back, front = _rib_bands(chest, x, z, 1e-3)
    shell = chest.cage[0].contains(x, y, z) & ~chest.cage[1].contains(x, y, z)
    behind = y < 0 if chest.mirrored else y >= 0
    out += (shell * np.where(behind, back, front)) * np.float32(BONE)
    for bone in chest.bones:
        place = _voxels(bone, grid)
        out[place] += bone.contains(x[:, :, place[2]], y[:, place[1]], z[place[0]]) * np.float32(BONE)
    return np.rint(out).astype(np.int16), spacing


def _voxels(part: Ellipsoid, grid: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    """The block of the grid that a part can touch."""
    left, top, right, bottom = part.bounds()
    ranges = ((top, bottom, HEIGHT), (part.center[1] - part.axes[1], part.center[1] + part.axes[1], DEPTH))
    block = []
    for (low, high, extent), count in zip((*ranges, (left, right, WIDTH)), grid, strict=True):
        first = int(np.floor((low / extent + 0.5) * count))
        last = int(np.ceil((high / extent + 0.5) * count))
        block.append(slice(max(first, 0), min(max(last, 0), count)))
    return block[0], block[1], block[2]


def _fill_lung(out: np.ndarray, chest: Chest, lung: Lung, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    """Write one lung into the block of the volume around it, in place."""
    cavity = lung.outer.contains(x, y, z) & (z < lung.floor(x))
    for part in chest.heart:
        cavity &= ~part.contains(x, y, z)
    dry = cavity if lung.fluid is None else cavity & (z < lung.surface(x))
    out[cavity] = FLUID
    out[dry] = AIR
    lung_tissue = dry & lung.inner.contains(x, y, z)
    out[lung_tissue] = LUNG
    for vessel in lung.vessels:
        out[lung_tissue & vessel.contains(x, y, z)] = VESSEL
    if lung.patch is not None:
        out[lung_tissue & lung.patch.contains(x, y, z)] = PATCH
    for nodule in lung.nodules:
        out[lung_tissue & nodule.contains(x, y, z)] = SOLID


def project(hounsfield: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Attenuation summed along the depth of a volume `[slices, rows, columns]`: float32 `[slices, columns]`."""
    return attenuation(hounsfield.astype(np.float32)).sum(axis=1) * np.float32(spacing[1])


EXPOSURE = 4000.0
"""Photons per pixel in open air, the same at every matrix size: the noise of a pixel does not depend on its size."""

READ_NOISE = 2.0
"""Standard deviation of the detector's own noise, in photons."""

FILM_BASE, FILM_LATITUDE = 0.7, 1.5
"""Line integral shown as black, and the one over which brightness rises by 63 % of the remaining range."""


def expose(integrals: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """The radiograph of line integrals by Beer-Lambert's law: uint8 of the same shape, dense tissue bright.

    Brightness flattens out towards dense tissue, as film does, which leaves most grey levels to the lungs.

    Args:
        rng: Source of photon and detector noise; None for a radiograph without noise.
    """
    photons = np.float32(EXPOSURE) * np.exp(-integrals)
    if rng is not None:
        sigma = np.sqrt(photons + np.float32(READ_NOISE**2))
        photons = photons + sigma * rng.standard_normal(integrals.shape, dtype=np.float32)
    # 1 - exp(-(L - base) / latitude) for line integral L, written without the logarithm.
    density = (np.maximum(photons, 0.0) * np.float32(np.exp(FILM_BASE) / EXPOSURE)) ** np.float32(1.0 / FILM_LATITUDE)
    return np.rint(np.clip(255.0 - 255.0 * density, 0.0, 255.0)).astype(np.uint8)


def mirror_depth(chest: Chest) -> Chest:
    """The chest with front and back exchanged: another volume, but the same radiograph."""

    def flip(parts: list[Ellipsoid]) -> list[Ellipsoid]:
        return [part.mirrored() for part in parts]

    lungs = {}
    for side, lung in chest.lungs.items():
        outer = lung.outer.mirrored()
        lungs[side] = Lung(
            outer=outer,
            inner=outer if lung.inner is lung.outer else lung.inner.mirrored(),
            dome=lung.dome,
            slope=lung.slope,
            fluid=lung.fluid,
            patch=None if lung.patch is None else lung.patch.mirrored(),
            nodules=flip(lung.nodules),
            vessels=flip(lung.vessels),
        )
    return Chest(
        body=chest.body,
        lungs=lungs,
        heart=flip(chest.heart),
        bones=flip(chest.bones),
        cage=(chest.cage[0].mirrored(), chest.cage[1].mirrored()),
        ribs=chest.ribs,
        trachea=chest.trachea.mirrored(),
        mirrored=not chest.mirrored,
    )
