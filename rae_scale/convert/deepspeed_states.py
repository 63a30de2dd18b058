"""One file of a DeepSpeed ZeRO checkpoint: what it says of the optimizer, or of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae_scale.convert.file_bytes import FileBytes
from rae_scale.convert.stored import StoredTensor
from rae_scale.convert.torch_zip import TorchFile
from rae_scale.convert.unpickle import Calls, inert
from rae_scale.state.format import CheckpointError

# Beside tensors, the pickles name these, which carry settings and counters. None is run.
KNOWN: Calls = {
    "deepspeed.runtime.zero.config ZeroStageEnum": int,
    **inert(
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
        "deepspeed.utils.tensor_fragment fragment_address",
        "rae_scale.engines.optimizer GroupKey",
        "argparse Namespace",
    ),
}


@dataclass(frozen=True)
class OptimFile:
    """What one rank wrote of the optimizer.

    flats:    float32 weights, a flat tensor per parameter group; in stage 3 per sub-group of one.
    states:   AdamW's state of each: "exp_avg", "exp_avg_sq".
    steps:    how many updates each has had; None if the optimizer does not say.
    paddings: stages 1 and 2: empty elements behind each parameter of a group, if it says so.
    """

    file: TorchFile
    stage: int
    partitions: int
    flats: list[StoredTensor]
    states: list[Mapping[str, Any]]
    steps: list[int | None]
    paddings: list[list[int]] | None

    @property
    def kinds(self) -> list[list[str]]:
        """The tensors in the optimizer's state of each flat tensor."""
        return [
            sorted(name for name, value in state.items() if isinstance(value, StoredTensor)) for state in self.states
        ]


@dataclass(frozen=True)
class ModelFile:
    """What is written about the model, in the shapes that one tensor-parallel rank has.

    groups: shapes by name, in the order in which the flat tensors hold them.
    frozen: shapes and data of frozen parameters: in stage 3 this rank's part of it, flat. None: not saved apart.
    module: the state dict; in stage 3 only its buffers hold anything.
    shared: name -> the name of the parameter that it is another name of.
    """

    file: TorchFile
    groups: list[dict[str, tuple[int, ...]]]
    frozen: dict[str, tuple[tuple[int, ...], StoredTensor]] | None
    module: Mapping[str, Any]
    buffers: list[str]
    shared: Mapping[str, str]
    step: int | None
    tensor_parallel: int | None

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]] | None:
        return None if self.frozen is None else {name: shape for name, (shape, _) in self.frozen.items()}


def read_optim(path: Path) -> OptimFile:
    with structure_of(path):
        return optim_file(TorchFile(FileBytes(path), KNOWN))


def read_model(path: Path) -> ModelFile:
    with structure_of(path):
        return model_file(TorchFile(FileBytes(path), KNOWN))


@contextlib.contextmanager
def structure_of(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not built as DeepSpeed 0.19 builds its files ({type(error).__name__}: {error}); save it with "
            "DeepSpeedEngine.save_checkpoint"
        ) from None


def optim_file(file: TorchFile) -> OptimFile:
    path = file.path
    content = part(file, file.content, "optimizer_state_dict")
    if "zero_stage" not in content:
        raise CheckpointError(
            f"{path} has no 'zero_stage': it is not of ZeRO stage 1, 2 or 3; save the weights instead"
        )
    stage = content["zero_stage"]
    partitions = content.get("partition_count")
    counts = set(partitions) if isinstance(partitions, list) else {partitions}
    if len(counts) != 1:
        raise CheckpointError(f"{path}: groups are cut into {sorted(counts)} parts; experts are not read here")
    flats = part(file, content, "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", list)
    optimizer = content.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state") or {}
    states, groups = (optimizer, []) if isinstance(optimizer, list) else (optimizer["state"], optimizer["param_groups"])
    states = [states[number] for number in range(len(states))]
    if states and len(states) != len(flats):
        raise CheckpointError(f"{path} has {len(flats)} flat tensors and optimizer state of {len(states)}")
    paddings = content.get("param_alignment_paddings")
    return OptimFile(file, stage, counts.pop(), flats, states, steps_of(states, groups), paddings)


def model_file(file: TorchFile) -> ModelFile:
    content = file.content
    groups, shapes = part(file, content, "param_shapes", list), content.get("frozen_param_shapes")
    fragments = content.get("frozen_param_fragments") or {}
    return ModelFile(
        file,
        [{name: tuple(shape) for name, shape in group.items()} for group in groups],
        None if shapes is None else {name: (tuple(shape), fragments[name]) for name, shape in shapes.items()},
        content.get("module") or {},
        content.get("buffer_names") or [],
        content.get("shared_params") or {},
        content.get("global_steps"),
        content.get("mp_world_size"),
    )


def part(file: TorchFile, content: Any, key: str, kind: type = dict) -> Any:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, kind):
        raise CheckpointError(
            f"{file.path} has no {key!r}: it was saved without ZeRO's optimizer state, or by another program; save it "
            "with DeepSpeedEngine.save_checkpoint"
        )
    return found


def steps_of(states: list[Mapping[str, Any]], groups: list[Mapping[str, Any]]) -> list[int | None]:
    """Of each flat tensor: torch's AdamW counts updates beside it, DeepSpeed's and apex's in its group."""
    in_groups = {number: group.get("step") for group in groups for number in group["params"]}
    counts = [state.get("step", in_groups.get(number)) for number, state in enumerate(states)]
    return [None if count is None else int(number_of(count)) for count in counts]


def number_of(value: Any) -> float:
    return float(value.whole()) if isinstance(value, StoredTensor) else float(value)
