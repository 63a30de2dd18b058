"""Encoder -> decoder on given images: what the latents keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rae_scale.config import Config, load_config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.decode import decode_image
from rae_scale.data.transforms import resize_square, to_float
from rae_scale.infer.load import STATE_KIND, Weights, find_checkpoint, stored_config
from rae_scale.infer.pipeline import for_inference, to_uint8
from rae_scale.models.encoders import FrozenEncoder, build_encoder
from rae_scale.parallel.mesh import choose_device
from rae_scale.state import read_weights
from rae_scale.train.parts import build_decode, build_stage_decoder, load_weights


class Reconstructor:
    """A frozen encoder and its decoder. `from_source` makes one."""

    def __init__(self, encoder: FrozenEncoder, decode: Callable[[Tensor], Tensor], max_pixels: int) -> None:
        """decode: latents [B, T, C] to pixels [B, 3, S, S] in [0, 1], on the encoder's device."""
        self.encoder = encoder
        self.decode = decode
        self.max_pixels = max_pixels
        self.device = next(encoder.parameters()).device

    @classmethod
    def from_source(
        cls,
        path: str | Path,
        *,
        weights: Weights = None,
        decoder: str | Path | None = None,
        device: str = "auto",
    ) -> Reconstructor:
        """Load the encoder and decoder that a run file (.yaml), run folder, checkpoint or export names.

        A checkpoint of stage `decoder` is itself the decoder; elsewhere it is that of `model.decoder.path`, unless
        `decoder` names another folder. weights: as for `TextToImage.from_checkpoint`.

        Raises:
            ValueError: nothing usable is there, or it names no decoder weights.
        """
        path, torch_device = Path(path), choose_device(device)
        checkpoint = None if path.suffix == ".yaml" else find_checkpoint(path)
        stored = load_config(path) if checkpoint is None else stored_config(checkpoint)
        config = resolve_paths(for_inference(stored, decoder))
        encoder = build_encoder(config.model.encoder).to(torch_device)
        decode: Callable[[Tensor], Tensor] | None
        if checkpoint is not None and config.stage == "decoder" and decoder is None:
            decode = decoder_of(checkpoint, config, encoder, weights)
        else:
            decode = build_decode(config, encoder, torch_device)
        if decode is None:
            raise ValueError(f"{path} sets no model.decoder.path, so latents cannot be decoded; give --decoder FOLDER")
        return cls(encoder, decode, config.data.max_pixels)

    def read(self, path: str | Path) -> NDArray[np.uint8]:
        """The image file at `path` as the encoder sees it: uint8 [S, S, 3]. Raises BadImage or FileNotFoundError."""
        image = decode_image(Path(path).read_bytes(), self.max_pixels)
        return resize_square(image, self.encoder.image_size)

    @torch.inference_mode()
    def reconstruct(self, images: Sequence[NDArray[np.uint8]], batch_size: int = 16) -> NDArray[np.uint8]:
        """Images uint8 [S, S, 3], as `read` returns them, through encoder and decoder: uint8 [N, S, S, 3]."""
        results = []
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.stack(images[start : start + batch_size])).to(self.device)
            results.append(to_uint8(self.decode(self.encoder(to_float(pixels)))))
        return np.concatenate(results)


def decoder_of(
    checkpoint: Path, config: Config, encoder: FrozenEncoder, weights: Weights
) -> Callable[[Tensor], Tensor]:
    """The decoder that a checkpoint of stage `decoder` trained."""
    fresh = config.model.decoder.model_copy(update={"path": None})
    model = config.model.model_copy(update={"decoder": fresh})
    decoder = build_stage_decoder(config.model_copy(update={"model": model}), encoder)
    load_weights(decoder, read_weights(checkpoint, STATE_KIND[weights]), str(checkpoint))
    return decoder.eval().requires_grad_(False).to(next(encoder.parameters()).device).decode


def psnr(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; infinite if they are equal."""
    error = np.square(image.astype(np.float64) - other.astype(np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
