"""What the latents of a cache depend on: if all of it is the same, so are they."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash
from torch import nn

from rae_scale.config import Config
from rae_scale.data.mds_reader import MDSReader
from rae_scale.models.encoders import FrozenEncoder


def latent_settings(config: Config, readers: Sequence[MDSReader], encoder: FrozenEncoder) -> dict[str, Any]:
    """By name, as they are shown if one is another. `encoder`: on the CPU, with its weights.

    A source counts by its index, which holds the hash of each of its shards. What autocast does to the encoder is part
    of the latents, so the engine's precision is, too; the kind of GPU, which changes the last bits, is not.
    """
    data = config.data
    assert data.latent_cache is not None
    return {
        **{f"index of data.sources[{number}]": reader.fingerprint for number, reader in enumerate(readers)},
        "data.crop": data.crop,
        "data.scaled_decode": data.scaled_decode,
        "data.max_pixels": data.max_pixels,
        "image size": encoder.image_size,
        "pixel mean": encoder.image_mean,
        "pixel deviation": encoder.image_std,
        "model.encoder.name": config.model.encoder.name,
        "weights of the encoder": weights_hash(encoder),
        "shape of the latents": (encoder.num_tokens, encoder.channels),
        "engine.precision": config.engine.precision,
        "data.latent_cache.dtype": data.latent_cache.dtype,
    }


def weights_hash(module: nn.Module) -> str:
    """xxh3-128 of all parameters and buffers on the CPU, wherever they were loaded from."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(-1).numpy().data)
    return digest.hexdigest()
