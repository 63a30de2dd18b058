from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from rae_scale.data.shapes.prompts import COLORS, SHAPES, Prompt
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.world import Object, Scene, sample_scene

PROMPT = Prompt("single_object", (("circle", None),))


def draw(shape: str, color: str = "red", r: float = 14.0, size: int = 64, background: float = 0.94) -> np.ndarray:
    return render(Scene(PROMPT, (Object(shape, color, size / 2, size / 2, r),), background, size))


def ink(image: np.ndarray, color: str = "red") -> np.ndarray:
    """Coverage in [0, 1] read back from the channel with the largest contrast."""
    background, target = image[0, 0].astype(float), np.array(COLORS[color], float)
    channel = int(np.abs(background - target).argmax())
    return (background[channel] - image[..., channel]) / (background[channel] - target[channel])


def test_a_picture_is_uint8_on_a_light_background() -> None:
    image = draw("circle")
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [240, 240, 240]


class Expected(NamedTuple):
    area: float  # over r^2
    inside: tuple[tuple[float, float], ...]  # points (x, y) over r
    outside: tuple[tuple[float, float], ...]


EXPECTED = {
    "circle": Expected(3.1416, ((0, 0), (0.6, 0.6), (0, 0.9)), ((0.8, 0.8), (0, 1.1))),
    "square": Expected(3.1684, ((0, 0), (0.8, 0.8), (0.8, -0.8)), ((0.98, 0), (0, 0.98))),
    "triangle": Expected(
        2.09, ((0, 0), (0, -0.75), (0.85, 0.85), (-0.85, 0.85)), ((0.6, -0.6), (-0.6, -0.6), (0, 1.05))
    ),
    "cross": Expected(2.4124, ((0, 0), (0.9, 0), (-0.9, 0), (0, 0.9), (0, -0.9)), ((0.5, 0.5), (-0.5, 0.5), (1.1, 0))),
    "ring": Expected(2.6142, ((0.8, 0), (0, 0.8), (-0.8, 0)), ((0, 0), (0.4, 0), (0, -0.4), (0.85, 0.85))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_what_they_should(shape: str) -> None:
    r = 16.0
    coverage = ink(draw(shape, r=r))
    assert coverage.sum() / r**2 == pytest.approx(EXPECTED[shape].area, rel=0.02)
    for points, value in ((EXPECTED[shape].inside, 1.0), (EXPECTED[shape].outside, 0.0)):
        for x, y in points:
            assert coverage[int(32 + y * r), int(32 + x * r)] == pytest.approx(value, abs=0.02), (x, y)


def test_edges_are_antialiased() -> None:
    coverage = ink(draw("circle", r=13.3))
    assert ((coverage > 0.2) & (coverage < 0.8)).sum() > 20


@pytest.mark.parametrize("color", COLORS)
def test_colors_are_those_of_the_palette(color: str) -> None:
    assert draw("square", color)[32, 32].tolist() == list(COLORS[color])


def test_a_subpixel_shift_moves_the_picture() -> None:
    pictures = [render(Scene(PROMPT, (Object("circle", "red", 32 + dx, 32, 12),), 0.94, 64)) for dx in (0.0, 0.25)]
    x = np.arange(64) + 0.5
    centres = [(ink(picture) * x).sum() / ink(picture).sum() for picture in pictures]
    assert centres[0] == pytest.approx(32, abs=0.02)
    assert centres[1] - centres[0] == pytest.approx(0.25, abs=0.02)


def test_objects_of_a_scene_are_all_drawn() -> None:
    for index in range(20):
        scene = sample_scene(2, index, task="counting")
        image = render(scene)
        for item in scene.objects:
            reach = 0.8 * item.r if item.shape == "ring" else 0.0
            assert image[int(item.cy), int(item.cx + reach)].tolist() == list(COLORS[item.color])
