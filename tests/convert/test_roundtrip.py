"""Every format, there and back: not a bit changes.

A format joins by a line in `WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rae_scale.convert.convert import convert
from rae_scale.convert.diff import diff
from rae_scale.convert.sinks import To
from rae_scale.engines.base import Kind
from tests.convert.conftest import Runs

GENERATION = ("untied", "tied", "ddt")
WHOLE_STATE: tuple[Kind, ...] = ("weight", "ema", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Way:
    """write: (run folder, new path) -> path of the checkpoint in the other format, which may be inside the new path.
    models: which of `Runs` it can hold. kinds: what it keeps."""

    write: Callable[[Path, Path], Path]
    models: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("weight",)


def by(to: To) -> Callable[[Path, Path], Path]:
    return lambda run, out: convert(run, out, to, weights=None if to == "checkpoint" else "weight", verify=True).out


WAYS = {
    "native": Way(by("native"), (*GENERATION, "decoder")),
    "checkpoint": Way(by("checkpoint"), (*GENERATION, "decoder"), WHOLE_STATE),
    "official": Way(by("official"), GENERATION),
    "official-consolidated": Way(by("official-consolidated"), ("tied",)),
    "hf": Way(by("hf"), GENERATION),
    "official-decoder": Way(by("official-decoder"), ("decoder",)),
}
CASES = [pytest.param(way, model, id=f"{name}-{model}") for name, way in WAYS.items() for model in way.models]


@pytest.mark.parametrize(("way", "model"), CASES)
def test_there_and_back(way: Way, model: str, runs: Runs, tmp_path: Path) -> None:
    run: Path = getattr(runs, model)
    there = way.write(run, tmp_path / "there")
    state = len(way.kinds) > 1
    back = convert(there, tmp_path / "back", "checkpoint" if state else "native", verify=True).out
    compared = diff(run, back, kinds=way.kinds)
    assert not compared.differences
    assert compared.tensors == len(way.kinds) * diff(run, run, kinds=["weight"]).tensors > 0
