"""Run as a program: how much memory conversions take beside a model of many tensors.

    python peak.py FOLDER

Prints {"largest", "total", and for each way}: bytes of the largest tensor and of all, and by how much the process's own
memory (without mapped files) grew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1] / "state"))

import torch
from memory import growth_of

from rae_scale.convert import convert as convert_module
from rae_scale.convert import parts
from rae_scale.convert.convert import convert
from rae_scale.convert.settings import Settings
from rae_scale.engines import Engine, Piece
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import whole
from rae_scale.state import save_checkpoint

DECODER = ViTDecoderConfig(
    in_channels=64, hidden_size=512, depth=16, num_heads=4, intermediate_size=1024, patch_size=4, image_size=16
)
CHUNK_BYTES = 1 << 19


def main(folder: str) -> None:
    with torch.device("meta"):
        skeleton = ViTDecoder(DECODER)
    tensors = {name: torch.ones(parameter.shape) for name, parameter in skeleton.named_parameters()}
    engine = SimpleNamespace(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        optimizer_step=1,
        pieces=lambda: (Piece("weight", n, tuple(t.shape), whole(t.shape), t) for n, t in tensors.items()),
    )
    run = Path(folder) / "run"
    save_checkpoint(run, 1, cast(Engine, engine), Mesh(torch.device("cpu")), {}, keep_last=1)
    Settings.module = skeleton  # type: ignore[assignment]
    for module in (convert_module, parts):
        module.CHUNK_BYTES = CHUNK_BYTES  # type: ignore[attr-defined]
    ways: dict[str, dict[str, Any]] = {"native": {"dtype": "bfloat16"}, "checkpoint": {}, "official-decoder": {}}
    convert(run, Path(folder) / "warm", "native", verify=True)
    growth = {
        to: growth_of(lambda to=to, options=options: convert(run, Path(folder) / to, to, **options))  # type: ignore[misc]
        for to, options in ways.items()
    }
    sizes = [tensor.nbytes for tensor in tensors.values()]
    print(json.dumps({"largest": max(sizes), "total": sum(sizes), **growth}))


if __name__ == "__main__":
    main(sys.argv[1])
