"""The shapes score: six GenEval-style tasks, judged by an exact checker, reported beside chance and ceiling.

The six tasks' prompts are also training captions (there are few); what they measure is whether new pictures match.
Only `held_out` asks for (shape, color) pairs that training has neither shown nor named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_scale.data.shapes.checker import Detection, detect, judge
from rae_scale.data.shapes.instrument import chance_floor
from rae_scale.data.shapes.prompts import HELD_OUT, TASKS, Prompt, prompts_of
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.world import WorldConfig, evaluation_seed, scene_of
from rae_scale.evals.geneval_folder import GenEvalFolder
from rae_scale.evals.intervals import wilson

Generate = Callable[[list[str], list[int]], NDArray[np.uint8]]  # prompts, seeds -> uint8 [N, S, S, 3]


def prompts_for(task: str, n: int, seed: int = 0, config: WorldConfig | None = None) -> list[Prompt]:
    """`n` evaluation prompts of one task (or `held_out`), by number of objects in turn.

    The world's prompts are few, so each is asked as often as any other (give or take one) instead of being drawn: a
    score then compares models, not draws. The seed decides which come first.
    """
    held_out = (config or WorldConfig()).held_out
    groups: dict[int, list[Prompt]] = {}
    for prompt in prompts_of(task, held_out):
        groups.setdefault(len(prompt.objects), []).append(prompt)
    stream = (*TASKS, HELD_OUT).index(task)
    queues = [_shuffled(group, evaluation_seed(seed), (stream << 8) + size) for size, group in groups.items()]
    return [queues[i % len(queues)][i // len(queues) % len(queues[i % len(queues)])] for i in range(n)]


def _shuffled(prompts: list[Prompt], seed: int, stream: int) -> list[Prompt]:
    keys = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(len(prompts))
    return [prompts[i] for i in np.argsort(keys, kind="stable")]


@dataclass(frozen=True)
class TaskResult:
    """One task: verdicts on the generated pictures, and what chance and a perfect model score with the same prompts.

    `floor` pairs the generated pictures with other prompts of the task, `floor_renders` true pictures; `ceiling` is
    the checker's accuracy on true pictures.
    """

    correct: int
    pictures: int
    floor: float
    floor_renders: float
    ceiling: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.pictures

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval, pictures taken as independent."""
        return wilson(self.correct, self.pictures)


@dataclass(frozen=True)
class ShapesReport:
    """Results of the six tasks and of `held_out`, which is no part of the overall score.

    Raises:
        ValueError: a task is missing or has not all of its pictures; a partial set has no score.
    """

    tasks: dict[str, TaskResult]
    prompts_per_task: int
    samples_per_prompt: int
    seed: int

    def __post_init__(self) -> None:
        expected = self.prompts_per_task * self.samples_per_prompt
        for task in (*TASKS, HELD_OUT):
            pictures = self.tasks[task].pictures if task in self.tasks else 0
            if pictures != expected:
                raise ValueError(
                    f"{task} has {pictures} of {expected} pictures; a partial set has no score: add the rest"
                )

    @property
    def overall(self) -> float:
        """Mean of the six task accuracies, as in GenEval."""
        return self._mean("accuracy")

    @property
    def held_out(self) -> float:
        return self.tasks[HELD_OUT].accuracy

    def _mean(self, field: str) -> float:
        return sum(getattr(self.tasks[task], field) for task in TASKS) / len(TASKS)

    def to_dict(self) -> dict[str, Any]:
        return {
            "overall": self.overall,
            "floor": self._mean("floor"),
            "floor_renders": self._mean("floor_renders"),
            "ceiling": self._mean("ceiling"),
            "held_out": self.held_out,
            "prompts_per_task": self.prompts_per_task,
            "samples_per_prompt": self.samples_per_prompt,
            "seed": self.seed,
            "tasks": {
                task: {
                    "accuracy": result.accuracy,
                    "interval_95": list(result.interval),
                    "correct": result.correct,
                    "pictures": result.pictures,
                    "floor": result.floor,
                    "floor_renders": result.floor_renders,
                    "ceiling": result.ceiling,
                }
                for task, result in self.tasks.items()
            },
        }

    def table(self) -> str:
        fields = ("accuracy", "interval", "floor", "floor_renders", "ceiling", "pictures")
        header = ("score", "95 % interval", "floor", "true floor", "ceiling", "pictures")
        rows = {"task": list(header)}
        for task in TASKS:
            rows[task] = [_cell(getattr(self.tasks[task], field)) for field in fields]
        rows["overall (mean of six)"] = [_cell(self._mean(f)) if f in _AVERAGED else "" for f in fields]
        rows[HELD_OUT] = [_cell(getattr(self.tasks[HELD_OUT], field)) for field in fields]
        return "\n".join(
            [
                *(f"{name:22}" + "".join(f"{cell:>15}" for cell in cells) for name, cells in rows.items()),
                "floor: these pictures against other prompts of their task (true floor: true pictures); "
                "ceiling: the checker on true pictures",
            ]
        )


_AVERAGED = ("accuracy", "floor", "floor_renders", "ceiling")


def _cell(value: float | tuple[float, float] | int) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f} - {value[1]:.3f}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def evaluate(
    generate: Generate,
    prompts_per_task: int = 100,
    samples_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    config: WorldConfig | None = None,
    out_dir: str | Path | None = None,
) -> ShapesReport:
    """Generate pictures of every task's prompts and score them; with `out_dir` also write GenEval's folder.

    Picture number i of the whole evaluation is generated with seed `seed + i`.

    Raises:
        ValueError: fewer than two prompts per task, a count below 1, an `out_dir` that is not empty, or pictures that
            are not uint8 `[N, S, S, 3]`, one per prompt.
    """
    if prompts_per_task < 2:
        raise ValueError(
            f"prompts_per_task={prompts_per_task} leaves no mismatched prompt for the floor; use 2 or more"
        )
    for name, value in (("samples_per_prompt", samples_per_prompt), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} generates nothing; choose 1 or more")
    config = config or WorldConfig()
    folder = GenEvalFolder(Path(out_dir)) if out_dir is not None else None
    results = {}
    for number, task in enumerate((*TASKS, HELD_OUT)):
        prompts = prompts_for(task, prompts_per_task, seed, config)
        asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        first_seed = seed + number * len(asked)
        pictures: list[tuple[Prompt, list[Detection]]] = []
        correct = 0
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            seeds = [first_seed + start + i for i in range(len(batch))]
            images = _checked(generate([prompt.caption for prompt in batch], seeds), len(batch))
            for prompt, image, image_seed in zip(batch, images, seeds, strict=True):
                objects = detect(image)
                verdict = judge(objects, prompt.metadata())
                if folder:
                    folder.add(prompt, len(pictures) % samples_per_prompt, image, objects, verdict, image_seed)
                pictures.append((prompt, objects))
                correct += verdict.correct
        results[task] = _task_result(prompts, pictures, correct, seed, config)
    report = ShapesReport(results, prompts_per_task, samples_per_prompt, seed)
    if folder:
        folder.finish(report.to_dict(), report.table())
    return report


def _checked(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != count or images.shape[3] != 3:
        raise ValueError(
            f"generate returned {images.dtype} {list(images.shape)} for {count} prompts; "
            f"it must return uint8 [{count}, S, S, 3]"
        )
    return images


def _task_result(
    prompts: list[Prompt],
    pictures: list[tuple[Prompt, list[Detection]]],
    correct: int,
    seed: int,
    config: WorldConfig,
) -> TaskResult:
    renders = [render(scene_of(prompt, evaluation_seed(seed), index, config)) for index, prompt in enumerate(prompts)]
    true_pictures = [(prompt, detect(image)) for prompt, image in zip(prompts, renders, strict=True)]
    return TaskResult(
        correct=correct,
        pictures=len(pictures),
        floor=chance_floor(pictures, prompts),
        floor_renders=chance_floor(true_pictures, prompts),
        ceiling=sum(judge(objects, prompt.metadata()).correct for prompt, objects in true_pictures) / len(prompts),
    )
