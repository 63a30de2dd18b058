from __future__ import annotations

import copy
import pickle
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from rae_scale.data.shapes.prompts import COLORS, HELD_OUT, TASKS, Prompt
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.world import (
    HALF_EXTENT,
    SEED_LIMIT,
    Object,
    Scene,
    WorldConfig,
    check_seed,
    evaluation_seed,
    sample_scene,
    scene_of,
)

CONFIG = WorldConfig()


def stream(count: int, task: str | None = None, config: WorldConfig = CONFIG) -> list[Scene]:
    return [sample_scene(3, index, config, task) for index in range(count)]


def box(item: Object) -> tuple[float, float, float, float]:
    extent_x, extent_y = HALF_EXTENT[item.shape]
    return (
        item.cx - extent_x * item.r,
        item.cy - extent_y * item.r,
        item.cx + extent_x * item.r,
        item.cy + extent_y * item.r,
    )


def test_a_scene_is_a_function_of_seed_and_index_alone() -> None:
    forwards = [sample_scene(5, index) for index in range(50)]
    backwards = [sample_scene(5, index) for index in reversed(range(50))][::-1]
    assert forwards == backwards
    assert forwards != [sample_scene(6, index) for index in range(50)]
    assert len({scene.objects for scene in forwards}) == 50


def test_scenes_stay_what_they_were() -> None:
    """Shipped weights and scores name their data by seed: these numbers may not change."""
    scene = sample_scene(0, 1)
    assert scene.caption == "a photo of a yellow cross and a pink ring"
    assert scene.objects == (Object("cross", "yellow", 16, 34, 11), Object("ring", "pink", 48, 32, 11))
    assert scene.background == pytest.approx(0.9537319234957599, rel=1e-12)
    assert int(render(scene).astype(np.int64).sum()) == 2867720


def test_held_out_pairs_are_never_drawn_in_the_stream() -> None:
    scenes = stream(3000)
    drawn = {(item.shape, item.color) for scene in scenes for item in scene.objects}
    assert not drawn & CONFIG.held_out
    assert len(drawn) == 5 * len(COLORS) - len(CONFIG.held_out)  # and every other pair is
    assert not any(f"{color} {shape}" in scene.caption for scene in scenes for shape, color in CONFIG.held_out)


def test_held_out_scenes_show_exactly_one_held_out_pair() -> None:
    for scene in stream(200, HELD_OUT):
        assert sum((item.shape, item.color) in CONFIG.held_out for item in scene.objects) == 1


LARGEST = {"radius_one": (12.0, 27.0), "radius_two": (9.0, 12.7), "radius_grid": (8.0, 12.7), "jitter_one": 30.0}


@pytest.mark.parametrize("changes", [{}, {"size": 96}, {"lattice": 0.01}, {**LARGEST, "lattice": 0.1}])
@pytest.mark.parametrize("task", [*TASKS, HELD_OUT])
def test_shapes_stay_on_the_canvas_and_apart(task: str, changes: dict) -> None:
    config = WorldConfig(**changes)
    size = config.size
    for scene in stream(60, task, config):
        boxes = [box(item) for item in scene.objects]
        assert min(min(sides) for sides in boxes) >= 0
        assert max(max(sides) for sides in boxes) <= size
        for a, b in combinations(boxes, 2):
            gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
            assert gap >= 4 * size / 64 - 1e-9


@pytest.mark.parametrize("task", [*TASKS, HELD_OUT])
def test_a_scene_shows_what_its_caption_says(task: str) -> None:
    for scene in stream(100, task):
        assert scene.tag == task
        for item, (shape, color) in zip(scene.objects, scene.prompt.objects, strict=True):
            assert item.shape == shape
            assert color in (None, item.color)


def test_position_scenes_obey_their_relation() -> None:
    seen = set()
    for scene in stream(100, "position"):
        first, second = scene.objects
        dx, dy = first.cx - second.cx, first.cy - second.cy
        holds = {"left of": dx < -18, "right of": dx > 18, "above": dy < -18, "below": dy > 18}
        assert [relation for relation, true in holds.items() if true] == [scene.prompt.relation]
        seen.add(scene.prompt.relation)
    assert len(seen) == 4


@pytest.mark.parametrize("task", ["two_object", "color_attr"])
def test_the_caption_does_not_give_away_the_arrangement(task: str) -> None:
    sides: Counter[str] = Counter()
    for scene in stream(400, task):
        first, second = scene.objects
        dx, dy = second.cx - first.cx, second.cy - first.cy
        sides[("x+" if dx > 0 else "x-") if abs(dx) > abs(dy) else ("y+" if dy > 0 else "y-")] += 1
    assert len(sides) == 4
    assert min(sides.values()) > 70


@pytest.mark.parametrize("task", TASKS)
def test_radii_and_places_lie_on_the_lattice(task: str) -> None:
    for scene in stream(50, task):
        for item in scene.objects:
            assert {item.cx % 2, item.cy % 2} == {0.0}
            assert item.r in (9, 11, 13, 15)


def test_every_lattice_point_is_as_likely() -> None:
    places = Counter((scene.objects[0].cx, scene.objects[0].cy) for scene in stream(2000, "colors"))
    assert {x for x, _ in places} == {y for _, y in places} == {28.0, 30.0, 32.0, 34.0, 36.0}
    assert len(places) == 25
    assert 40 < min(places.values()) <= max(places.values()) < 130


def test_counted_objects_share_one_color() -> None:
    scenes = stream(200, "counting")
    assert all(len({item.color for item in scene.objects}) == 1 for scene in scenes)
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4}


def test_task_weights_shape_the_stream() -> None:
    tags = Counter(scene.tag for scene in stream(2000))
    assert tags["single_object"] / 2000 == pytest.approx(0.1, abs=0.025)
    assert tags["position"] / 2000 == pytest.approx(0.2, abs=0.03)
    only = WorldConfig(task_weights={"colors": 1.0, "counting": 0.0})
    assert {scene.tag for scene in stream(50, config=only)} == {"colors"}


def test_scene_of_fixes_the_prompt_and_leaves_the_rest_open() -> None:
    prompt = Prompt("two_object", (("circle", None), ("ring", None)))
    scenes = [scene_of(prompt, 1, index) for index in range(20)]
    assert {scene.caption for scene in scenes} == {"a photo of a circle and a ring"}
    assert len({scene.objects for scene in scenes}) == 20


def test_size_scales_a_scene() -> None:
    small, large = sample_scene(1, 4, WorldConfig(size=64)), sample_scene(1, 4, WorldConfig(size=128))
    for a, b in zip(small.objects, large.objects, strict=True):
        np.testing.assert_allclose(np.array(a[2:]) * 2, b[2:])


def test_evaluation_seeds_lie_beyond_those_of_training() -> None:
    assert evaluation_seed(0) >= SEED_LIMIT > check_seed(SEED_LIMIT - 1)
    for seed in (-1, SEED_LIMIT):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            check_seed(seed)


def test_config_survives_workers() -> None:
    assert pickle.loads(pickle.dumps(CONFIG)) == CONFIG == copy.deepcopy(CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 16}, "size=16"),
        ({"radius_two": (9.0, 15.0)}, "radius_two"),
        ({"lattice": 0.0}, "lattice=0"),
        ({"held_out": frozenset({("star", "red")})}, "star"),
        ({"held_out": frozenset()}, "held_out=.*must name a pair"),
        ({"held_out": frozenset(("ring", color) for color in COLORS)}, "two colors"),
        ({"task_weights": {"colour": 1.0}}, "'colour'"),
        ({"task_weights": {"colors": 0.0}}, "sum above 0"),
    ],
)
def test_bad_configs_name_the_setting(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldConfig(**change)
