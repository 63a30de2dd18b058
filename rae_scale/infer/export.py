"""Weights out of a checkpoint, in the form in which the settings that take them expect them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rae_scale.config.paths import resolve_paths
from rae_scale.convert.convert import convert
from rae_scale.infer.load import STATE_KIND, Weights, find_checkpoint, stored_config
from rae_scale.models.encoders import build_encoder
from rae_scale.models.encoders.siglip_demo import SiglipDemoEncoder
from rae_scale.state import CheckpointError, read_weights
from rae_scale.train.parts import load_weights

VISION = "vision."  # the part of stage `encoder` that outlives it; the rest only trains it


def export(
    path: str | Path,
    out: str | Path,
    *,
    weights: Weights = None,
    dtype: str = "float32",
    prefixes: Sequence[str] | None = None,
) -> Path:
    """Write the weights of a checkpoint (or of a run's newest) to the new folder `out` and return it.

    Stages `pretrain`, `finetune`: for `run.init_from` and `rae-scale sample`. Stage `decoder`: for
    `model.decoder.path`. Stage `encoder`: the vision part alone, float32, for `model.encoder.path`.
    prefixes: only the tensors whose names begin with one of these.

    Raises:
        ValueError: there is no checkpoint, it is damaged or lacks what is asked for, or `out` exists.
    """
    checkpoint, out = find_checkpoint(path), Path(out)
    config = stored_config(checkpoint)
    if config.stage != "encoder":
        return convert(checkpoint, out, "native", weights=STATE_KIND[weights], dtype=dtype, only=prefixes).out
    if out.exists():
        raise CheckpointError(f"{out} exists; export into a new folder, or remove that one first")
    # With its path: a run that began from an encoder of other sizes has trained one of these.
    encoder = build_encoder(resolve_paths(config).model.encoder)
    assert isinstance(encoder, SiglipDemoEncoder), "stage encoder trains no other"
    load_weights(encoder, read_weights(checkpoint, STATE_KIND[weights], VISION), str(checkpoint))
    # Under another name until it is whole.
    partial = out.with_name(f"{out.name}.partial")
    encoder.save_pretrained(partial)
    return partial.rename(out)
