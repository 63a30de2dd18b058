"""Planned memory against what real steps take: the highest total of all tensors, as PyTorch's profiler counts it.

python tests/plan/test_memory.py             the table of the whole grid: planned, measured, their ratio
python tests/plan/test_memory.py 2-zero3     of a part of it
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "dist"), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

from harness import run_ranks  # noqa: E402
from measured import LABELLED, LENGTH, Case, add_models, measure_all, save_encoder  # noqa: E402

from rae_scale.config import Config  # noqa: E402
from rae_scale.config.load import load_config  # noqa: E402
from rae_scale.config.schema import EncoderConfig  # noqa: E402
from rae_scale.models.encoders import ENCODERS  # noqa: E402
from rae_scale.plan import trace  # noqa: E402
from rae_scale.plan.encoder_memory import encoder_parameters  # noqa: E402
from rae_scale.plan.memory import MemoryPlan, plan_memory  # noqa: E402
from rae_scale.plan.skeleton import planned_module  # noqa: E402

ALLOWED = 0.05
"""Of the peak, in the cases that are always run. The planner is to be within 0.10; a forgotten component is to show."""
GIB = 1 << 30
CHECKPOINTING = ("none", "full", "selective")
RUNS = sorted((HERE.parents[1] / "configs" / "run").glob("*.yaml"))


def case(engine: str, encoder: str, parallel: dict[str, int] | None = None, **settings: Any) -> Case:
    """engine: its name, "zero" with the stage. settings: of the engine's section, or of the case."""
    of_case = {key: settings.pop(key) for key in list(settings) if key in Case.__dataclass_fields__}
    section: dict[str, Any] = {"name": engine, "precision": "fp32"} | settings
    if engine.startswith("zero"):
        section |= {"name": "zero", "zero_stage": int(engine[-1])}
    said = (parallel or {}) | settings | of_case
    name = " ".join([engine, *(f"{key}={value}" for key, value in said.items())])
    return Case(name, section, parallel or {}, encoder, **of_case)


def planned(case: Case) -> MemoryPlan:
    return plan_memory(
        case.config(),
        micro_batch=case.images,
        text_tokens=LENGTH,
        labelled_tokens=LABELLED,
        kernels=case.kernels,
    )


def measured(cases: list[Case], folder: Path) -> dict[str, int]:
    """The peak of each case, on the rank where it is highest. All have as many ranks."""
    ranks = cases[0].config().parallel.world_size
    found = run_ranks(measure_all, ranks, folder, (cases,), timeout=1200)
    return {each.name: max(max(peaks[each.name].values()) for peaks in found) for each in cases}


def assert_planned(cases: list[Case], folder: Path, allowed: float = ALLOWED) -> None:
    add_models()
    peaks = measured(cases, folder)
    ratios = {each.name: planned(each).peak / peaks[each.name] for each in cases}
    wrong = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > allowed}
    assert not wrong, wrong


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    return save_encoder(tmp_path / "encoder")


def one_rank(encoder: str) -> list[Case]:
    return [
        case("eager", encoder, activation_checkpointing="full", ema=True),
        case("eager", encoder, activation_checkpointing="selective", precision="bf16", dit="dit-measured-ddt"),
        case("eager", encoder, kernels="reference", micro_steps=2, images=12, llm="qwen2-measured-untied"),
    ]


def two_ranks(encoder: str) -> list[Case]:
    return [
        case("fsdp2", encoder, {"dp_shard": 2}, activation_checkpointing="full", ema=True, precision="bf16"),
        case("fsdp2", encoder, {"tp": 2}),
        case("fsdp2", encoder, {"sp": 2}),
        case("zero1", encoder, {"dp_shard": 2}),
        case("zero3", encoder, {"dp_shard": 2}, activation_checkpointing="full"),
        case("zero3", encoder, {"tp": 2}, activation_checkpointing="full"),
    ]


def test_peaks_of_one_rank(encoder: str, tmp_path: Path) -> None:
    assert_planned(one_rank(encoder), tmp_path)


@pytest.mark.dist
def test_peaks_of_two_ranks(encoder: str, tmp_path: Path) -> None:
    assert_planned(two_ranks(encoder), tmp_path)


SHARDED = ("fsdp2", "zero1", "zero2", "zero3")
PARTS = [(1, "eager"), *product((2, 4), SHARDED)]


def grid(encoder: str) -> dict[tuple[int, str], list[Case]]:
    """(ranks, engine) of `PARTS` -> its cases: every way to keep activations, with and without a moving average, and
    layouts of up to four ranks."""
    cases: dict[int, list[Case]] = {1: [], 2: [], 4: []}
    for keeps, ema, precision in product(CHECKPOINTING, (False, True), ("fp32", "bf16")):
        settings = {"activation_checkpointing": keeps, "ema": ema, "precision": precision}
        cases[1].append(case("eager", encoder, **settings))
        cases[2] += [case(engine, encoder, {"dp_shard": 2}, **settings) for engine in SHARDED]
    for keeps, axis, engine in product(CHECKPOINTING, ("tp", "sp"), SHARDED):
        cases[2].append(case(engine, encoder, {axis: 2}, activation_checkpointing=keeps))
    for engine, keeps in product(SHARDED, CHECKPOINTING):
        cases[4].append(case(engine, encoder, {"tp": 2, "sp": 2}, activation_checkpointing=keeps))
        cases[4].append(case(engine, encoder, {"dp_shard": 2, "tp": 2}, activation_checkpointing=keeps, ema=True))
    cases[2] += [case(engine, encoder, {"dp_shard": 2}, micro_steps=2, images=12) for engine in SHARDED]
    cases[2] += [case(engine, encoder, {"dp_shard": 2}, llm_trains=False) for engine in SHARDED]
    cases[2] += [case(engine, encoder, {"dp_shard": 2}, dit="dit-measured-ddt", precision="bf16") for engine in SHARDED]
    cases[4].append(case("fsdp2", encoder, {"dp_replicate": 2, "dp_shard": 2}, precision="bf16"))
    return {
        (ranks, engine): [each for each in cases[ranks] if each.name.split()[0] == engine] for ranks, engine in PARTS
    }


@pytest.mark.dist
@pytest.mark.matrix
@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part[0]}-{part[1]}")
def test_peaks_of_the_grid(part: tuple[int, str], encoder: str, tmp_path: Path) -> None:
    # What the planner promises. ZeRO-3 holds up to 7 % more than is planned, for a moment that has not been found.
    assert_planned(grid(encoder)[part], tmp_path, allowed=0.10)


def published(name: str) -> Config:
    return load_config(RUNS[0].parent / f"{name}.yaml")


LONG = [pytest.param(path, marks=pytest.mark.long) for path in RUNS if "demo" not in path.stem]


@pytest.mark.parametrize("path", [*(path for path in RUNS if "demo" in path.stem), *LONG], ids=lambda path: path.stem)
def test_every_run_can_be_planned(path: Path) -> None:
    config = load_config(path)
    plan = plan_memory(config, micro_batch=2)
    assert {"prepare", "forward", "backward", "optimizer"} <= set(plan.phases)
    assert plan.peak == max(sum(parts.values()) for parts in plan.phases.values())
    assert plan.peak == sum(plan.phases[plan.peak_phase].values())
    assert all(count >= 0 for parts in plan.phases.values() for count in parts.values())


def test_what_saves_memory_saves_memory_in_the_plan() -> None:
    def plan(kernels: Any = "auto", **engine: Any) -> MemoryPlan:
        config = published("pretrain-0.5b")
        section = config.engine.model_copy(update={"activation_checkpointing": "full", **engine})
        return plan_memory(config.model_copy(update={"engine": section}), micro_batch=4, kernels=kernels)

    full = plan()
    selective = plan(activation_checkpointing="selective", saved_ops={"linear": 3, "attention": -1})
    none = plan(activation_checkpointing="none")
    kept = [each.phases["forward"]["activations"] for each in (full, selective, none)]
    assert kept == sorted(set(kept))
    assert plan("reference", activation_checkpointing="none").peak > none.peak
    offloaded = plan(name="fsdp2", offload_optimizer=True)
    state = plan(name="fsdp2").phases["optimizer"]["optimizer"]
    assert offloaded.phases["optimizer"]["optimizer"] == 0
    assert offloaded.host["optimizer"] == state


def test_a_second_copy_within_a_node_is_counted() -> None:
    config = published("pretrain-0.5b")
    parallel = config.parallel.model_copy(update={"dp_shard": 8})

    def weights(copies: int) -> int:
        engine = config.engine.model_copy(update={"name": "zero", "zero_stage": 3, "zero_hpz": copies})
        plan = plan_memory(config.model_copy(update={"engine": engine, "parallel": parallel}), micro_batch=8)
        return plan.phases["optimizer"]["weights"]

    module, _ = planned_module(config)
    whole = 2 * sum(parameter.numel() for parameter in module.parameters())
    assert weights(4) - weights(1) == pytest.approx(whole / 4, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["siglip2-so400m", "webssl-l", "flux-vae", "siglip-demo"])
def test_parameters_of_the_frozen_encoders(name: str) -> None:
    """Without its layer scales, which weigh nothing, WebSSL's are counted."""
    with torch.device("meta"):
        real = ENCODERS[name](None)
    count = sum(parameter.numel() for parameter in real.parameters())
    assert encoder_parameters(EncoderConfig(name=name)) == pytest.approx(count, rel=2e-4)


def test_layouts_that_differ_in_data_parallelism_share_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nearly all of a plan's time, and a search plans many such layouts."""
    traced = []
    make_trace = trace.make_trace

    def counted(key: trace.Key) -> trace.Trace:
        traced.append(key)
        return make_trace(key)

    monkeypatch.setattr(trace, "make_trace", counted)
    monkeypatch.setenv("RAE_PLAN_CACHE", "")
    config = published("pretrain-2.4b")
    for replicas in (1, 2, 4, 8):
        parallel = config.parallel.model_copy(update={"dp_replicate": replicas, "dp_shard": 8 // replicas})
        plan_memory(config.model_copy(update={"parallel": parallel}), micro_batch=5)
    assert len(traced) == 1


def main() -> None:
    add_models()
    folder = Path(tempfile.mkdtemp())
    encoder = save_encoder(folder / "encoder")
    print(f"{'':<60}{'planned MB':>12}{'measured MB':>12}{'ratio':>8}")
    for (ranks, engine), cases in grid(encoder).items():
        place = folder / f"{ranks}-{engine}"
        if sys.argv[1:] and place.name not in sys.argv[1:]:
            continue
        place.mkdir()
        for name, peak in measured(cases, place).items():
            ours = planned(next(each for each in cases if each.name == name)).peak
            print(f"{ranks} {name:<58}{ours / 1e6:>12.1f}{peak / 1e6:>12.1f}{ours / peak:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
