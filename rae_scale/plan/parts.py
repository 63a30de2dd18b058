"""The parameters of a configuration as its ranks hold them: by unit, and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from rae_scale.config import Config
from rae_scale.config.schema import ModelConfig
from rae_scale.engines.communication import ParameterSpec, padded_rows, specs_of
from rae_scale.engines.zero_gathers import DEEPSPEED_LIMITS, Coordinator, Event
from rae_scale.plan.models import recorded_calls, tensor_placements, trained_module
from rae_scale.plan.trace import STACKS
from rae_scale.plan.unroll import ROOT
from rae_scale.train.layout import held_parameters
from rae_scale.train.layout_sizes import FLOAT32, MOMENTS, sizes_by_part, total_of


@dataclass(frozen=True)
class Unit:
    """Elements of a block, or of what is in no block, on one tensor-parallel rank: all of them, those that train, and
    the largest tensor that does.

    held: what FSDP2 gathers, padded to the ranks; held_trained: what it reduces.
    """

    numel: int
    trained: int
    largest: int
    specs: tuple[ParameterSpec, ...]

    def padded(self, shards: int) -> tuple[int, int]:
        """All elements and those that train, with their rows padded to `shards`."""
        both = [(padded_rows(spec, shards), spec.group is not None) for spec in self.specs]
        return sum(count for count, _ in both), sum(count for count, trained in both if trained)


@cache
def units_of(stage: Any, model: ModelConfig, tp: int) -> Mapping[str, Unit]:
    """One block of each stack, and the rest, under the names of the trace."""
    module, group_of = trained_module(Config(stage=stage, model=model))
    specs = {spec.name: spec for spec in specs_of(module, group_of, tensor_placements(stage, model, tp, 0))}
    units, names = {}, dict(module.named_modules())
    for path, stack in STACKS.items():
        if isinstance(names.get(path), nn.ModuleList):
            inside = [name for name in specs if name.startswith(f"{path}.")]
            first = tuple(specs[name] for name in inside if name.startswith(f"{path}.0."))
            units[stack] = unit(first)
            for name in inside:
                del specs[name]
    return {**units, ROOT: unit(tuple(specs.values()))}


def unit(specs: tuple[ParameterSpec, ...]) -> Unit:
    trained = [spec.numel for spec in specs if spec.group is not None]
    return Unit(sum(spec.numel for spec in specs), sum(trained), max(trained, default=0), specs)


@dataclass(frozen=True)
class States:
    """Bytes that the rank which holds most holds all the time.

    masters: of the weights, the float32 ones that AdamW updates. part: of the gradients, once they are reduced.
    """

    weights: int
    masters: int
    part: int
    optimizer: int
    ema: int


_states: dict[Any, States] = {}


def states_of(config: Config) -> States:
    """By `train.layout_sizes`."""
    engine, optim, parallel = config.engine, config.optim, config.parallel
    key: tuple[Any, ...] = (
        config.stage,
        config.model,
        parallel,
        engine.name,
        engine.zero_stage,
        engine.precision,
        engine.zero_hpz,
    )
    key = (*key, optim.moments, optim.ema_decay is None, *optim.groups)
    if key not in _states:
        module, group_of = trained_module(config)
        placements = tensor_placements(config.stage, config.model, parallel.tp, 0)
        total = total_of(sizes_by_part(config, held_parameters(config, module, group_of, placements)).values())
        fullest = divmod(int(total.total.argmax()), total.total.shape[1])
        moment = 2 if optim.moments == "bf16" else FLOAT32
        optimizer = int(total.optimizer[fullest])
        part = optimizer // (MOMENTS * moment) * FLOAT32
        copy = hpz_copy(config, int(total.held.sum(dim=1).max()))
        weights = int(total.weights[fullest]) + copy
        _states[key] = States(weights, part, part, optimizer, int(total.ema[fullest]))
    return _states[key]


def hpz_copy(config: Config, elements: int) -> int:
    """Of the second copy of the parameters that `engine.zero_hpz` neighbours share."""
    engine = config.engine
    element = 2 if engine.precision == "bf16" else FLOAT32
    return elements * element // engine.zero_hpz if engine.zero_hpz > 1 else 0


class Watched(Coordinator):
    """Remembers the most elements that were whole, by phase."""

    def watch(self) -> dict[str, int]:
        """Of the last of a few micro-steps."""
        self.whole = set(self.persistent)
        for _ in range(2):
            self.phase, self.most = "forward", {"forward": 0, "backward": 0}
            self.micro_step()
        return {**self.most, "idle": sum(self.numels[name] for name in self.persistent)}

    def fetch(self, event: Event) -> None:
        if not event.forward:
            self.phase = "backward"
        super().fetch(event)
        whole = sum(self.numels[name] for name in self.whole)
        self.most[self.phase] = max(self.most[self.phase], whole)


@cache
def whole_elements(stage: Any, model: ModelConfig, tp: int, checkpointed: bool) -> dict[str, int]:
    module, group_of = trained_module(Config(stage=stage, model=model))
    specs = specs_of(module, group_of, tensor_placements(stage, model, tp, 0))
    frozen = [spec.name for spec in specs if spec.group is None]
    root = recorded_calls(stage, model, checkpointed)
    return Watched(root, {spec.name: spec.numel for spec in specs}, frozen, DEEPSPEED_LIMITS).watch()


def whole_parameters(config: Config) -> dict[str, int]:
    """Elements that ZeRO-3 holds whole at most in each phase; nothing under another engine."""
    engine = config.engine
    if engine.name != "zero" or engine.zero_stage != 3:
        return {}
    return whole_elements(config.stage, config.model, config.parallel.tp, engine.activation_checkpointing != "none")
