from __future__ import annotations

import pytest

from rae_scale.data.shapes.prompts import COLORS, HELD_OUT, SHAPES, TASKS, Prompt, prompts_of

HELD = frozenset({("circle", "purple"), ("square", "orange")})


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        (Prompt("single_object", (("circle", None),)), "a photo of a circle"),
        (Prompt("two_object", (("circle", None), ("square", None))), "a photo of a circle and a square"),
        (Prompt("counting", (("circle", None),) * 3), "a photo of three circles"),
        (Prompt("counting", (("cross", None),) * 2), "a photo of two crosses"),
        (Prompt("colors", (("circle", "red"),)), "a photo of a red circle"),
        (Prompt("colors", (("ring", "orange"),)), "a photo of an orange ring"),
        (
            Prompt("position", (("circle", None), ("square", None)), "left of"),
            "a photo of a circle left of a square",
        ),
        (
            Prompt("color_attr", (("circle", "red"), ("square", "blue"))),
            "a photo of a red circle and a blue square",
        ),
    ],
)
def test_captions_have_the_wording_of_geneval(prompt: Prompt, caption: str) -> None:
    assert prompt.caption == caption
    assert prompt.metadata()["prompt"] == caption
    assert prompt.metadata()["tag"] == prompt.tag


def test_counting_metadata_excludes_one_more() -> None:
    metadata = Prompt("counting", (("ring", None),) * 4).metadata()
    assert metadata["include"] == [{"class": "ring", "count": 4}]
    assert metadata["exclude"] == [{"class": "ring", "count": 5}]


def test_position_metadata_puts_the_reference_first() -> None:
    metadata = Prompt("position", (("circle", None), ("square", None)), "above").metadata()
    assert metadata["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["above", 0]},
    ]


def test_color_metadata_names_each_color() -> None:
    metadata = Prompt("color_attr", (("circle", "red"), ("square", "blue"))).metadata()
    assert metadata["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]


@pytest.mark.parametrize("task", TASKS)
def test_the_six_tasks_name_no_held_out_pair(task: str) -> None:
    prompts = prompts_of(task, HELD)
    assert prompts
    assert len({prompt.caption for prompt in prompts}) == len(prompts)
    assert all(prompt.tag == task for prompt in prompts)
    assert not any(pair in HELD for prompt in prompts for pair in prompt.objects)


def test_every_held_out_prompt_names_exactly_one_held_out_pair() -> None:
    prompts = prompts_of(HELD_OUT, HELD)
    assert {len(prompt.objects) for prompt in prompts} == {1, 2}
    assert all(sum(pair in HELD for pair in prompt.objects) == 1 for prompt in prompts)


def test_numbers_of_prompts() -> None:
    numbers = {task: len(prompts_of(task, HELD)) for task in TASKS[:-1]}
    assert numbers == {
        "single_object": len(SHAPES),
        "two_object": 20,
        "counting": 15,
        "colors": len(SHAPES) * len(COLORS) - len(HELD),
        "position": 80,
    }


def test_two_objects_differ_in_shape_and_in_named_color() -> None:
    for task in ("two_object", "position", "color_attr", HELD_OUT):
        for prompt in prompts_of(task, HELD):
            shapes = [shape for shape, _ in prompt.objects]
            colors = [color for _, color in prompt.objects if color]
            assert len(set(shapes)) == len(shapes)
            assert len(set(colors)) == len(colors)


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"'colour'.*single_object"):
        prompts_of("colour", HELD)
