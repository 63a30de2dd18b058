"""The passes that make a model parallel, in their order: split layers over tp, then slice tokens over sp."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator

from torch import nn

from rae_scale.models import blocks
from rae_scale.models.blocks import Attention
from rae_scale.models.packing import IGNORE_LABEL
from rae_scale.models.parallel_limits import parallel_problems
from rae_scale.models.shard_tables import TABLES, Rule, Table
from rae_scale.parallel import tensor
from rae_scale.parallel.collectives import SumGradient
from rae_scale.parallel.mesh import Mesh
from rae_scale.parallel.placement import Placement
from rae_scale.parallel.ulysses import TokenSlice, UlyssesAttention, slice_qwen2

LINEAR_TWINS = {
    "column": tensor.ColumnLinear,
    "copy-column": tensor.CopyColumnLinear,
    "gather-column": tensor.GatherColumnLinear,
    "scatter-row": tensor.ScatterRowLinear,
    "sum-row": tensor.SumRowLinear,
}
NORM_TWINS = {
    blocks.ModulatedRMSNorm: tensor.SlicedModulatedRMSNorm,
    blocks.ResidualModulatedRMSNorm: tensor.SlicedResidualModulatedRMSNorm,
}
Place = Callable[[nn.Parameter, int | None, int], nn.Parameter]
"""(parameter, dimension to split, packed tensors) -> this rank's part of it."""


def parallelize(module: nn.Module, mesh: Mesh) -> dict[str, Placement]:
    """Make `module` compute its part of the work of `mesh`, in place; where each parameter's part lies, by name.

    module: with whole parameters, the same on all ranks.

    Raises:
        ValueError: the model cannot be split over these sizes, or not at all.
    """
    if mesh.tp * mesh.sp > 1:
        check_can_be_split(module, mesh)
    placements = {name: Placement(tuple(p.shape), count=mesh.tp) for name, p in module.named_parameters()}
    if mesh.tp > 1:
        placements = split_layers(module, TABLES[type(module).__name__], mesh)
    if mesh.sp > 1:
        slice_tokens(module, mesh)
    return placements


def check_can_be_split(module: nn.Module, mesh: Mesh) -> None:
    if type(module).__name__ not in TABLES:
        raise ValueError(
            f"parallel.tp={mesh.tp}, parallel.sp={mesh.sp}: {type(module).__name__} is small and runs with data "
            "parallelism only; set both to 1 and raise parallel.dp_shard"
        )
    problems = parallel_problems(module.dit.cfg, module.conditioner.llm.config, tp=mesh.tp, sp=mesh.sp)
    if problems:
        raise ValueError("\n".join(problems))


def split_layers(module: nn.Module, table: Table, mesh: Mesh) -> dict[str, Placement]:
    """Replace the layers that `table` names by their tensor-parallel twins.

    Raises:
        ValueError: the table says nothing of a parameter.
    """
    rules = dict(rules_of(module, table))
    check_covered(module, rules)
    placement_of: dict[nn.Parameter, Placement] = {}
    parts: dict[nn.Parameter, nn.Parameter] = {}

    def place(parameter: nn.Parameter, dim: int | None, groups: int) -> nn.Parameter:
        if parameter not in parts:  # tied weights stay tied
            placement = Placement(tuple(parameter.shape), dim, groups, mesh.tp_rank, mesh.tp)
            part = nn.Parameter(placement.slice(parameter.detach()), requires_grad=parameter.requires_grad)
            parts[parameter], placement_of[part] = part, placement
        return parts[parameter]

    own = {name for name, _ in module.named_parameters()}
    for name, rule in rules.items():
        if rule.kind == "buffer":
            buffer = module.get_buffer(name)
            placement = Placement(tuple(buffer.shape), buffer.ndim - 1, 1, mesh.tp_rank, mesh.tp)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, placement.slice(buffer))
            continue
        if name in own:
            continue
        layer = module.get_submodule(name)
        if rule.kind != "whole" and next(layer.parameters(), None) is not None:
            layer = twin(layer, rule, place, mesh)
            module.set_submodule(name, layer, strict=True)
        if rule.feeds_split:
            layer.register_forward_hook(lambda _module, _inputs, output: SumGradient.apply(output, mesh.tp_group))
    llm = module.conditioner.llm
    module.conditioner.cross_entropy = tensor.VocabularyCrossEntropy(mesh.tp_group, llm.config.vocab_size, IGNORE_LABEL)
    return {
        name: placement_of.get(p, Placement(tuple(p.shape), None, 1, mesh.tp_rank, mesh.tp))
        for name, p in module.named_parameters()
    }


def rules_of(module: nn.Module, table: Table) -> Iterator[tuple[str, Rule]]:
    """Everything of `module` that a pattern of `table` names."""
    everything = module.named_modules(), module.named_buffers(), module.named_parameters()
    names = [name for named in everything for name, _ in named]
    for pattern, rule in table.items():
        for name in fnmatch.filter(names, pattern):
            yield name, rule


def check_covered(module: nn.Module, rules: dict[str, Rule]) -> None:
    """A layer that was forgotten in the table would be computed by each rank as if it were alone."""
    for name, _ in module.named_parameters():
        parents = [name[:end] for end, character in enumerate(name) if character == "."]
        if not any(known in rules for known in (name, *parents)):
            raise ValueError(
                f"parameter {name} of {type(module).__name__} is in no row of its shard table "
                "(rae_scale/models/shard_tables.py); add what becomes of its layer under tensor parallelism"
            )


def twin(layer: nn.Module, rule: Rule, place: Place, mesh: Mesh) -> nn.Module:
    """The tensor-parallel twin of a layer, with this rank's part of its parameters."""
    group = mesh.tp_group
    assert group is not None
    weight = place(layer.weight, rule.split_dim("weight"), rule.groups)
    if rule.kind == "norm":
        return NORM_TWINS[type(layer)](weight, group, len(layer.weight))
    if rule.kind == "shared-norm":
        return tensor.SharedHeadNorm(weight, group)
    if rule.kind == "embedding":
        return tensor.VocabularyEmbedding(weight, group, layer.num_embeddings)
    bias = None if layer.bias is None else place(layer.bias, rule.split_dim("bias"), rule.groups)
    return LINEAR_TWINS[rule.kind](weight, bias, group)


def slice_tokens(module: nn.Module, mesh: Mesh) -> None:
    """Give every rank of the sequence axis its slice of text and image tokens, and attention the means to see all."""
    group = mesh.sp_group
    assert group is not None
    module.tokens = module.conditioner.tokens = TokenSlice(group)
    for part in module.dit.modules():
        if isinstance(part, Attention):
            part.attention = UlyssesAttention(part.attention, group)
    slice_qwen2(module.conditioner.llm, group)
