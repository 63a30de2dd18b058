"""Published shapes on many ranks, without memory and without processes: they are laid out, or refused with a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_world import TinyWorld

from rae_scale.config import Config, parse_config
from rae_scale.engines.optimizer import GroupKey
from rae_scale.models import shard_tables, zoo
from rae_scale.models.dit import DiTConfig
from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.shard_tables import SCALE_RAE, Rule
from rae_scale.models.zoo import PUBLISHED_SIZES
from rae_scale.parallel.placement import Placement
from rae_scale.train.layout import check_layout, layout_report, measure_layout
from rae_scale.train.layout_sizes import HeldParameter, check_sum, line, rounded, rows_of, sizes_by_part, total_of
from rae_scale.train.parts import build_parts

LLMS = ("qwen2.5-1.5b", "qwen2.5-7b")
DIT, LLM = GroupKey("dit"), GroupKey("llm")


def config(model: str = "dit-tiny", llm: str = "qwen2-tiny", *, heads: int | None = None, **changes: Any) -> Config:
    """`changes`: sizes of the mesh, and sections."""
    mesh = {axis: changes.pop(axis) for axis in ("dp_replicate", "dp_shard", "sp", "tp") if axis in changes}
    ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
    tree = {
        "model": {"name": model, "ddt_num_heads": heads, "llm": {"name": llm}},
        "parallel": mesh,
        "engine": {"name": "fsdp2"},
        "data": {"global_batch_size": ranks},
    }
    return parse_config({**tree, **changes})


@pytest.mark.parametrize(
    "run",
    [
        config("dit-2.4b", "qwen2.5-1.5b", dp_shard=8, engine={"name": "zero", "zero_stage": 3}),
        config("dit-0.5b-ddt", "qwen2.5-1.5b", heads=16, dp_replicate=4, dp_shard=2, sp=2, tp=2),
        config("dit-9.8b", "qwen2.5-7b", dp_shard=256, tp=4),
    ],
    ids=lambda run: f"{run.model.name}-{run.parallel.world_size}-{run.engine.name}",
)
def test_published_sizes_are_laid_out(run: Config) -> None:
    layout = measure_layout(run)
    with torch.device("meta"):
        dit = zoo.build_dit(run.model)
    of_dit = [sizes.elements for part, sizes in layout.sizes.items() if part in ("DiT", "DDT head")]
    assert sum(map(Counter.total, of_dit)) == sum(parameter.numel() for parameter in dit.parameters())
    assert not dist.is_initialized()


def test_every_rank_holds_what_fully_shard_gives_it() -> None:
    """`measure_layout` compares its arithmetic with the shards of the rank it builds: build all."""
    run = config("dit-tiny", dp_replicate=2, dp_shard=5, sp=2, tp=2)
    first = measure_layout(run)
    for rank in range(1, run.parallel.world_size, 3):
        other = measure_layout(run, rank)
        assert torch.equal(other.total.total, first.total.total)
    assert len(set(first.total.held.flatten().tolist())) > 1, "ten ranks do not divide this model"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (config("dit-2.4b", LLMS[0], tp=8), "tp=8 does not divide the language model's 2 key and value heads; choose"),
        (config("dit-2.4b", LLMS[0], tp=4), "tp=4 does not divide the language model's 2 key and value heads"),
        (config("dit-2.4b", LLMS[0], sp=8), "= 1 x 8 = 8 does not divide the 12 attention heads of the language model"),
        (config("dit-9.8b", LLMS[1], sp=16), "does not divide the 28 attention heads of the language model"),
        (config("dit-9.8b", LLMS[1], tp=8), "tp=8 does not divide the language model's 4 key and value heads"),
        (config("dit-9.8b-ddt", LLMS[1], tp=2), "21 attention heads of the DDT head: .*set model.ddt_num_heads"),
        (config("dit-9.8b-ddt", LLMS[1], heads=42, sp=4), "42 attention heads of the DDT head: .*set model.ddt_num_h"),
        (config("dit-2.4b", heads=16), "model.ddt_num_heads=16, but model.name='dit-2.4b' has no DDT head"),
        (config("dit-tinny"), "model.name='dit-tinny' names no model; choose one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_do_not_fit_are_refused_with_setting_reason_and_fix(run: Config, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_layout(run)


def test_an_odd_number_of_heads_is_refused_although_every_width_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    five = DiTConfig(in_channels=16, hidden_size=40, depth=1, num_heads=5, z_channels=40, grid_size=4)
    monkeypatch.setitem(zoo.DIT_ZOO, "dit-five", five)
    measure_layout(config("dit-five"))
    with pytest.raises(
        ValueError, match=r"tp x sp = 2 x 1 = 2 does not divide the 5 attention heads of the DiT: every"
    ):
        measure_layout(config("dit-five", tp=2))


def test_a_width_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LLM_ZOO, "qwen2-odd", replace(LLM_ZOO["qwen2-tiny"], intermediate_size=99))
    measure_layout(config(llm="qwen2-odd"))
    with pytest.raises(ValueError, match=r"parallel\.tp=2 does not divide .* intermediate_size=99; choose a divisor"):
        measure_layout(config(llm="qwen2-odd", tp=2))


def test_a_layer_without_a_row_in_the_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {pattern: rule for pattern, rule in SCALE_RAE.items() if pattern != "dit.blocks.*.adaln"}
    monkeypatch.setitem(shard_tables.TABLES, "ScaleRAE", without)
    measure_layout(config())
    with pytest.raises(ValueError, match=r"dit\.blocks\.0\.adaln\.weight of ScaleRAE is in no row of its shard table"):
        measure_layout(config(tp=2))
    assert not dist.is_initialized()


def test_a_wrong_row_loses_elements_and_the_sum_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven groups in a layer of six vectors: its length does not divide, and the rest is on no rank."""
    wrong = {**SCALE_RAE, "dit.blocks.*.adaln": Rule("column", groups=7)}
    monkeypatch.setitem(shard_tables.TABLES, "ScaleRAE", wrong)
    with pytest.raises(AssertionError, match="elements"):
        measure_layout(config(tp=2))


def test_no_process_group_is_left_behind_by_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("nothing here")

    monkeypatch.setattr("rae_scale.engines.fsdp2.shard_module", fails)
    with pytest.raises(OSError, match="nothing here"):
        measure_layout(config(dp_shard=2))
    assert not dist.is_initialized()
    measure_layout(config(dp_shard=2, engine={"name": "zero"}))


def test_other_stages_and_local_tokenizers(world: TinyWorld, tmp_path: Path) -> None:
    """Sizes are those of the module that would be trained."""
    changes: dict[str, Any] = {"engine__name": "fsdp2", "parallel__dp_shard": 2}
    for stage in ("encoder", "decoder", "pretrain"):
        run = world.config(tmp_path, stage=stage, **changes)
        trained = build_parts(run, torch.device("cpu")).stage.module
        total = measure_layout(run).total
        assert total.elements == {1: sum(parameter.numel() for parameter in trained.parameters())}


def test_shares_by_hand() -> None:
    rows = rows_of((5, 3), 4)  # two rows each: 2, 2, 1, none
    assert (rows.held.tolist(), rows.stored.tolist()) == ([6, 6, 3, 0], [6, 6, 6, 6])
    parts = rounded(10, 4)
    assert (parts.held.tolist(), parts.stored.tolist()) == ([3, 3, 3, 1], [3, 3, 3, 3])
    first, second = line([5, 8], 3)  # 13 elements, 18 with padding, 6 each
    assert (first.held.tolist(), first.stored.tolist()) == ([5, 0, 0], [5, 0, 0])
    assert (second.held.tolist(), second.stored.tolist()) == ([1, 6, 1], [1, 6, 6])


def held(name: str, group: GroupKey | None, *shape: int, dim: int | None = None) -> HeldParameter:
    return HeldParameter(name, "part", group, Placement(shape, dim, count=2))


TWO_BY_TWO = [held("a", DIT, 4, 6, dim=0), held("b", LLM, 6), held("c", None, 10)]


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [
        # Local elements on a tensor-parallel rank: 12 of a, 6 of b, 10 of c, the last of which is frozen.
        ({"name": "fsdp2"}, 4 * 14, 4 * 9, 8 * 9),
        ({"name": "zero", "zero_stage": 3, "precision": "bf16"}, 2 * 14 + 4 * 9, 4 * 9, 8 * 9),
        ({"name": "zero", "zero_stage": 3, "precision": "fp32"}, 4 * 14 + 4 * 9, 4 * 9, 8 * 9),
        # The line of a is 12 elements; that of b is rounded up to 8.
        ({"name": "zero", "zero_stage": 2}, 4 * 28 + 4 * 10, 4 * 10, 8 * 10),
        ({"name": "zero", "zero_stage": 1}, 4 * 28 + 4 * 10, 4 * 18, 8 * 10),
    ],
    ids=str,
)
def test_bytes_by_hand(engine: dict[str, object], weights: int, gradients: int, optimizer: int) -> None:
    run = config(dp_shard=2, tp=2, engine=engine, optim={"ema_decay": 0.99})
    part = sizes_by_part(run, TWO_BY_TWO)["part"]
    for tensor, expected in ((part.weights, weights), (part.gradients, gradients), (part.optimizer, optimizer)):
        assert tensor.tolist() == [[expected] * 2] * 2, "padding makes the last rank as large as the first"
    assert int(part.ema.sum()) == 4 * (24 + 2 * 6)
    check_sum(part, 40, 1)
    frozen = 4 if engine.get("zero_stage") in (1, 2) else 2
    assert part.elements == {1: 24, 2: 6 + 10 * (frozen == 2)} | ({4: 10} if frozen == 4 else {})


def test_accumulation_under_fsdp2_keeps_whole_gradients() -> None:
    run = config(dp_shard=2, tp=2, data={"global_batch_size": 8, "micro_batch_size": 2})
    part = sizes_by_part(run, TWO_BY_TWO)["part"]
    assert part.gradients.tolist() == [[4 * 18, 4 * 18]] * 2


def test_report() -> None:
    report = layout_report(config("dit-tiny", dp_shard=3, tp=2, optim={"ema_decay": 0.9}))
    assert "6 ranks = dp_replicate 1 x dp_shard 3 x sp 1 x tp 2" in report
    assert "rank 0 (dp_shard 0, sp 0, tp 0) holds most:" in report
    assert "holds least:" in report
    assert "language model" in report and "DiT" in report
    assert "held by all ranks together" in report


def test_report_of_what_lies_elsewhere() -> None:
    engine = {"name": "zero", "zero_hpz": 2, "offload_optimizer": True, "precision": "fp32"}
    cfg = config("dit-tiny", dp_shard=4, engine=engine)
    report = layout_report(cfg)
    assert "in host memory (engine.offload_optimizer)" in report
    elements = int(measure_layout(cfg).total.held.sum())
    assert f"(engine.zero_hpz): {elements * 4 / 2 / 1e6:,.1f} MB" in report
    assert "engine." not in layout_report(config("dit-tiny", dp_shard=4))


# What the heads allow: 12 and 2 of keys and values, 28 and 4; the DiT's 32 always divide.
ALLOWED = {
    "qwen2.5-1.5b": {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)},
    "qwen2.5-7b": {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)},
}
VARIANTS: dict[str, tuple[str, int | None, int]] = {
    # name's ending, model.ddt_num_heads, largest tp x sp
    "siglip2": ("", None, 4),
    "vae": ("-vae", None, 4),
    "ddt": ("-ddt", None, 1),
    "ddt-16": ("-ddt", 16, 4),
    "ddt-42": ("-ddt", 42, 2),
}
ENGINES: list[dict[str, Any]] = [{"name": "fsdp2"}, *({"name": "zero", "zero_stage": stage} for stage in (1, 2, 3))]


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_every_layout_of_a_published_size_closes_or_is_refused(size: str, llm: str, variant: str) -> None:
    """8 to 1024 ranks. Each split is built once, its sizes are computed for every engine and number of ranks."""
    ending, heads, limit = VARIANTS[variant]
    for tp in (1, 2, 4, 8):
        for sp in (1, 2, 4, 8, 16):
            split: dict[str, Any] = {"heads": heads, "tp": tp, "sp": sp}
            built = config(size + ending, llm, dp_shard=max(1, 64 // (tp * sp)), **split)
            if (tp, sp) not in ALLOWED[llm] or tp * sp > limit:
                with pytest.raises(ValueError, match=r"parallel\.(tp|sp).* does not divide .*; choose .*divi"):
                    measure_layout(built)
                continue
            layout = measure_layout(built)
            logical = sum(layout.total.elements.values())
            for ranks in (8, 64, 256, 1024):
                for replicas in (1, 2):
                    for engine in ENGINES[: 1 if replicas > 1 else None]:
                        dp_shard = ranks // (tp * sp * replicas)
                        run = config(
                            size + ending, llm, dp_replicate=replicas, dp_shard=dp_shard, engine=engine, **split
                        )
                        check_sum(total_of(sizes_by_part(run, layout.parameters).values()), logical, replicas)
