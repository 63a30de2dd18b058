"""`--to official-decoder`: a decoder as the RAE release has it.

model.pt       the weights as `torch.save` writes them, query, key and value apart, position table included
config.json    a ViT-MAE's, with the encoder's pixel statistics beside
manifest.json  file -> xxh3-128; the release has none and ignores it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rae_scale.convert.decoder_files import to_rae_config
from rae_scale.convert.names import table
from rae_scale.convert.sinks import Job, Plan, TensorFile
from rae_scale.convert.sinks.hub_files import write_manifest
from rae_scale.convert.source import Naming
from rae_scale.convert.torchfile import write_torch
from rae_scale.infer.published import CONFIG_JSON
from rae_scale.models.decoder import ViTDecoder
from rae_scale.state.format import write_json

WEIGHTS = "model.pt"


class OfficialDecoderSink:
    naming: Naming = "official-decoder"
    everything = False

    def plan(self, job: Job) -> Plan:
        job.whole_model("a decoder file")
        entries = job.entries(table("official-decoder", job.module))
        assert isinstance(job.module, ViTDecoder), "the table is of one"
        settings = to_rae_config(job.module.cfg)

        def complete(folder: Path, hashes: Mapping[str, str]) -> None:
            write_json(folder / CONFIG_JSON, settings)
            write_manifest(folder, hashes)

        return Plan([TensorFile(WEIGHTS, entries, write=write_torch)], complete, job.settings.remarks)
