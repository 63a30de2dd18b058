"""Whether a configured model can be laid out over its ranks, and what each of them would hold of it.

Nothing is allocated and no other process is needed: parameters are on the meta device, and torch's fake process group
stands in for the run's ranks, while the passes that make the model parallel are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.config.schema import ParallelConfig
from rae_scale.engines.optimizer import group_parameters
from rae_scale.models.composite import build_scale_rae, group_of
from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.parallel_limits import parallel_problems
from rae_scale.models.zoo import dit_config
from rae_scale.parallel import Mesh, parallelize
from rae_scale.parallel.fake import fake_ranks
from rae_scale.parallel.placement import Placement
from rae_scale.train.layout_sizes import (
    FLOAT32,
    HeldParameter,
    PartSizes,
    check_sum,
    shares,
    sizes_by_part,
    total_of,
)
from rae_scale.train.meta import build_parts_on_meta, without_weights
from rae_scale.train.parts import GENERATION_STAGES, load_stage_tokenizer

PARTS = {  # the first prefix that fits counts
    "conditioner.llm.": "language model",
    "conditioner.": "queries, connector",
    "connector.": "queries, connector",
    "dit.head.": "DDT head",
    "dit.": "DiT",
}


def check_layout(config: Config) -> None:
    """Refuse tensor and sequence parallel sizes that the named models do not allow, before anything is built.

    Raises:
        ValueError: a line per problem: setting, value, why, fix. Or a model's settings make no model.
    """
    if config.stage not in GENERATION_STAGES:
        return
    dit, llm = dit_config(config.model), LLM_ZOO.get(config.model.llm.name)
    if llm is None:
        return  # building it says what there is
    problems = parallel_problems(dit, llm, tp=config.parallel.tp, sp=config.parallel.sp)
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Layout:
    """The parameters as tensor parallelism leaves them, and what the ranks of a run hold, by part of the model."""

    parameters: list[HeldParameter]
    sizes: dict[str, PartSizes]

    @property
    def total(self) -> PartSizes:
        return total_of(self.sizes.values())


def measure_layout(config: Config, rank: int = 0) -> Layout:
    """Build the model as `rank` of the run would, without memory, and say what every rank holds.

    Raises:
        ValueError: the model cannot be laid out over these sizes, or settings name no model.
    """
    check_layout(config)
    module, find_group = build_module(config)
    logical = sum(parameter.numel() for parameter in module.parameters())
    with fake_ranks(config.parallel, rank) as mesh:
        placements = parallelize(module, mesh)
        parameters = held_parameters(config, module, find_group, placements)
        if config.engine.name == "fsdp2":
            # Here, since it brings DTensor, half a second of imports that a plan does without.
            from rae_scale.engines.fsdp2 import fsdp_mesh, shard_module

            shard_module(module, fsdp_mesh(mesh), config.engine.precision)
            check_shards(config, module, parameters, mesh)
    sizes = sizes_by_part(config, parameters)
    check_sum(total_of(sizes.values()), logical, config.parallel.dp_replicate)
    return Layout(parameters, sizes)


def build_module(config: Config) -> tuple[nn.Module, Callable[[str], str]]:
    """The module that the stage trains, and what tells the optimizer group of its parameters; on the meta device.

    The encoder's latents are taken to fit the DiT. Without a tokenizer in a local folder, the language model has the
    rows of its published vocabulary.
    """
    resolved = without_weights(resolve_paths(config))
    if config.stage not in GENERATION_STAGES:
        stage = build_parts_on_meta(resolved).stage
        return stage.module, stage.group_of
    dit, tokenizer = dit_config(config.model), resolved.model.llm.tokenizer
    vocab = len(load_stage_tokenizer(resolved)) if tokenizer is not None and Path(tokenizer).is_dir() else None
    with torch.device("meta"):
        return build_scale_rae(resolved.model, dit.in_channels, dit.num_tokens, vocab), group_of


def held_parameters(
    config: Config, module: nn.Module, find_group: Callable[[str], str], placements: Mapping[str, Placement]
) -> list[HeldParameter]:
    groups = group_parameters(module, find_group, config.optim, placements)
    group_of_name = {name: key for key, members in groups.items() for name, _ in members}
    return [
        HeldParameter(name, part_of(name), group_of_name.get(name), placements[name])
        for name, _ in module.named_parameters()
    ]


def part_of(name: str) -> str:
    """What the report calls the part of the model that a parameter belongs to."""
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), name.partition(".")[0])


def check_shards(config: Config, module: nn.Module, parameters: list[HeldParameter], mesh: Mesh) -> None:
    """The arithmetic for this rank is what fully_shard did."""
    shapes = {p.name: p.local_shape(mesh.tp_rank) for p in parameters}
    assert mesh.device_mesh is not None
    sharded, index = dict(module.named_parameters()), mesh.device_mesh["shard"].get_local_rank()
    for p, shared in zip(parameters, shares(config, parameters, shapes), strict=True):
        local = sharded[p.name].to_local()
        real = local.numel(), local.untyped_storage().nbytes()
        expected = int(shared.held[index]), FLOAT32 * int(shared.stored[index])
        assert real == expected, (p.name, real, expected)


def layout_report(config: Config) -> str:
    """`measure_layout` in lines of text; bytes in MB of 10^6."""
    layout = measure_layout(config)
    total = layout.total
    parallel, engine = config.parallel, config.engine
    name = f"zero stage {engine.zero_stage}" if engine.name == "zero" else engine.name
    lines = [
        f"stage {config.stage}, engine {name}, {engine.precision}; {parallel.world_size} ranks = dp_replicate "
        f"{parallel.dp_replicate} x dp_shard {parallel.dp_shard} x sp {parallel.sp} x tp {parallel.tp}",
    ]
    per_rank = total.total.flatten()
    shown = {int(per_rank.argmax()): "most", int(per_rank.argmin()): "least"}
    if len(shown) == 1:
        shown = {0: "as much as every other"}
    for index, what in shown.items():
        tp_rank, shard = divmod(index, total.total.shape[1])
        lines += ["", f"{place(parallel, tp_rank, shard)} holds {what}:", HEADER]
        for part, sizes in {**layout.sizes, "all": total}.items():
            columns = (sizes.weights, sizes.gradients, sizes.optimizer, sizes.ema, sizes.total)
            megabytes = "".join(f"{int(column[tp_rank, shard]) / 1e6:>12,.1f}" for column in columns)
            lines.append(f"{part:<20}{int(sizes.held[tp_rank, shard]):>18,}{megabytes}")
    return "\n".join([*lines, "", *describe_sum(total, parallel), *describe_elsewhere(config, total)])


HEADER = f"{'':<20}{'elements':>18}" + "".join(
    f"{title:>12}" for title in ("weights MB", "gradients", "optimizer", "EMA", "sum MB")
)


def place(parallel: ParallelConfig, tp_rank: int, shard: int) -> str:
    """Which rank that is, of the first replica."""
    dp_shard, sp = divmod(shard, parallel.sp)
    return f"rank {shard * parallel.tp + tp_rank} (dp_shard {dp_shard}, sp {sp}, tp {tp_rank})"


def describe_sum(total: PartSizes, parallel: ParallelConfig) -> list[str]:
    held = int(total.held.sum()) * parallel.dp_replicate
    terms = " + ".join(f"{elements:,} x {copies}" for copies, elements in sorted(total.elements.items()))
    return [
        f"the whole model: {sum(total.elements.values()):,} parameters, padding included",
        f"held by all ranks together: {held:,} = {terms} rank(s) with the same elements",
    ]


def describe_elsewhere(config: Config, total: PartSizes) -> list[str]:
    """What the columns do not show: what is in host memory, and a second copy of the parameters."""
    lines = []
    if config.engine.offload_optimizer:
        lines.append(
            "in host memory (engine.offload_optimizer): the float32 weights that AdamW updates, its moments and the "
            "moving average"
        )
    if config.engine.zero_hpz > 1:
        element = 2 if config.engine.precision == "bf16" else FLOAT32
        copy = int(total.held.sum(dim=1).max()) * element / config.engine.zero_hpz
        lines.append(f"beside this, a copy of the parameters (engine.zero_hpz): {copy / 1e6:,.1f} MB on every rank")
    return lines
