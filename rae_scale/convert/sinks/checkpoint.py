"""`--to checkpoint`: a native checkpoint with optimizer state and moving average, which training continues from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import rae_scale
from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.convert.names import Patch, Target
from rae_scale.convert.sinks import SHARD_BYTES, Entry, Job, Plan, TensorFile
from rae_scale.convert.source import Naming
from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.format import CheckpointError
from rae_scale.state.index import Index, StoredBox, TensorEntry, key
from rae_scale.state.reshard import part_file
from rae_scale.state.reshard import plan as plan_files
from rae_scale.state.save import describe
from rae_scale.train.resume import identity

ELEMENT = torch.float32.itemsize


class CheckpointSink:
    naming: Naming = "native"
    everything = True

    def plan(self, job: Job) -> Plan:
        job.whole_model("a checkpoint")
        if job.dtype != torch.float32:
            raise CheckpointError(
                f"--dtype {str(job.dtype).removeprefix('torch.')}: a checkpoint keeps float32, from which training "
                "continues; leave it out, or use --to native"
            )
        index = index_of(job)
        size = ELEMENT * sum(entry.numel for entry in index.values() for _ in entry.pieces)
        shares = plan_files(index, -(-size // SHARD_BYTES))
        files = [
            TensorFile(part_file(number), [entry_of(kind, name, box) for kind, name, box in share])
            for number, share in enumerate(shares)
        ]
        remarks = list(job.settings.remarks)
        state = state_of(job, remarks)
        if "exp_avg" not in index_kinds(index):
            remarks.append("there is no optimizer state in the source: AdamW's moments begin at zero")

        def complete(folder: Path, hashes: Mapping[str, str]) -> None:
            describe(folder, {name: entry.shape for name, entry in index.items()}, hashes, state)

        return Plan(files, complete, remarks)


def entry_of(kind: Kind, name: str, box: Box) -> Entry:
    target = Target(name, box.shape, (Patch(whole(box.shape), name, box),))
    return Entry(key(kind, name, box), kind, target, torch.float32)


def index_of(job: Job) -> Index:
    """The source's tensors, as if each lay in one piece."""
    index: Index = {}
    for kind, forms in job.source.forms.items():
        for name, form in forms.items():
            entry = index.setdefault(name, TensorEntry(form.shape))
            entry.pieces[kind] = [StoredBox(whole(form.shape), "")]
    return index


def index_kinds(index: Index) -> set[str]:
    return {kind for entry in index.values() for kind in entry.pieces}


def state_of(job: Job, remarks: list[str]) -> dict[str, Any]:
    """state.json: the source's own, or what a run needs to continue from weights that others trained."""
    if job.facts.state:
        return dict(job.facts.state)
    config, facts = job.config, job.facts
    state = {
        "config": config.model_dump(mode="json"),
        "step": facts.step or 0,
        "optimizer_step": facts.optimizer_step or 0,
        "skipped": 0,
        "layout": {"dp_replicate": 1, "dp_shard": 1, "sp": 1, "tp": 1},
        "versions": {
            "rae_scale": rae_scale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    found = identity_of(config)
    if found is None:
        remarks.append(
            "the settings name no data that is here, so a run cannot be continued from this checkpoint, only begun "
            "(run.init_from); give settings with data.sources: --config"
        )
        return state
    return {**state, "identity": found}


def identity_of(config: Config) -> dict[str, Any] | None:
    """What a continued run is compared with; None if the data of the settings is not here."""
    if not config.data.sources:
        return None
    try:
        return identity(resolve_paths(config))
    except (ValueError, OSError):
        return None
