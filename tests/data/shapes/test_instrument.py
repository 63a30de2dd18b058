from __future__ import annotations

import pytest

from rae_scale.data.shapes.checker import Detection, detect, judge
from rae_scale.data.shapes.instrument import CONDITIONS, chance_floor, measure_instrument, near_miss
from rae_scale.data.shapes.prompts import HELD_OUT, TASKS, Prompt
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.world import WorldConfig, sample_scene

# Wider ranges and no lattice: a model's pictures do not keep to the one of training.
CONTINUUM = WorldConfig(
    radius_one=(12.0, 17.0),
    radius_two=(9.0, 12.0),
    radius_grid=(8.0, 10.0),
    jitter_one=6.0,
    jitter_two=3.0,
    lattice=0.01,
)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_checker_is_right_on_known_pictures(condition: str) -> None:
    tasks = (*TASKS, HELD_OUT)
    scenes = [sample_scene(11, i, config, task) for task in tasks for config in (None, CONTINUUM) for i in range(12)]
    wrong = []
    for index, scene in enumerate(scenes):
        found = detect(CONDITIONS[condition](render(scene), index))
        if sorted((item.shape, item.color) for item in found) != sorted(item[:2] for item in scene.objects):
            wrong.append((scene.caption, found))
        elif not judge(found, scene.metadata).correct:
            wrong.append((scene.caption, "seen right, judged wrong"))
    assert len(wrong) <= 1, wrong  # of 168: 99.4 %


def test_conditions_do_degrade_and_repeat() -> None:
    image = render(sample_scene(11, 0))
    for condition, degrade in CONDITIONS.items():
        assert (degrade(image, 3) == degrade(image, 3)).all()
        assert (degrade(image, 3) == image).all() == (condition == "clean")


def test_the_report_covers_all_tasks() -> None:
    report = measure_instrument(per_task=5, seed=1)
    assert set(report.accuracy) == set(CONDITIONS)
    for shares in (*report.accuracy.values(), report.near_misses, report.floor):
        assert list(shares) == [*TASKS, HELD_OUT]
    assert min(min(shares.values()) for shares in report.accuracy.values()) == 1.0
    assert set(report.near_misses.values()) == {0.0}
    assert report.to_dict()["pictures_per_task"] == 5
    table = report.table()
    assert all(name in table for name in (*TASKS, HELD_OUT, *CONDITIONS, "floor", "near misses", "1.000"))
    with pytest.raises(ValueError, match="per_task=1"):
        measure_instrument(per_task=1)


def circle(color: str) -> list[Detection]:
    return [Detection("circle", color, (0, 0, 10, 10), 1.0)]


def test_chance_floor_by_hand() -> None:
    red, blue = (Prompt("colors", (("circle", color),)) for color in ("red", "blue"))
    prompts = [red, red, red, blue]  # a picture meets all of them but its own, once
    assert chance_floor([(red, circle("red"))], prompts) == pytest.approx(2 / 3)
    assert chance_floor([(blue, circle("red"))], prompts) == pytest.approx(3 / 3)
    assert chance_floor([(blue, circle("blue"))], prompts) == 0
    assert chance_floor([(red, circle("red")), (blue, circle("blue"))], prompts) == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", [*TASKS, HELD_OUT])
def test_a_near_miss_is_another_prompt_of_the_same_kind(task: str) -> None:
    for index in range(40):
        prompt = sample_scene(2, index, task=task).prompt
        missed = near_miss(prompt, index)
        assert missed.tag == task
        assert missed.caption != prompt.caption
        changed = sum(a != b for a, b in zip(missed.objects, prompt.objects, strict=False))
        assert changed <= (2 if task in ("color_attr", HELD_OUT) else 1)
