"""The files of a DeepSpeed ZeRO checkpoint: which there are, and whether they are of one checkpoint.

    latest                                          the name of the newest tag
    global_step10/                                  a tag
        [bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt   flat float32 weights and moments of data-parallel rank D
        mp_rank_MM_model_states.pt                         stages 1 and 2: the model's description, and the frozen part
        zero_pp_rank_D_mp_rank_MM_model_states.pt          stage 3: the same, a file per rank

MM is the tensor-parallel rank. Written by `DeepSpeedEngine.save_checkpoint`; DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae_scale.convert.deepspeed_states import ModelFile, OptimFile, read_model, read_optim
from rae_scale.convert.torch_zip import TorchFile
from rae_scale.state.format import LATEST, CheckpointError

OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
MODEL = re.compile(r"mp_rank_()(\d+)_model_states\.pt")
OPTIM_FILES = "*_optim_states.pt"


@dataclass(frozen=True)
class Files:
    """optim[M][D] and models[M][D]; in stages 1 and 2, D of models is 0 only."""

    folder: Path
    optim: list[list[OptimFile]]
    models: list[list[ModelFile]]

    @property
    def stage(self) -> int:
        return self.optim[0][0].stage

    @property
    def shared(self) -> Mapping[str, str]:
        """Further names of parameters, which the first rank alone writes down."""
        return self.models[0][0].shared

    @property
    def all(self) -> Iterator[TorchFile]:
        yield from (entry.file for row in self.optim for entry in row)
        yield from (entry.file for row in self.models for entry in row)


def find_tag(path: Path) -> Path:
    """The folder of files in a checkpoint folder: itself, or what `latest` names.

    Raises:
        CheckpointError: there is none, or it is not clear which.
    """
    if next(path.glob(OPTIM_FILES), None) is not None:
        return path
    tags = sorted({file.parent.name for file in path.glob(f"*/{OPTIM_FILES}")})
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if tag not in tags:
            raise CheckpointError(f"{latest} names {tag!r}, and {path} has {', '.join(tags)}; give the folder of one")
        return path / tag
    if len(tags) != 1:
        raise CheckpointError(f"{path} has {', '.join(tags)} and no file {LATEST!r}; give the folder of one")
    return path / tags[0]


def open_files(folder: Path) -> Files:
    """Every file of a tag.

    Raises:
        CheckpointError: files are missing, of another kind, damaged, or of different checkpoints.
    """
    found = {path.name: path for path in sorted(folder.glob("*_states.pt"))}
    optim, of_rank, models = (by_rank(found, pattern) for pattern in (OPTIM, MODEL_OF_RANK, MODEL))
    if found:
        raise CheckpointError(
            f"{folder / min(found)}: files of experts or pipeline stages are not read here; merge them with the "
            "program that wrote them"
        )
    check_complete(folder, optim, "optim_states")
    first = read_optim(optim[min(optim)])
    models = of_rank if first.stage == 3 else models
    ranks = {tp for tp, _ in optim}
    check_complete(folder, models, "model_states")
    if {tp for tp, _ in models} != ranks or (first.stage == 3 and models.keys() != optim.keys()):
        raise CheckpointError(
            f"{folder} has optim_states of {len(optim)} ranks and model_states of {len(models)}: they are not all of "
            "one checkpoint, or some are missing; fetch the folder again"
        )
    files = Files(
        folder,
        [[read_optim(optim[key]) for key in sorted(optim) if key[0] == tp] for tp in sorted(ranks)],
        [[read_model(models[key]) for key in sorted(models) if key[0] == tp] for tp in sorted(ranks)],
    )
    check_agreement(files)
    return files


Ranks = dict[tuple[int, int], Path]
"""(tensor-parallel rank, data-parallel rank) -> file."""


def by_rank(found: dict[str, Path], pattern: re.Pattern[str]) -> Ranks:
    """The files that `pattern` fits, which are taken out of `found`."""
    ranks: Ranks = {}
    for name in list(found):
        match = pattern.fullmatch(name)
        if match is not None:
            key, path = (int(match[2]), int(match[1] or 0)), found.pop(name)
            if key in ranks:
                raise CheckpointError(f"{ranks[key]} and {path.name} are of one rank; remove the one that is left over")
            ranks[key] = path
    return ranks


def check_complete(folder: Path, ranks: Ranks, what: str) -> None:
    """There is a file for every data-parallel rank of every tensor-parallel one."""
    if not ranks:
        raise CheckpointError(f"{folder} has no *{what}.pt; fetch the folder again")
    rows, columns = 1 + max(tp for tp, _ in ranks), 1 + max(dp for _, dp in ranks)
    missing = [f"pp_rank {dp} mp_rank {tp}" for tp in range(rows) for dp in range(columns) if (tp, dp) not in ranks]
    if missing:
        raise CheckpointError(
            f"{folder} has no {what} of {', '.join(missing[:5])} ({len(missing)} of {rows * columns} are missing); "
            "every node writes its own, so fetch those of all nodes"
        )


def check_agreement(files: Files) -> None:
    """All ranks saved the same training at the same step."""
    first, world = files.optim[0][0], len(files.optim[0])
    for row in files.optim:
        for entry in row:
            if entry.partitions != world:
                raise CheckpointError(
                    f"{entry.file.path} is one of {entry.partitions} parts, and {files.folder} has those of {world} "
                    "ranks: files are missing, or left over from a run of another size; fetch the checkpoint into an "
                    "empty folder"
                )
            same(first.file, entry.file, "ZeRO stages", first.stage, entry.stage)
            same(first.file, entry.file, "numbers of updates", set(first.steps), set(entry.steps))
            same(row[0].file, entry.file, "numbers of updates", row[0].steps, entry.steps)
            same(row[0].file, entry.file, "optimizer state", row[0].kinds, entry.kinds)
    for models in files.models:
        for model in models:
            same(files.models[0][0].file, model.file, "global_steps", files.models[0][0].step, model.step)
            if model.tensor_parallel not in (None, len(files.models)):
                raise CheckpointError(
                    f"{model.file.path} is of {model.tensor_parallel} tensor-parallel ranks, and {files.folder} has "
                    f"{len(files.models)}; fetch the checkpoint into an empty folder"
                )
            same(models[0].file, model.file, "param_shapes", models[0].groups, model.groups)
            same(models[0].file, model.file, "frozen_param_shapes", models[0].frozen_shapes, model.frozen_shapes)


def same(first: TorchFile, second: TorchFile, what: str, value: Any, other: Any) -> None:
    if value != other:
        shown = f" {value} and {other}" if len(f"{value}{other}") < 100 else ""
        raise CheckpointError(
            f"{first.path} and {second.path.name} have different {what}{shown}: they are files of two checkpoints; "
            "fetch all of one into an empty folder"
        )


def optimizer_step(files: Files) -> int | None:
    """How many updates were made: the most of any parameter, since one may have been frozen for a while."""
    return max((step for row in files.optim for step in row[0].steps if step is not None), default=None)
