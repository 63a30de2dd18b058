"""The shapes world: an endless data set of captioned scenes, each a pure function of (seed, index).

A scene holds one to four plump shapes on a light background. Layouts are few and regular, so that a small model can
learn them in minutes: one object in the middle, two side by side or one above the other, three or four on a 2x2 grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rae_scale.data.shapes.prompts import COLORS, SHAPES, TASKS, Pair, Prompt, allowed_colors, prompts_of

T = TypeVar("T")

SEED_LIMIT = 1 << 62  # seeds below are the user's; `evaluation_seed` maps them to streams that training cannot reach

# A shape's half extents (x, y) in units of its radius: areas look alike, and each box is centred on the object.
HALF_EXTENT: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (0.89, 0.89),
    "triangle": (1.1, 0.95),
    "cross": (1.0, 1.0),
    "ring": (1.05, 1.05),
}
MARGIN = 2.0  # pixels (of 64) between a shape's box and the border of its cell: neighbours stay apart when blurred


TASK_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"single_object": 1.0, "two_object": 2.0, "counting": 2.0, "colors": 1.0, "position": 2.0, "color_attr": 2.0}
)


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and jitters are pixels of a 64 px canvas and scale with `size`.

    `radius` and `jitter` give, for each layout (one, two, grid), the radius range and the largest displacement of a
    centre. Radii step by `lattice` from their smallest and centres from their cell's: a continuum of places would cost
    a small model most of its capacity. `task_weights` weighs the training stream, `held_out` pairs are in no picture of
    it.
    """

    size: int = 64
    radius_one: tuple[float, float] = (13.0, 15.0)
    radius_two: tuple[float, float] = (9.0, 11.0)
    radius_grid: tuple[float, float] = (9.0, 9.0)
    jitter_one: float = 4.0
    jitter_two: float = 2.0
    jitter_grid: float = 2.0
    lattice: float = 2.0
    background: tuple[float, float] = (0.90, 0.98)
    held_out: frozenset[Pair] = frozenset(
        {("circle", "purple"), ("square", "orange"), ("triangle", "black"), ("cross", "pink")}
    )
    task_weights: Mapping[str, float] = field(default_factory=lambda: dict(TASK_WEIGHTS), hash=False)

    def __post_init__(self) -> None:
        """Raises ValueError: shapes would be too small, overlap or leave the canvas, or a task would have no prompt."""
        if self.size < 32:
            raise ValueError(f"size={self.size} is too small for four shapes that can be told apart; use 32 or more")
        if self.lattice <= 0:
            raise ValueError(f"lattice={self.lattice} must be above 0; it is the step of radii and places in pixels")
        widest = max(extent for extents in HALF_EXTENT.values() for extent in extents)
        for name, half_cell in (("radius_one", 32), ("radius_two", 16), ("radius_grid", 16)):
            low, high = getattr(self, name)
            limit = (half_cell - MARGIN) / widest
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name}={(low, high)} does not fit its cell; keep 0 < low <= high <= {limit:.1f}")
        self._check_held_out()
        unknown = sorted(set(self.task_weights) - set(TASKS))
        if unknown:
            raise ValueError(f"task_weights names {unknown[0]!r}, which is no task; tasks are {', '.join(TASKS)}")
        if min(self.task_weights.values(), default=0) < 0 or sum(self.task_weights.values()) <= 0:
            raise ValueError(f"task_weights={dict(self.task_weights)} must be >= 0 with a sum above 0; raise one")

    def _check_held_out(self) -> None:
        for pair in sorted(self.held_out):
            if pair[0] not in SHAPES or pair[1] not in COLORS:
                raise ValueError(
                    f"held_out has {pair}, which is no (shape, color) pair; shapes are {', '.join(SHAPES)} and "
                    f"colors {', '.join(COLORS)}"
                )
        fewest = min(len(allowed_colors(shape, self.held_out)) for shape in SHAPES)
        if not self.held_out or fewest < 2:
            raise ValueError(
                f"held_out={sorted(self.held_out)} must name a pair and leave every shape two colors to train on; "
                f"name 1 to {len(COLORS) - 2} pairs per shape"
            )

    @cached_property
    def cumulative_weights(self) -> tuple[float, ...]:
        """Running sum of `task_weights` in the order of TASKS."""
        return tuple(accumulate(self.task_weights.get(task, 0.0) for task in TASKS))


class Object(NamedTuple):
    """One shape: centre and radius in pixels of the canvas, y pointing down."""

    shape: str
    color: str
    cx: float
    cy: float
    r: float


@dataclass(frozen=True)
class Scene:
    prompt: Prompt
    objects: tuple[Object, ...]
    background: float
    size: int

    @property
    def tag(self) -> str:
        return self.prompt.tag

    @property
    def caption(self) -> str:
        return self.prompt.caption

    @property
    def metadata(self) -> dict[str, Any]:
        return self.prompt.metadata()


# Fixed positions in a scene's vector of uniforms: fixing the task or the prompt moves no other draw.
_TASK, _PROMPT, _BACKGROUND, _LAYOUT, _ORDER, _SHARED_COLOR, _OBJECTS = range(7)
_COLOR, _RADIUS, _X, _Y = range(4)
_DRAWS = _OBJECTS + 4 * 4


def uniforms(seed: int, index: int) -> list[float]:
    """The `_DRAWS` uniforms in [0, 1) of one scene, from Philox4x64 keyed by (seed, index).

    Raw bits are used because numpy fixes a bit generator's stream across versions, but not what Generator makes of it.
    """
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(_DRAWS)
    return ((bits >> np.uint64(11)) * 2.0**-53).tolist()


def evaluation_seed(seed: int) -> int:
    """A seed whose scenes and prompts no training stream draws.

    Raises:
        ValueError: `seed` is outside [0, SEED_LIMIT).
    """
    return check_seed(seed) + SEED_LIMIT


def check_seed(seed: int) -> int:
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed={seed} is outside [0, 2^62); choose one inside (evaluation owns the seeds above)")
    return seed


def sample_scene(seed: int, index: int, config: WorldConfig | None = None, task: str | None = None) -> Scene:
    """Scene number `index` of the stream `seed`; `task` (one of the six, or `held_out`) replaces the drawn task."""
    config = config or WorldConfig()
    draws = uniforms(seed, index)
    if task is None:
        target = draws[_TASK] * config.cumulative_weights[-1]
        task = next(name for name, total in zip(TASKS, config.cumulative_weights, strict=True) if target < total)
    prompts = prompts_of(task, config.held_out)
    return _arrange(_pick(prompts, draws[_PROMPT]), draws, config)


def scene_of(prompt: Prompt, seed: int, index: int, config: WorldConfig | None = None) -> Scene:
    """A scene that shows `prompt`: what the caption leaves open is drawn from (seed, index)."""
    return _arrange(prompt, uniforms(seed, index), config or WorldConfig())


def _pick(items: tuple[T, ...], uniform: float) -> T:
    return items[int(uniform * len(items))]


def _arrange(prompt: Prompt, draws: list[float], config: WorldConfig) -> Scene:
    """Place the prompt's objects: cells from the layout, then color, radius and jitter inside each cell."""
    cells, radius, jitter = _layout(prompt, draws, config)
    low, high = config.background
    unit = config.size / 64
    objects = []
    for number, ((shape, color), (cx, cy, half_width, half_height)) in enumerate(
        zip(prompt.objects, cells, strict=True)
    ):
        own = draws[_OBJECTS + 4 * number :]
        # Equal objects of a counting scene share one color; elsewhere each uncaptioned color is drawn alone.
        choice = draws[_SHARED_COLOR] if prompt.tag == "counting" else own[_COLOR]
        color = color or _pick(allowed_colors(shape, config.held_out), choice)
        r = radius[0] + config.lattice * int(own[_RADIUS] * (_steps_within(radius[1] - radius[0], config.lattice) + 1))
        extent_x, extent_y = HALF_EXTENT[shape]
        room_x = min(jitter, half_width - MARGIN - extent_x * r)
        room_y = min(jitter, half_height - MARGIN - extent_y * r)
        x = cx + _displacement(own[_X], room_x, config.lattice)
        y = cy + _displacement(own[_Y], room_y, config.lattice)
        objects.append(Object(shape, color, x * unit, y * unit, r * unit))
    return Scene(prompt, tuple(objects), low + (high - low) * draws[_BACKGROUND], config.size)


def _steps_within(length: float, step: float) -> int:
    """How many whole steps fit into `length`."""
    return int(length / step + 1e-9)  # 4.0 / 2.0 must not become 1.999...


def _displacement(uniform: float, room: float, step: float) -> float:
    """A multiple of `step` in [-room, room], each equally likely."""
    reach = _steps_within(max(room, 0.0), step)
    return step * (int(uniform * (2 * reach + 1)) - reach)


Cell = tuple[float, float, float, float]  # centre x, centre y, half width, half height, in pixels of 64


def _layout(prompt: Prompt, draws: list[float], config: WorldConfig) -> tuple[list[Cell], tuple[float, float], float]:
    """One cell per object in the caption's order, with the layout's radius range and jitter."""
    count = len(prompt.objects)
    if count == 1:
        return [(32, 32, 32, 32)], config.radius_one, config.jitter_one
    if count == 2:
        horizontal = prompt.relation in ("left of", "right of") if prompt.relation else draws[_LAYOUT] < 0.5
        cells: list[Cell] = [(16, 32, 16, 32), (48, 32, 16, 32)] if horizontal else [(32, 16, 32, 16), (32, 48, 32, 16)]
        swapped = prompt.relation in ("right of", "below") if prompt.relation else draws[_ORDER] < 0.5
        return cells[::-1] if swapped else cells, config.radius_two, config.jitter_two
    grid: list[Cell] = [(16, 16, 16, 16), (48, 16, 16, 16), (16, 48, 16, 16), (48, 48, 16, 16)]
    if count == 3:
        grid.pop(int(draws[_LAYOUT] * 4))
    return grid, config.radius_grid, config.jitter_grid
