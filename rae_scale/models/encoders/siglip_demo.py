"""The demo's own encoder: a ViT small enough for a CPU, trained like SigLIP-2 (`contrastive.py`), then frozen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale import ops
from rae_scale.models.blocks import Attention, AttentionFn, check_heads, init_linear
from rae_scale.models.decoder import MLP
from rae_scale.models.encoders.base import FrozenEncoder

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
NORM_EPS = 1e-6
POSITION_STD = 0.02


@dataclass(frozen=True)
class SiglipDemoConfig:
    """Dimensions, named as in a Hugging Face vision config; `channels` is the width of the latents.

    ValueError if the heads do not fit `hidden_size` or the patches do not fit `image_size`.
    """

    image_size: int = 64
    patch_size: int = 16
    channels: int = 64
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4

    def __post_init__(self) -> None:
        check_heads("siglip-demo", self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"siglip-demo: image_size={self.image_size} does not divide by patch_size={self.patch_size}; choose "
                f"{self.image_size - self.image_size % self.patch_size} or another patch_size"
            )

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, [B, T, hidden] to [B, T, hidden]."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, attention: AttentionFn = ops.attention
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm=False, attention=attention)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SiglipDemoEncoder(FrozenEncoder):
    """Patches -> a few transformer blocks -> one narrow latent per patch.

    Like SigLIP-2's in the paper's use, the latents leave through a LayerNorm without parameters: every token has mean 0
    and variance 1, the scale that the DiT's noise is mixed with.
    """

    def __init__(self, cfg: SiglipDemoConfig) -> None:
        super().__init__(
            image_size=cfg.image_size,
            num_tokens=cfg.num_tokens,
            channels=cfg.channels,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        )
        self.cfg = cfg
        self.patch_embed = nn.Linear(3 * cfg.patch_size**2, cfg.hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(cfg.num_tokens, cfg.hidden_size) * POSITION_STD)
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg.hidden_size, cfg.num_attention_heads, cfg.intermediate_size)
            for _ in range(cfg.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(cfg.hidden_size)
        self.to_latent = nn.Linear(cfg.hidden_size, cfg.channels)
        init_linears(self)

    def encode(self, images: Tensor) -> Tensor:
        x = self.patch_embed(patchify(images, self.cfg.patch_size)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        latents = self.to_latent(self.norm(x))
        return F.layer_norm(latents, latents.shape[-1:], eps=NORM_EPS)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights and the dimensions to `folder`, for `load_siglip_demo`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.cfg), indent=2) + "\n", encoding="utf-8")


def init_linears(module: nn.Module) -> None:
    """Xavier weights and zero biases for every Linear below `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init_linear(part)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, 3, S, S] to patches [B, T, patch * patch * 3], as the ViT decoder orders them (rows, colours last)."""
    tiles = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, 3, grid, patch, grid, patch]
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def load_siglip_demo(path: str | None) -> SiglipDemoEncoder:
    """A new encoder with random weights, or the one that `SiglipDemoEncoder.save_pretrained` wrote to folder `path`.

    ValueError if a file is missing or does not fit.
    """
    if path is None:
        return SiglipDemoEncoder(SiglipDemoConfig())
    try:
        cfg = SiglipDemoConfig(**json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8")))
        encoder = SiglipDemoEncoder(cfg)
        encoder.load_state_dict(load_file(Path(path) / WEIGHTS_FILE))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model.encoder.path={path!r} holds no siglip-demo encoder ({error}); give the folder with {CONFIG_FILE} "
            f"and {WEIGHTS_FILE} that the encoder stage wrote"
        ) from error
    return encoder
