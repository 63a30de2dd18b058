"""`--to diffusers-decoder`: a decoder as diffusers' AutoencoderRAE, for `AutoencoderRAE.from_pretrained(folder)`.

diffusion_pytorch_model.safetensors   the decoder, the pixel statistics, and a placeholder for the encoder
config.json                           the sizes
README.md                             what works with it and what does not
manifest.json                         file -> xxh3-128; diffusers ignores it

No encoder of this package can be written: diffusers builds SigLIP-2 with heads of 64 channels (So400m has 72) and
MLPs of 3072 (it has 4304), and no DINOv2 without register tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rae_scale.convert.decoder_files import DIFFUSERS_VERSION, diffusers_companions, to_diffusers_config
from rae_scale.convert.names import Target, table
from rae_scale.convert.sinks import Job, Plan, TensorFile
from rae_scale.convert.sinks.hub_files import write_manifest
from rae_scale.convert.source import Naming
from rae_scale.infer.published import CARD, CONFIG_JSON
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.state.format import write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


class DiffusersDecoderSink:
    naming: Naming = "diffusers-decoder"
    everything = False

    def plan(self, job: Job) -> Plan:
        job.whole_model("an AutoencoderRAE")
        targets = table("diffusers-decoder", job.module)
        assert isinstance(job.module, ViTDecoder), "the table is of one"
        cfg = job.module.cfg
        settings = to_diffusers_config(cfg)
        beside = [Target(name, tuple(t.shape), constant=t) for name, t in diffusers_companions(cfg).items()]
        files = [TensorFile(WEIGHTS, job.entries([*beside, *targets]), {"format": "pt"})]

        def complete(folder: Path, hashes: Mapping[str, str]) -> None:
            write_json(folder / CONFIG_JSON, settings)
            (folder / CARD).write_text(readme(cfg), encoding="utf-8")
            write_manifest(folder, hashes)

        remark = "the encoder is not in the folder: it decodes, and encode() gives NaN (README.md)"
        return Plan(files, complete, [*job.settings.remarks, remark])


def readme(cfg: ViTDecoderConfig) -> str:
    return f"""# Decoder for diffusers' AutoencoderRAE

```python
from diffusers import AutoencoderRAE

autoencoder = AutoencoderRAE.from_pretrained("path/to/this/folder")
image = autoencoder.decode(latents).sample.clamp(0, 1)
```

`latents` are those of the encoder, as a grid: [B, {cfg.in_channels}, {cfg.grid_size}, {cfg.grid_size}], token
i of [B, {cfg.num_tokens}, {cfg.in_channels}] at row i // {cfg.grid_size} and column i % {cfg.grid_size}:
`tokens.transpose(1, 2).unflatten(2, ({cfg.grid_size}, {cfg.grid_size}))`. They are not normalised further.

## What does not work

`autoencoder.encode` gives NaN, on purpose. diffusers {DIFFUSERS_VERSION} builds an encoder beside every decoder, and
none that it can build is the one of these latents: its SigLIP-2 has heads of 64 channels, 18 for So400m, which has 16,
and MLPs of 3072, where So400m has 4304; released SigLIP-2 weights either do not load there or give other features. Its
DINOv2 has register tokens, which WebSSL has not. The encoder here is therefore a placeholder without layers
(`encoder_type` "mae"). Encode with the encoder itself (transformers, or `rae_scale.models.encoders`).

Pixels are denormalised with mean {list(cfg.image_mean)} and deviation {list(cfg.image_std)}, the encoder's.
"""
