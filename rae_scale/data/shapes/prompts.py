"""Every prompt of the shapes world, with its GenEval metadata.

The wording and the metadata follow GenEval (Ghosh et al. 2023), so one emitter and one scorer serve both. The world is
small enough to list: drawing a prompt is picking an entry of `prompts_of(task, held_out)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any

SHAPES = ("circle", "square", "triangle", "cross", "ring")

# sRGB. The smallest CIELAB distance between two colours is 55, and 67 between a colour and the background (CIE76),
# found by a search inside the range in which people still use the colour's name.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (200, 5, 40),
    "orange": (255, 134, 0),
    "yellow": (244, 230, 5),
    "green": (19, 145, 48),
    "blue": (5, 105, 210),
    "purple": (92, 0, 182),
    "pink": (255, 118, 212),
    "black": (16, 16, 16),
}

RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT = "held_out"  # compositional generalisation: prompts that name a (shape, color) pair never seen in training

Pair = tuple[str, str]


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for: `objects` in the caption's order, each (shape, color or None when it does not say)."""

    tag: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        shape = self.objects[0][0]
        if self.tag == "counting":
            return f"a photo of {NUMBER_WORDS[len(self.objects)]} {plural(shape)}"
        joint = f" {self.relation} " if self.relation else " and "
        return "a photo of " + joint.join(_noun_phrase(shape, color) for shape, color in self.objects)

    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata line. In `position` the reference object comes first and the placed one refers to it."""
        shape = self.objects[0][0]
        count = len(self.objects)
        if self.tag == "counting":
            return {
                "tag": self.tag,
                "include": [{"class": shape, "count": count}],
                "exclude": [{"class": shape, "count": count + 1}],
                "prompt": self.caption,
            }
        include: list[dict[str, Any]] = [
            {"class": shape, "count": 1} | ({"color": color} if color else {}) for shape, color in self.objects
        ]
        if self.relation:
            placed, reference = include
            include = [reference, placed | {"position": [self.relation, 0]}]
        return {"tag": self.tag, "include": include, "exclude": [], "prompt": self.caption}


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _noun_phrase(shape: str, color: str | None) -> str:
    words = f"{color} {shape}" if color else shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def allowed_colors(shape: str, held_out: frozenset[Pair]) -> tuple[str, ...]:
    """Colors in which a training picture may show `shape`."""
    return tuple(color for color in COLORS if (shape, color) not in held_out)


@lru_cache(maxsize=64)
def prompts_of(task: str, held_out: frozenset[Pair]) -> tuple[Prompt, ...]:
    """Every prompt of one task, in a fixed order. Those of the six tasks name no pair in `held_out`.

    `held_out` as a task: each held-out pair alone, then each beside a pair that training shows, in both orders.

    Raises:
        ValueError: `task` is not one of the six or `held_out`.
    """
    pairs_of_shapes = list(permutations(SHAPES, 2))
    if task == "single_object":
        return tuple(Prompt(task, ((shape, None),)) for shape in SHAPES)
    if task == "two_object":
        return tuple(Prompt(task, ((first, None), (second, None))) for first, second in pairs_of_shapes)
    if task == "counting":
        return tuple(Prompt(task, ((shape, None),) * count) for shape, count in product(SHAPES, NUMBER_WORDS))
    if task == "position":
        return tuple(
            Prompt(task, ((first, None), (second, None)), relation)
            for (first, second), relation in product(pairs_of_shapes, RELATIONS)
        )
    attributed = [
        ((first, first_color), (second, second_color))
        for (first, second), (first_color, second_color) in product(pairs_of_shapes, permutations(COLORS, 2))
    ]
    if task == "colors":
        return tuple(Prompt(task, (pair,)) for pair in product(SHAPES, COLORS) if pair not in held_out)
    if task == "color_attr":
        return tuple(Prompt(task, pairs) for pairs in attributed if not held_out & set(pairs))
    if task == HELD_OUT:
        alone = [Prompt(task, (pair,)) for pair in product(SHAPES, COLORS) if pair in held_out]
        return tuple(alone + [Prompt(task, pairs) for pairs in attributed if len(held_out & set(pairs)) == 1])
    raise ValueError(f"task={task!r} is not a task of the shapes world; use one of {', '.join((*TASKS, HELD_OUT))}")
