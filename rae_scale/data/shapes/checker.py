"""An exact checker of what a picture of the shapes world shows: no weights, no randomness.

`detect` finds objects, `judge` holds them against GenEval metadata, `check` does both. `instrument.py` measures how
far the checker itself can be trusted. The steps that survive JPEG, blur and noise:

1. contrast = distance to the border's median color, less the border's own noise;
2. an object is a connected region above half of its own contrast, taken from the strongest contrast down, so that a
   pale shape next to a dark one keeps its outline;
3. its class is that of the template with the largest soft overlap, out of a bank of all shapes at several blurs, after
   both are brought to the same centroid and area; a region that overlaps no template well is no object;
4. its color is the palette entry nearest in CIELAB to the median of the region's core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rae_scale.data.shapes.prompts import COLORS
from rae_scale.data.shapes.render import SIGNED_DISTANCE, Bytes, Floats

Mask = NDArray[np.bool_]

MIN_CONTRAST = 45.0  # RGB distance to the background; the palest color, pink, has about 130
MIN_AREA = 60  # pixels of 64 x 64: less is a speck; a triangle of radius 8 covers 134
MAX_OBJECTS = 16  # GenEval's limit per class
MIN_OVERLAP = 0.65  # clean shapes reach 0.92; those warped by 1 px but still told apart by eye, 0.65
POSITION_THRESHOLD = 0.1  # GenEval: share of the two objects' sizes that does not count as an offset

# Templates live on a grid whose unit is the square root of the region's area, centred on its centroid.
GRID_POINTS = 32
GRID_REACH = 1.15
TEMPLATE_RADIUS = 16.0
TEMPLATE_BLURS = (0.04, 0.10, 0.17, 0.25)  # Gaussian sd over the shape's radius; a clean picture is smoothed to 0.07

_NEIGHBOURS = ndimage.generate_binary_structure(2, 1)
_BINOMIAL = (0.25, 0.5, 0.25)


@dataclass(frozen=True)
class Detection:
    """One object: `box` is (left, top, right, bottom) in pixels, `score` the overlap with its template in [0, 1]."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class Verdict(NamedTuple):
    correct: bool
    reason: str  # empty when correct


def check(image: Bytes, metadata: Mapping[str, Any]) -> Verdict:
    """Does the picture (uint8 `[S, S, 3]`) show what the metadata asks for?"""
    return judge(detect(image), metadata)


def detect(image: Bytes) -> list[Detection]:
    """Objects of a picture (uint8 `[S, S, 3]`), the most certain first.

    Raises:
        ValueError: not a square uint8 RGB picture of at least 32 pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.shape[0] == image.shape[1] >= 32:
        raise ValueError(
            f"the checker got {image.dtype} {list(image.shape)}; give it uint8 [S, S, 3], square, 32 pixels or more"
        )
    unit = image.shape[0] / 64
    smooth = _smooth(image.astype(np.float32))
    contrast = _contrast(smooth)
    found: list[Detection] = []
    # Opening keeps specks thinner than 3 pixels from setting the level of the shape on which they lie.
    peaks = ndimage.grey_opening(contrast, size=(3, 3))
    while len(found) < MAX_OBJECTS:
        start = np.unravel_index(int(peaks.argmax()), peaks.shape)
        if peaks[start] < MIN_CONTRAST:
            break
        region, level = _grow(contrast, start)
        # The margin takes the blurred edge along, else its outer half would be searched as a ring of pale pieces.
        claimed = ndimage.binary_dilation(region, _NEIGHBOURS, iterations=max(2, round(3 * unit)))
        if region.sum() >= MIN_AREA * unit**2:
            soft = np.where(claimed, np.minimum(contrast / level, 1.0), 0.0)
            detection = _describe(smooth, soft, region)
            if detection.score >= MIN_OVERLAP:
                found.append(detection)
        contrast[claimed] = peaks[claimed] = 0.0
    return sorted(found, key=lambda item: -item.score)


def _smooth(pixels: Floats) -> Floats:
    """Binomial 3 x 3 filter: takes noise down without moving an edge."""
    rows = ndimage.correlate1d(pixels, _BINOMIAL, axis=0, mode="nearest")
    return ndimage.correlate1d(rows, _BINOMIAL, axis=1, mode="nearest")


def _contrast(smooth: Floats) -> Floats:
    frame = _frame(smooth)
    background = np.median(frame, axis=0)
    noise = np.median(np.linalg.norm(frame - background, axis=-1))
    return np.maximum(np.sqrt(((smooth - background) ** 2).sum(axis=-1)) - noise, 0.0)


def _frame(smooth: Floats) -> Floats:
    """Pixels of the outermost band, `[N, 3]`."""
    width = smooth.shape[0] // 16
    sides = (smooth[:width], smooth[-width:], smooth[width:-width, :width], smooth[width:-width, -width:])
    return np.concatenate([side.reshape(-1, 3) for side in sides])


def _grow(contrast: Floats, start: tuple[Any, ...]) -> tuple[Mask, float]:
    """The connected region around `start` above half of its level, and that level.

    The level is the region's 85th percentile: a blurred ring or cross reaches full contrast in few places, and a speck
    inside a shape must not count. The first region takes its level from the peak alone.
    """
    level = float(contrast[start])
    region = _component(contrast > level / 2, start)
    values = np.sort(contrast[region])
    level = min(float(values[int(0.85 * len(values))]), level)
    return _component(contrast > level / 2, start), level


def _component(mask: Mask, start: tuple[Any, ...]) -> Mask:
    labels, _ = ndimage.label(mask, structure=_NEIGHBOURS)
    return labels == labels[start]


def _describe(smooth: Floats, soft: Floats, region: Mask) -> Detection:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    core = region & (soft > 0.8)
    color = nearest_color(np.median(smooth[core if core.any() else region], axis=0))
    shape, score = _classify(soft)
    return Detection(shape, color, box, score)


def _classify(soft: Floats) -> tuple[str, float]:
    """The best template's shape and its soft intersection over union with `soft`, a region's coverage `[S, S]`."""
    shapes, bank = _template_bank()
    observed = _normalise(soft)
    both = np.minimum(bank, observed).sum(axis=(1, 2))
    overlap = both / (bank.sum(axis=(1, 2)) + observed.sum() - both)
    best = int(overlap.argmax())
    return shapes[best], float(overlap[best])


@lru_cache(maxsize=1)
def _template_bank() -> tuple[list[str], Floats]:
    """Shape names `[N]` and normalised coverage `[N, P, P]` of each shape at each blur."""
    offsets = np.arange(64, dtype=np.float32) - 31.5
    shapes, templates = [], []
    for shape, signed_distance in SIGNED_DISTANCE.items():
        sharp = np.clip(0.5 - signed_distance(offsets[None, :], offsets[:, None], TEMPLATE_RADIUS), 0.0, 1.0)
        for blur in TEMPLATE_BLURS:
            blurred = ndimage.gaussian_filter(sharp, blur * TEMPLATE_RADIUS)
            start = np.unravel_index(int(blurred.argmax()), blurred.shape)
            region, level = _grow(blurred, start)
            claimed = ndimage.binary_dilation(region, _NEIGHBOURS, iterations=4)
            shapes.append(shape)
            templates.append(_normalise(np.where(claimed, np.minimum(blurred / level, 1.0), 0.0)))
    return shapes, np.stack(templates)


def _normalise(soft: Floats) -> Floats:
    """Resample coverage `[S, S]` to `[P, P]` with its centroid in the middle and the root of its area as the unit."""
    rows, columns = soft.sum(axis=1), soft.sum(axis=0)
    area = rows.sum()
    positions = np.arange(soft.shape[0])
    grid = np.linspace(-GRID_REACH, GRID_REACH, GRID_POINTS) * area**0.5
    y = grid + (rows * positions).sum() / area
    x = grid + (columns * positions).sum() / area
    return ndimage.map_coordinates(soft, np.broadcast_arrays(y[:, None], x[None, :]), order=1)


def nearest_color(rgb: Floats) -> str:
    """Palette name nearest to an sRGB color in [0, 255], by CIELAB distance."""
    distance = np.linalg.norm(_PALETTE_LAB - to_lab(np.asarray(rgb, dtype=np.float64)), axis=-1)
    return list(COLORS)[int(distance.argmin())]


def to_lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB (D65) of sRGB `[..., 3]` in [0, 255]."""
    value = rgb / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = linear @ _SRGB_TO_XYZ.T / _WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])
_PALETTE_LAB = to_lab(np.array(list(COLORS.values()), dtype=np.float64))


def judge(detections: list[Detection], metadata: Mapping[str, Any]) -> Verdict:
    """GenEval's verdict (`evaluate_images.py`): all include clauses hold, on the most certain objects of each class,
    and no exclude clause does."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", []):
        shape, count = clause["class"], clause["count"]
        objects = [item for item in detections if item.shape == shape][:count]
        problem = _clause_problem(clause, objects, groups)
        reasons += [problem] if problem else []
        groups.append(None if problem else objects)
    for clause in metadata.get("exclude", []):
        shape, count = clause["class"], clause["count"]
        number = sum(item.shape == shape for item in detections)
        if number >= count:
            reasons.append(f"expected {shape}<{count}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _clause_problem(clause: Mapping[str, Any], objects: list[Detection], groups: list[list[Detection] | None]) -> str:
    shape, count = clause["class"], clause["count"]
    if len(objects) < count:
        return f"expected {shape}>={count}, found {len(objects)}"
    if "color" in clause:
        colors = [item.color for item in objects]
        if colors.count(clause["color"]) < count:
            return f"expected {clause['color']} {shape}>={count}, found {', '.join(colors)}"
    if "position" in clause:
        expected, target = clause["position"]
        targets = groups[target]
        if targets is None:
            return f"no target for {shape} to be {expected}"
        for item in objects:
            for other in targets:
                relations = relative_position(item, other)
                if expected not in relations:
                    seen = " and ".join(sorted(relations)) or "on no clear side of"
                    return f"expected {shape} {expected} target, found {seen} target"
    return ""


def relative_position(item: Detection, other: Detection) -> set[str]:
    """GenEval's relations of `item` to `other`: the offset less a tenth of both sizes, by direction."""
    offset = np.subtract(item.center, other.center)
    sizes = np.array([[b[2] - b[0], b[3] - b[1]] for b in (item.box, other.box)]).sum(axis=0)
    revised = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}
