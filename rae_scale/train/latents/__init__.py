"""Makes the latent cache of `data.latent_cache` (read by `rae_scale/data/latents/`)."""

from rae_scale.train.latents.build import prepare_latents

__all__ = ["prepare_latents"]
