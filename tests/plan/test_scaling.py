"""Predicted scaling: what holds of any prediction, and the tables made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from rae_scale.plan import scaling
from rae_scale.plan.hardware import DEFAULT_RATES, find_cluster
from rae_scale.plan.scaling import (
    BATCH,
    COUNTS,
    IMAGES_PER_GPU,
    MODELS,
    MODES,
    Point,
    breaks_first,
    by_series,
    efficiencies,
    plan_scaling,
    published,
)
from rae_scale.plan.scaling_report import limits_of, to_markdown, write_scaling
from rae_scale.plan.step_time import plan_step

MODEL = "DiT 0.5B"
FEW = (8, 64, 1024)
NETWORKS = ("ib-ndr-400", "ethernet-100")


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return list(plan_scaling(models=(MODEL,), counts=FEW, networks=NETWORKS))


def test_batches(points: Sequence[Point]) -> None:
    assert len(points) == len(FEW) * len(MODES) * len(NETWORKS)
    for point in points:
        assert point.found is not None, point.reason
        batch = IMAGES_PER_GPU * point.gpus if point.mode == "weak" else BATCH
        assert point.batch == batch == point.found.config.data.global_batch_size == point.found.step.images
        assert point.found.config.parallel.world_size == point.gpus
        parallel = point.found.config.parallel
        assert parallel.tp * parallel.sp <= 8


def test_nothing_is_faster_than_as_many_gpus_alone(points: Sequence[Point]) -> None:
    """A GPU alone, with as many images at a time as it likes, no communication and no memory limit."""
    config = published(MODEL, 2048)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "eager"})})
    alone = plan_step(config, find_cluster("h100-80g", 1)).images_per_s
    for point in points:
        assert point.found is not None
        assert point.found.step.images_per_s <= 1.02 * point.gpus * alone


def test_parts_add_up(points: Sequence[Point]) -> None:
    for point in points:
        data = point.to_json()
        assert sum(data["parts_s"].values()) == pytest.approx(data["step_s"])
        assert data["images_per_s"] == pytest.approx(point.batch / data["step_s"])
        assert 0 <= data["exposed"] < 1 and 0 < data["mfu"] < 1


def test_more_gpus_are_faster_and_less_efficient(points: Sequence[Point]) -> None:
    for found in by_series(points).values():
        rates = [point.found.step.images_per_s for point in found if point.found]
        assert rates == sorted(rates)
        values = list(efficiencies(found).values())
        assert values[0] == 1.0
        assert all(later <= 1.02 * earlier for earlier, later in pairwise(values))


def test_a_slower_network_is_no_faster(points: Sequence[Point]) -> None:
    series = by_series(points)
    for mode in MODES:
        for fast, slow in zip(series[MODEL, mode, NETWORKS[0]], series[MODEL, mode, NETWORKS[1]], strict=True):
            assert fast.found is not None and slow.found is not None
            assert slow.found.step.images_per_s <= fast.found.step.images_per_s


def test_what_breaks_first(points: Sequence[Point]) -> None:
    strong = by_series(points)[MODEL, "strong", "ethernet-100"]
    said = breaks_first(strong)
    assert "GPUs: efficiency" in said and said.endswith("images per GPU")
    assert breaks_first(strong[:1]) == "nothing up to 8 GPUs"
    assert breaks_first([replace(strong[0], found=None)]) == "it fits nowhere"


def test_limits_are_those_of_the_heads() -> None:
    """Qwen2.5 1.5B has 12 heads and 2 of keys and values, 7B 28 and 4; the DiT 0.5B has 16, the others 32."""
    small, large = limits_of("DiT 2.4B"), limits_of("DiT 9.8B, Qwen2.5 7B")
    assert (small["tp"], small["sp"], small["both"]) == (2, 4, 4)
    assert (large["tp"], large["sp"], large["both"]) == (4, 4, 4)
    assert small["gpus"] == 4 * BATCH


def test_files(points: Sequence[Point], tmp_path: Path) -> None:
    file = write_scaling(points, tmp_path / "scaling", "h100-80g", DEFAULT_RATES)
    assert file == tmp_path / "scaling.md"
    text = file.read_text()
    assert text == to_markdown(points, "h100-80g", DEFAULT_RATES, "scaling")
    assert "These are predictions, not measurements" in text and "## DiT 0.5B, weak, ib-ndr-400" in text
    assert len(json.loads((tmp_path / "scaling/scaling.json").read_text())) == len(points)
    for mode in MODES:
        assert (tmp_path / f"scaling/{mode}.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_that_does_not_fit_says_why() -> None:
    point = Point(MODEL, "weak", "ib-ndr-400", 8, 256, None, "memory: 3 GiB too much")
    text = to_markdown([point], "h100-80g", DEFAULT_RATES, "scaling")
    assert "memory: 3 GiB too much |" in text and "it fits nowhere" in text


def test_what_is_in_the_repository() -> None:
    """All models, modes, networks and counts, once."""
    file = Path(__file__).resolve().parents[2] / "docs/scaling/scaling.json"
    found = [(each["model"], each["mode"], each["network"], each["gpus"]) for each in json.loads(file.read_text())]
    wanted = [(m, k, n, g) for m in MODELS for k in MODES for n in scaling.TWO_NETWORKS for g in COUNTS]
    assert found == wanted
