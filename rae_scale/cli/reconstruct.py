"""`rae-scale reconstruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rae_scale.cli.options import BatchSize, DecoderFolder, Device, Weights


def reconstruct(
    source: Annotated[
        Path, typer.Argument(help="Run file (.yaml), run folder, checkpoint or export that names encoder and decoder.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG or WebP files.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures: original left, reconstruction right.")],
    batch_size: BatchSize = 16,
    weights: Weights = None,
    decoder: DecoderFolder = None,
    device: Device = "auto",
) -> None:
    """Encode and decode your own images.

    Writes each beside its reconstruction and prints their PSNR.
    """
    import numpy as np
    from PIL import Image

    from rae_scale.infer.reconstruct import Reconstructor, psnr

    reconstructor = Reconstructor.from_source(source, weights=weights, decoder=decoder, device=device)
    originals = [reconstructor.read(path) for path in images]
    results = reconstructor.reconstruct(originals, batch_size)
    out.mkdir(parents=True, exist_ok=True)
    values = []
    for number, (path, original, result) in enumerate(zip(images, originals, results, strict=True)):
        values.append(psnr(original, result))
        # Numbered: two folders may hold files of one name.
        target = out / f"{number:05d}-{path.stem}.png"
        Image.fromarray(np.concatenate([original, result], axis=1)).save(target)
        print(f"{target}  PSNR {values[-1]:.2f} dB")
    print(f"mean PSNR {np.mean(values):.2f} dB over {len(values)} images")
