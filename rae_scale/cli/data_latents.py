"""`rae-scale data latents`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def latents(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file with data.latent_cache.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
) -> None:
    """Encode the images of CONFIG's sources into its data.latent_cache, as `rae-scale train` would before it begins.

    A stopped or killed one goes on where it was. Several processes (`torchrun -m rae_scale data latents ...`) share the
    images; their number need not be that of the run.
    """
    from rae_scale.config import load_config

    config = load_config(config_path, overrides or ())
    from rae_scale.train.latents.ahead import make_latents

    cache = make_latents(config)
    units = cache.units.values()
    print(
        f"{cache.folder}: latents of {sum(unit.images for unit in units):,} images of "
        f"{sum(unit.samples for unit in units):,} samples, {sum(unit.bad for unit in units):,} unusable, "
        f"{sum(unit.bytes for unit in units) / 1e9:,.3f} GB"
    )
