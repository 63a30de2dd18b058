"""A cache of encoder latents: written once (`rae_scale/train/latents/`), then read in place of the images."""

from rae_scale.data.latents.cache import LatentCache
from rae_scale.data.latents.numbers import LatentDtype, Latents, dequantise, quantise, sample_bytes

__all__ = ["LatentCache", "LatentDtype", "Latents", "dequantise", "quantise", "sample_bytes"]
