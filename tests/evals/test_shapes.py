from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_scale.data.shapes import HELD_OUT, TASKS, Prompt, WorldConfig, prompts_of, render, sample_scene, scene_of
from rae_scale.evals.shapes import ShapesReport, TaskResult, evaluate, prompts_for

CONFIG = WorldConfig()
BY_CAPTION = {prompt.caption: prompt for task in (*TASKS, HELD_OUT) for prompt in prompts_of(task, CONFIG.held_out)}


def perfect(prompts: list[str], seeds: list[int]) -> np.ndarray:
    return np.stack([render(scene_of(BY_CAPTION[text], 9, seed)) for text, seed in zip(prompts, seeds, strict=True)])


def single_objects_only(prompts: list[str], seeds: list[int]) -> np.ndarray:
    """Right wherever one object is asked for, wrong wherever two or more are."""
    pictures = []
    for text, seed in zip(prompts, seeds, strict=True):
        prompt = BY_CAPTION[text]
        pictures.append(render(scene_of(Prompt("colors", prompt.objects[:1]), 9, seed)))
    return np.stack(pictures)


def blind(prompts: list[str], seeds: list[int]) -> np.ndarray:
    """Draws pictures of the asked task without looking at the prompt."""
    tags = [BY_CAPTION[text].tag for text in prompts]
    return np.stack([render(sample_scene(9, seed, task=tag)) for tag, seed in zip(tags, seeds, strict=True)])


@pytest.mark.parametrize("task", [*TASKS, HELD_OUT])
def test_prompts_are_asked_equally_often(task: str) -> None:
    prompts = prompts_for(task, 100, seed=1)
    assert len(prompts) == 100
    assert prompts == prompts_for(task, 100, seed=1)
    by_size: dict[int, Counter] = {}
    for prompt in prompts:
        by_size.setdefault(len(prompt.objects), Counter())[prompt] += 1
    sizes = [counter.total() for counter in by_size.values()]
    assert max(sizes) - min(sizes) <= 1
    for size, counter in by_size.items():
        available = sum(len(prompt.objects) == size for prompt in prompts_of(task, CONFIG.held_out))
        assert len(counter) == min(available, counter.total())
        assert max(counter.values()) - min(counter.values()) <= 1


def test_seeds_and_tasks_have_their_own_order() -> None:
    assert prompts_for("color_attr", 20, 0) != prompts_for("color_attr", 20, 1)
    assert prompts_for("position", 20, 0)[:3] == prompts_for("position", 3, 0)


def test_scores_of_the_six_tasks_use_no_held_out_pair() -> None:
    for task in TASKS:
        assert not any(pair in CONFIG.held_out for prompt in prompts_for(task, 60) for pair in prompt.objects)


def test_a_perfect_model_scores_one() -> None:
    report = evaluate(perfect, prompts_per_task=6, samples_per_prompt=2, batch_size=5)
    assert report.overall == report.held_out == 1.0
    result = report.to_dict()
    assert result["ceiling"] == 1.0
    assert result["floor"] < 0.25
    assert result["floor_renders"] < 0.25
    assert all(entry["pictures"] == 12 for entry in result["tasks"].values())
    assert all(0.7 < entry["interval_95"][0] < entry["interval_95"][1] for entry in result["tasks"].values())


def test_overall_is_the_mean_of_six_and_leaves_out_held_out() -> None:
    report = evaluate(single_objects_only, prompts_per_task=4, samples_per_prompt=1)
    scores = {task: result.accuracy for task, result in report.tasks.items()}
    assert [task for task in TASKS if scores[task] == 1.0] == ["single_object", "colors"]
    assert report.overall == pytest.approx(2 / 6)
    assert report.held_out == 0.5  # half of its prompts ask for one object
    assert report.tasks["color_attr"].ceiling == 1.0


def test_a_model_that_ignores_its_prompt_scores_its_floor() -> None:
    report = evaluate(blind, prompts_per_task=15, samples_per_prompt=1)
    for task in ("single_object", "counting", "position"):
        result = report.tasks[task]
        assert result.accuracy == pytest.approx(result.floor, abs=0.2)
        assert result.floor_renders == pytest.approx(result.floor, abs=0.1)
    assert report.overall < 0.2


def test_each_picture_has_its_own_seed() -> None:
    seen: list[int] = []

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        assert 1 <= len(prompts) == len(seeds) <= 8
        seen.extend(seeds)
        return np.full((len(prompts), 64, 64, 3), 240, np.uint8)

    report = evaluate(generate, prompts_per_task=3, samples_per_prompt=4, seed=100, batch_size=8)
    assert seen == list(range(100, 100 + 7 * 12))
    assert report.overall == 0.0


def test_the_table_shows_score_floor_and_ceiling() -> None:
    table = evaluate(perfect, prompts_per_task=2, samples_per_prompt=1).table()
    for text in (*TASKS, HELD_OUT, "overall", "floor", "ceiling", "95 % interval", "1.000"):
        assert text in table


def test_a_partial_set_has_no_score() -> None:
    whole = TaskResult(correct=3, pictures=8, floor=0.1, floor_renders=0.1, ceiling=1.0)
    tasks = dict.fromkeys((*TASKS, HELD_OUT), whole)
    assert ShapesReport(tasks, 4, 2, 0).overall == 3 / 8
    short = TaskResult(correct=3, pictures=7, floor=0.1, floor_renders=0.1, ceiling=1.0)
    with pytest.raises(ValueError, match="counting has 7 of 8 pictures"):
        ShapesReport(tasks | {"counting": short}, 4, 2, 0)
    with pytest.raises(ValueError, match="held_out has 0 of 8 pictures"):
        ShapesReport({task: whole for task in TASKS}, 4, 2, 0)


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 64, 64, 3), np.uint8), np.zeros((4, 64, 64, 3), np.float32), np.zeros((4, 3, 64, 64), np.uint8)],
)
def test_wrong_pictures_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"for 4 prompts; it must return uint8 \[4, S, S, 3\]"):
        evaluate(lambda prompts, seeds: images, prompts_per_task=2, samples_per_prompt=2, batch_size=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prompts_per_task": 1}, "prompts_per_task=1"), ({"samples_per_prompt": 0}, "samples_per_prompt=0")],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(perfect, **arguments)


def test_writes_the_folder_of_geneval(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate(perfect, prompts_per_task=3, samples_per_prompt=2, out_dir=out)
    folders = sorted(path.name for path in out.iterdir() if path.name.isdigit())
    assert folders == [f"{number:05d}" for number in range(18)]
    assert len([path for path in (out / "held_out").iterdir() if path.is_dir()]) == 3
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) == 36
    assert {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"} <= set(results[0])
    assert results[7]["filename"] == "00003/samples/0001.png"
    asked = [prompt.metadata() for task in TASKS for prompt in prompts_for(task, 3)]
    for number, metadata in enumerate(asked):
        (line,) = (out / f"{number:05d}" / "metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == metadata == json.loads(results[2 * number]["metadata"])
        samples = sorted((out / f"{number:05d}" / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png"]
    picture = np.array(Image.open(out / "00004" / "samples" / "0001.png"))
    assert (picture == perfect([results[9]["prompt"]], [results[9]["seed"]])[0]).all()
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    with pytest.raises(ValueError, match="is not empty"):
        evaluate(perfect, prompts_per_task=3, samples_per_prompt=2, out_dir=out)
