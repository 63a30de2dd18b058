"""How far the checker can be trusted: its accuracy on pictures whose content is known, and what chance would score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from scipy import ndimage

from rae_scale.data.shapes.checker import Detection, detect, judge
from rae_scale.data.shapes.prompts import COLORS, HELD_OUT, NUMBER_WORDS, SHAPES, TASKS, Prompt
from rae_scale.data.shapes.render import Bytes, render
from rae_scale.data.shapes.tars import encode_jpeg
from rae_scale.data.shapes.world import WorldConfig, evaluation_seed, sample_scene

BLUR_SD = 1.2
NOISE_SD = 10.0
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _jpeg(image: Bytes, index: int) -> Bytes:
    return np.asarray(simplejpeg.decode_jpeg(encode_jpeg(image, quality=50, subsampling="420")), dtype=np.uint8)


def _blur(image: Bytes, index: int) -> Bytes:
    blurred = ndimage.gaussian_filter(image.astype(np.float32), (BLUR_SD, BLUR_SD, 0), mode="nearest")
    return np.rint(blurred).astype(np.uint8)


def _noise(image: Bytes, index: int) -> Bytes:
    noise = np.random.default_rng(index).normal(0, NOISE_SD, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


CONDITIONS: dict[str, Callable[[Bytes, int], Bytes]] = {
    "clean": lambda image, index: image,
    "jpeg q50": _jpeg,
    f"blur sd {BLUR_SD:g}": _blur,
    f"noise sd {NOISE_SD:g}": _noise,
}


@dataclass(frozen=True)
class InstrumentReport:
    """Shares in [0, 1] by task, over `pictures` renders per task.

    `accuracy` maps a condition to the share of true verdicts on a picture and its own prompt, `near_misses` is the
    share of wrong prompts one attribute away that were accepted, `floor` that of the other prompts of the same task.
    """

    pictures: int
    accuracy: dict[str, dict[str, float]]
    near_misses: dict[str, float]
    floor: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "pictures_per_task": self.pictures,
            "accuracy": self.accuracy,
            "near_misses_accepted": self.near_misses,
            "floor": self.floor,
        }

    def table(self) -> str:
        columns = {**self.accuracy, "near misses": self.near_misses, "floor": self.floor}
        rows = {task: [shares[task] for shares in columns.values()] for task in (*TASKS, HELD_OUT)}
        rows["mean of the six"] = [sum(shares[task] for task in TASKS) / len(TASKS) for shares in columns.values()]
        return "\n".join(
            [
                f"checker on {self.pictures} known pictures per task: share judged right, and share of wrong prompts",
                "accepted (one attribute away: near misses; other prompts of the task: floor)",
                f"{'task':16}" + "".join(f"{name:>13}" for name in columns),
                *(f"{task:16}" + "".join(f"{share:13.3f}" for share in shares) for task, shares in rows.items()),
            ]
        )


def measure_instrument(per_task: int = 200, seed: int = 0, config: WorldConfig | None = None) -> InstrumentReport:
    """Render `per_task` held-out scenes of every task and let the checker judge them under each condition.

    Raises:
        ValueError: fewer than two pictures per task, which leaves no other prompt for the floor.
    """
    if per_task < 2:
        raise ValueError(f"per_task={per_task} leaves no mismatched prompt to measure chance with; use 2 or more")
    config = config or WorldConfig()
    accuracy: dict[str, dict[str, float]] = {condition: {} for condition in CONDITIONS}
    near_misses, floor = {}, {}
    for task in (*TASKS, HELD_OUT):
        scenes = [sample_scene(evaluation_seed(seed), index, config, task) for index in range(per_task)]
        images = [render(scene) for scene in scenes]
        prompts = [scene.prompt for scene in scenes]
        found = {
            condition: [detect(degrade(image, index)) for index, image in enumerate(images)]
            for condition, degrade in CONDITIONS.items()
        }
        for condition, detections in found.items():
            accuracy[condition][task] = _accepted(detections, prompts)
        near_misses[task] = _accepted(found["clean"], [near_miss(prompt, i) for i, prompt in enumerate(prompts)])
        floor[task] = chance_floor(list(zip(prompts, found["clean"], strict=True)), prompts)
    return InstrumentReport(per_task, accuracy, near_misses, floor)


def _accepted(detections: list[list[Detection]], prompts: list[Prompt]) -> float:
    verdicts = [judge(objects, prompt.metadata()) for objects, prompt in zip(detections, prompts, strict=True)]
    return sum(verdict.correct for verdict in verdicts) / len(verdicts)


def chance_floor(pictures: Sequence[tuple[Prompt, list[Detection]]], prompts: Sequence[Prompt]) -> float:
    """Mean verdict over all pairs of a picture (its prompt, its objects) and another entry of `prompts`.

    `prompts` lists the prompts of one task, each once per time that it was asked. This is what a model scores that
    draws the task's pictures but does not read its prompt; equal prompts asked twice count, as chance would have it.
    """
    asked = Counter(prompts)
    metadata = {prompt: prompt.metadata() for prompt in asked}
    accepted = sum(
        (count - (prompt == own)) * judge(objects, metadata[prompt]).correct
        for own, objects in pictures
        for prompt, count in asked.items()
    )
    return accepted / (len(pictures) * (len(prompts) - 1))


def near_miss(prompt: Prompt, number: int) -> Prompt:
    """A prompt that a true picture of `prompt` does not satisfy, one attribute away; `number` varies the choice.

    Another shape, one object more or fewer, another color, the opposite relation, or the two colors exchanged.
    """
    (shape, color), *rest = prompt.objects
    if prompt.relation:
        return Prompt(prompt.tag, prompt.objects, OPPOSITE[prompt.relation])
    if prompt.tag == "counting":
        count = len(prompt.objects)
        counts = [other for other in (count - 1, count + 1) if other in NUMBER_WORDS]
        return Prompt(prompt.tag, ((shape, color),) * counts[number % len(counts)])
    if rest and color:
        other_shape, other_color = rest[0]
        return Prompt(prompt.tag, ((shape, other_color), (other_shape, color)))
    if color:
        colors = [other for other in COLORS if other != color]
        return Prompt(prompt.tag, ((shape, colors[number % len(colors)]),))
    absent = [other for other in SHAPES if all(other != present for present, _ in prompt.objects)]
    return Prompt(prompt.tag, ((absent[number % len(absent)], None), *rest))
