"""The checker on pictures drawn by hand with Pillow, not by the renderer that it is built from."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rae_scale.data.shapes.checker import Detection, check, detect, judge, nearest_color, relative_position
from rae_scale.data.shapes.prompts import COLORS, Prompt
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.world import WorldConfig, sample_scene

SCALE = 4


class Canvas:
    """64 x 64 pixels, drawn four times as large and averaged down."""

    def __init__(self, background: tuple[int, int, int] = (238, 238, 238)) -> None:
        self.background = background
        self.image = Image.new("RGB", (64 * SCALE, 64 * SCALE), background)
        self.pen = ImageDraw.Draw(self.image)

    def add(self, shape: str, color: str | tuple[int, int, int], x: float, y: float, r: float) -> Canvas:
        fill = COLORS[color] if isinstance(color, str) else color
        x, y, r = x * SCALE, y * SCALE, r * SCALE
        if shape in ("circle", "ring"):
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if shape == "ring":
            self.pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=self.background)
        if shape == "square":
            self.pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
        if shape == "triangle":
            self.pen.polygon([(x, y - r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], fill=fill)
        if shape == "cross":
            self.pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=fill)
            self.pen.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill=fill)
        return self

    def pixels(self) -> np.ndarray:
        return np.array(self.image.resize((64, 64), Image.Resampling.BOX))


def seen(image: np.ndarray) -> list[tuple[str, str]]:
    return sorted((item.shape, item.color) for item in detect(image))


def ask(tag: str, *objects: tuple[str, str | None], relation: str | None = None) -> dict:
    return Prompt(tag, objects, relation).metadata()


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross", "ring"])
def test_finds_a_hand_drawn_object(shape: str, color: str) -> None:
    for r in (9, 16):
        (found,) = detect(Canvas().add(shape, color, 30, 34, r).pixels())
        assert (found.shape, found.color) == (shape, color)
        assert found.center == pytest.approx((30, 34), abs=1.5)
        assert found.score > 0.85


def test_box_is_the_outline_at_half_contrast() -> None:
    (found,) = detect(Canvas().add("circle", "blue", 30, 34, 12).pixels())
    assert found.box == pytest.approx((18, 22, 42, 46), abs=1.01)


@pytest.mark.parametrize("dark", [(200, 5, 40), "black"])
@pytest.mark.parametrize("pale", ["pink", "yellow"])
def test_a_pale_shape_next_to_a_dark_one_keeps_its_outline(pale: str, dark: str) -> None:
    image = Canvas().add("square", dark, 16, 32, 12).add("ring", pale, 46, 32, 12).pixels()
    ring, square = sorted(detect(image), key=lambda item: item.shape)
    assert (ring.shape, ring.color, square.shape) == ("ring", pale, "square")
    assert ring.box == pytest.approx((34, 20, 58, 44), abs=1.01)


def test_right_pictures_are_accepted() -> None:
    two = Canvas().add("circle", "red", 16, 32, 10).add("square", "blue", 48, 32, 10).pixels()
    assert check(two, ask("color_attr", ("circle", "red"), ("square", "blue"))) == (True, "")
    assert check(two, ask("position", ("circle", None), ("square", None), relation="left of")).correct
    assert check(two, ask("position", ("square", None), ("circle", None), relation="right of")).correct
    assert check(two, ask("two_object", ("square", None), ("circle", None))).correct
    three = Canvas().add("ring", "green", 16, 16, 9).add("ring", "green", 48, 16, 9).add("ring", "green", 16, 48, 9)
    assert check(three.pixels(), ask("counting", *[("ring", None)] * 3)).correct


def test_wrong_shape_is_rejected() -> None:
    image = Canvas().add("circle", "red", 32, 32, 14).pixels()
    assert check(image, ask("single_object", ("ring", None))) == (False, "expected ring>=1, found 0")
    assert not check(image, ask("two_object", ("circle", None), ("cross", None))).correct


def test_wrong_and_swapped_colors_are_rejected() -> None:
    image = Canvas().add("circle", "red", 16, 32, 10).add("square", "blue", 48, 32, 10).pixels()
    swapped = check(image, ask("color_attr", ("circle", "blue"), ("square", "red")))
    assert swapped == (False, "expected blue circle>=1, found red\nexpected red square>=1, found blue")
    assert not check(image, ask("colors", ("circle", "pink"))).correct


@pytest.mark.parametrize("relation", ["right of", "above", "below"])
def test_wrong_side_is_rejected(relation: str) -> None:
    image = Canvas().add("circle", "red", 16, 30, 10).add("square", "blue", 48, 34, 10).pixels()
    verdict = check(image, ask("position", ("circle", None), ("square", None), relation=relation))
    assert verdict == (False, f"expected circle {relation} target, found left of target")


@pytest.mark.parametrize(("wanted", "reason"), [(2, "expected cross<3, found 3"), (4, "expected cross>=4, found 3")])
def test_one_more_or_fewer_is_rejected(wanted: int, reason: str) -> None:
    image = Canvas().add("cross", "red", 16, 16, 9).add("cross", "red", 48, 16, 9).add("cross", "red", 48, 48, 9)
    assert check(image.pixels(), ask("counting", *[("cross", None)] * wanted)) == (False, reason)


def test_specks_are_no_objects_and_change_none() -> None:
    canvas = Canvas().add("square", "pink", 32, 32, 14)
    for x, y, color in ((6, 6, "black"), (58, 9, "green"), (30, 30, "black"), (50, 56, "red")):
        canvas.add("circle", color, x, y, 2.5)
    assert seen(canvas.pixels()) == [("square", "pink")]


def test_scattered_specks_change_nothing() -> None:
    rng = np.random.default_rng(1)
    for index in range(30):
        scene = sample_scene(21, index)
        canvas = Canvas()
        canvas.image = Image.fromarray(render(scene)).resize((64 * SCALE, 64 * SCALE), Image.Resampling.BICUBIC)
        canvas.pen = ImageDraw.Draw(canvas.image)
        for _ in range(6):
            color = tuple(int(value) for value in rng.integers(0, 256, 3))
            canvas.add("circle", color, *rng.uniform(3, 61, 2), rng.uniform(1, 2.5))
        assert seen(canvas.pixels()) == sorted((item.shape, item.color) for item in scene.objects)


def test_strong_noise_leaves_a_margin() -> None:
    """Three times the noise that the instrument is measured with."""
    rng = np.random.default_rng(0)
    wrong = 0
    for index in range(60):
        scene = sample_scene(21, index)
        noisy = np.clip(render(scene) + rng.normal(0, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
        wrong += seen(noisy) != sorted((item.shape, item.color) for item in scene.objects)
    assert wrong <= 1


def test_objects_come_most_certain_first() -> None:
    canvas = Canvas().add("circle", "yellow", 48, 32, 12)
    canvas.pen.ellipse([value * SCALE for value in (8, 18, 24, 46)], fill=COLORS["black"])  # found first, no circle
    scores = [item.score for item in detect(canvas.pixels())]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


def test_blotchy_color_is_read_from_the_core() -> None:
    rng = np.random.default_rng(0)
    image = Canvas().add("circle", "blue", 32, 32, 14).pixels().astype(float)
    image += np.kron(rng.normal(0, 25, (16, 16, 3)), np.ones((4, 4, 1)))
    assert seen(np.clip(image, 0, 255).astype(np.uint8)) == [("circle", "blue")]


def test_a_shapeless_region_is_no_object() -> None:
    image = np.full((64, 64, 3), 238, np.uint8)
    image[28:34, 4:60] = (200, 5, 40)
    assert detect(image) == []


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_has_no_objects(value: int) -> None:
    assert detect(np.full((64, 64, 3), value, np.uint8)) == []


def test_noise_has_no_objects() -> None:
    assert detect(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)) == []


@pytest.mark.parametrize("size", [48, 128])
def test_other_sizes(size: int) -> None:
    config = WorldConfig(size=size)
    for index in range(20):
        scene = sample_scene(8, index, config)
        assert seen(render(scene)) == sorted((item.shape, item.color) for item in scene.objects)


@pytest.mark.parametrize("shape", [(64, 64), (64, 48, 3), (16, 16, 3), (64, 64, 4)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        detect(np.zeros((64, 64, 3), np.float32))


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((230, 30, 30), "red"),
        ((255, 90, 90), "red"),  # orange and purple by distance in RGB, here and below
        ((150, 90, 230), "purple"),
        ((20, 60, 30), "black"),
        ((255, 160, 225), "pink"),
    ],
)
def test_colors_off_the_palette_go_to_the_nearest_name(rgb: tuple[int, int, int], name: str) -> None:
    assert nearest_color(np.array(rgb, np.float32)) == name


# GenEval's rules on hand-made detections.


def thing(
    shape: str, color: str = "red", x: float = 0, y: float = 0, half: float = 10, score: float = 0.9
) -> Detection:
    return Detection(shape, color, (x - half, y - half, x + half, y + half), score)


def test_relations_subtract_a_tenth_of_both_sizes() -> None:
    target = thing("square")
    assert relative_position(thing("circle", x=3.9), target) == set()  # 0.1 * (20 + 20) = 4 is the dead zone
    assert relative_position(thing("circle", x=30, y=4), target) == {"right of"}
    assert relative_position(thing("circle", x=-30, y=30), target) == {"left of", "below"}
    assert relative_position(thing("circle", x=5), target) == set()  # (5 - 4) / 5 is not above 0.5
    assert relative_position(thing("circle", y=-9), target) == {"above"}
    assert relative_position(thing("circle"), target) == set()


def test_more_objects_than_asked_are_fine_without_an_exclude_clause() -> None:
    objects = [thing("circle"), thing("circle", x=30), thing("ring")]
    assert judge(objects, ask("single_object", ("circle", None))).correct
    assert not judge(objects, {"include": [], "exclude": [{"class": "ring", "count": 1}]}).correct


def test_color_is_that_of_the_most_certain_object() -> None:
    objects = [thing("circle", "red", score=0.95), thing("circle", "blue", x=30, score=0.8)]
    assert judge(objects, ask("colors", ("circle", "red"))).correct
    assert not judge(objects, ask("colors", ("circle", "blue"))).correct


def test_each_counted_object_needs_the_color() -> None:
    wanted = {"include": [{"class": "circle", "count": 2, "color": "red"}]}
    assert judge([thing("circle"), thing("circle", x=30)], wanted).correct
    assert judge([thing("circle"), thing("circle", "blue", x=30)], wanted) == (
        False,
        "expected red circle>=2, found red, blue",
    )


def test_position_fails_without_its_target() -> None:
    verdict = judge([thing("circle")], ask("position", ("circle", None), ("square", None), relation="above"))
    assert verdict.reason == "expected square>=1, found 0\nno target for circle to be above"
