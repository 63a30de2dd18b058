"""Antialiased rendering of a scene from signed distances: exact, fast and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rae_scale.data.shapes.prompts import COLORS
from rae_scale.data.shapes.world import HALF_EXTENT, Object, Scene

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

RING_HOLE = 0.52  # inner radius of a ring over `r`: still open after a blur
ARM = 0.37  # half the width of a cross's arm over `r`


def _circle(x: Floats, y: Floats, r: float) -> Floats:
    return np.sqrt(x * x + y * y) - r


def _square(x: Floats, y: Floats, r: float) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - HALF_EXTENT["square"][0] * r


def _triangle(x: Floats, y: Floats, r: float) -> Floats:
    half_width, half_height = (extent * r for extent in HALF_EXTENT["triangle"])
    # The slanted side's outward normal is (2h, -w) up to its length: it goes from the top (0, -h) to (w, h).
    length = (4 * half_height**2 + half_width**2) ** 0.5
    side = (2 * half_height * np.abs(x) - half_width * (y + half_height)) / length
    return np.maximum(side, y - half_height)


def _cross(x: Floats, y: Floats, r: float) -> Floats:
    x, y = np.abs(x), np.abs(y)
    arm = ARM * r
    return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))


def _ring(x: Floats, y: Floats, r: float) -> Floats:
    distance = np.sqrt(x * x + y * y)
    return np.maximum(distance - HALF_EXTENT["ring"][0] * r, RING_HOLE * r - distance)


SIGNED_DISTANCE: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


def render(scene: Scene) -> Bytes:
    """Draw a scene: uint8 `[S, S, 3]`, sRGB."""
    canvas = np.full((scene.size, scene.size, 3), scene.background * 255, dtype=np.float32)
    for item in scene.objects:
        _draw(canvas, item)
    return (canvas + 0.5).astype(np.uint8)


def _draw(canvas: Floats, item: Object) -> None:
    size = canvas.shape[0]
    extent_x, extent_y = (extent * item.r + 1 for extent in HALF_EXTENT[item.shape])
    left, right = max(0, int(item.cx - extent_x)), min(size, int(item.cx + extent_x) + 1)
    top, bottom = max(0, int(item.cy - extent_y)), min(size, int(item.cy + extent_y) + 1)
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - item.cx)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - item.cy)
    alpha = np.clip(0.5 - SIGNED_DISTANCE[item.shape](x, y, item.r), 0.0, 1.0)[..., None]
    window = canvas[top:bottom, left:right]
    window += alpha * (np.array(COLORS[item.color], dtype=np.float32) - window)
