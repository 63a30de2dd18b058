"""The shapes world: captioned pictures without end, with an exact checker of what they show."""

from rae_scale.data.shapes.prompts import COLORS, HELD_OUT, SHAPES, TASKS, Prompt, prompts_of
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.world import Object, Scene, WorldConfig, sample_scene, scene_of

__all__ = [
    "COLORS",
    "HELD_OUT",
    "SHAPES",
    "TASKS",
    "Object",
    "Prompt",
    "Scene",
    "WorldConfig",
    "prompts_of",
    "render",
    "sample_scene",
    "scene_of",
]
