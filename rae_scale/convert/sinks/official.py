"""`--to official`: a text-to-image model as the Scale-RAE release has it on the hub.

model-0000k-of-n.safetensors, model.safetensors.index.json   weights; a tied lm_head is spelled out, and the tables of
                                                             positions are there, as in the release
config.json                                                  model_type cambrian_qwen
tokenizer files                                              new and old format
manifest.json                                                file -> xxh3-128; the release has none and ignores it

`--to official-consolidated` writes the same weights as one model.pth, as the release's consolidate.py does before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rae_scale.config.paths import resolve_paths
from rae_scale.convert.companions import Tokenizer
from rae_scale.convert.names import table
from rae_scale.convert.official_config import to_official_config
from rae_scale.convert.sinks import Entry, Job, Plan, TensorFile
from rae_scale.convert.sinks.hub_files import weight_files, write_index, write_manifest
from rae_scale.convert.source import Naming
from rae_scale.convert.torchfile import write_torch
from rae_scale.infer.published import CONFIG_JSON
from rae_scale.state.format import write_json

CONSOLIDATED = "model.pth"


class OfficialSink:
    naming: Naming = "official"
    everything = False

    def plan(self, job: Job) -> Plan:
        job.whole_model("an official checkpoint")
        config = job.config
        described = to_official_config(config, job.settings.vocabulary)
        tokenizer = Tokenizer.of(resolve_paths(config))
        tokenizer.check_rows(job.settings.vocabulary)
        settings = described.settings | tokenizer.special_ids() | {"torch_dtype": str(job.dtype).removeprefix("torch.")}
        files = self.files(job.entries(table("official", job.module)), job.metadata)

        def complete(folder: Path, hashes: Mapping[str, str]) -> None:
            self.index(folder, files)
            write_json(folder / CONFIG_JSON, settings)
            tokenizer.write(folder)
            write_manifest(folder, hashes)

        return Plan(files, complete, [*job.settings.remarks, *described.remarks])

    def files(self, entries: list[Entry], metadata: Mapping[str, str]) -> list[TensorFile]:
        return weight_files(entries, metadata)

    def index(self, folder: Path, files: list[TensorFile]) -> None:
        write_index(folder, files)


class ConsolidatedSink(OfficialSink):
    """The same in one torch file."""

    def files(self, entries: list[Entry], metadata: Mapping[str, str]) -> list[TensorFile]:
        return [TensorFile(CONSOLIDATED, entries, write=write_torch)]

    def index(self, folder: Path, files: list[TensorFile]) -> None:
        pass  # one file needs none
