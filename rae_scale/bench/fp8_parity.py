"""Does training in 8 bits follow training in bfloat16? The same DiT, data and noise in three precisions.

    python -m rae_scale.bench.fp8_parity --model dit-demo --steps 50

On a GPU the products are 8-bit ones, on a CPU torchao imitates them. The data are a few fixed latents, each with its
own condition, so a DiT learns them within some dozens of steps. bfloat16 against float32 says how much a difference
of rounding makes in any case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rae_scale.config.schema import EngineConfig, GroupConfig, ModelConfig, OptimConfig
from rae_scale.engines import Engine, build_engine
from rae_scale.models.dit import DiT
from rae_scale.models.zoo import build_dit
from rae_scale.parallel import Mesh

Precision = Literal["fp32", "bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8")
PICTURES = 8
TAIL = 10
"""The last losses, of which the mean is compared."""
OPTIM = OptimConfig(groups={"dit": GroupConfig(lr=1e-3, betas=(0.9, 0.95))})

BuildDiT = Callable[[], DiT]


class Denoiser(nn.Module):
    """The DiT, called as an engine calls its module."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t: [B, T, C]; t: [B]; condition: [B, T, z]. Velocity [B, T, C]."""
        return self.dit.forward_tokens(x_t, t, condition)


def compare(build: BuildDiT, steps: int, batch: int, device: torch.device, compiled: bool = False) -> dict[str, Any]:
    """Losses of `steps` steps in each precision, and the relative differences of their last ones.

    build: the DiT with its first weights, the same in each call. compiled: engine.compile=blocks.
    """
    losses = {precision: train(build(), precision, steps, batch, device, compiled) for precision in PRECISIONS}
    last = {precision: sum(values[-TAIL:]) / len(values[-TAIL:]) for precision, values in losses.items()}
    return {
        "losses": losses,
        "last": last,
        "fp8_against_bf16": last["fp8"] / last["bf16"] - 1,
        "bf16_against_fp32": last["bf16"] / last["fp32"] - 1,
    }


def train(
    dit: DiT, precision: Precision, steps: int, batch: int, device: torch.device, compiled: bool = False
) -> list[float]:
    cfg = EngineConfig(
        precision="fp32" if precision == "fp32" else "bf16",
        fp8=precision == "fp8",
        compile="blocks" if compiled else "none",
    )
    generator = torch.Generator().manual_seed(0)
    shape = (PICTURES, dit.cfg.num_tokens)
    pictures = torch.randn(*shape, dit.cfg.in_channels, generator=generator).to(device)
    conditions = torch.randn(*shape, dit.cfg.z_channels, generator=generator).to(device)
    engine = build_engine(cfg, OPTIM, Denoiser(dit), lambda name: "dit", Mesh(device))
    losses = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch, device=device) % PICTURES
        losses.append(train_step(engine, pictures[rows], conditions[rows], generator))
    engine.close()
    return losses


def train_step(engine: Engine, x: Tensor, condition: Tensor, generator: torch.Generator) -> float:
    """One step of flow matching on x [B, T, C]; times and noise come from `generator`. Returns the loss."""
    t = torch.rand(len(x), generator=generator).to(x.device)
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    x_t = torch.lerp(x, eps, t[:, None, None])
    with engine.autocast():
        loss = (engine.module(x_t, t, condition).float() - (eps - x)).square().mean()
    engine.backward(loss, last=True)
    engine.step({"dit": OPTIM.groups["dit"].lr})
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-demo", help="a named DiT (`rae-scale model list`)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="under engine.compile=blocks")
    args = parser.parse_args()

    def build() -> DiT:
        torch.manual_seed(0)
        return build_dit(ModelConfig(name=args.model))

    result = compare(build, args.steps, args.batch, torch.device(args.device), args.compile)
    print(json.dumps({"model": args.model, "steps": args.steps, "device": args.device, **result}, indent=2))


if __name__ == "__main__":
    main()
