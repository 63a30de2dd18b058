"""`--to native`: weights alone under our names, for `run.init_from`, `model.decoder.path` and `rae-scale sample`.

model.safetensors   one kind of weights; its metadata says which, and of which step
config.yaml         the settings that they were trained with
manifest.json       file -> xxh3-128
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
import yaml

from rae_scale.convert.names import Patch, Target
from rae_scale.convert.sinks import Job, Plan, TensorFile
from rae_scale.convert.source import Naming
from rae_scale.parallel.boxes import whole
from rae_scale.state.format import CONFIG, EXPORTED, MANIFEST, CheckpointError, write_json


class NativeSink:
    naming: Naming = "native"
    everything = False

    def plan(self, job: Job) -> Plan:
        config = settings_tree(job)
        if config.get("stage") == "encoder":
            raise CheckpointError(
                f"{job.source.what} is of stage encoder, of which the vision part alone is used; write it with "
                "`rae-scale checkpoint export`"
            )
        entries = job.entries(own_target(name, form.shape) for name, form in job.source.forms["weight"].items())

        def complete(folder: Path, hashes: Mapping[str, str]) -> None:
            data = yaml.safe_dump(config, sort_keys=False).encode()
            (folder / CONFIG).write_bytes(data)
            write_json(folder / MANIFEST, {**hashes, CONFIG: xxhash.xxh3_128_hexdigest(data)})

        return Plan([TensorFile(EXPORTED, entries, job.metadata)], complete, job.settings.remarks)


def settings_tree(job: Job) -> dict[str, Any]:
    """Our settings as they are written down: word for word those of the source, if it has some."""
    if job.settings.given is None and job.facts.config is not None:
        return dict(job.facts.config)
    if job.settings.given is None and job.settings.source.naming == "native":
        return {}  # tensors under our names need no settings to be named
    return job.config.model_dump(mode="json")


def own_target(name: str, shape: tuple[int, ...]) -> Target:
    return Target(name, shape, (Patch(whole(shape), name, whole(shape)),))
