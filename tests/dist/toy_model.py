"""A small model with the shape of ScaleRAE, and data for it: what the engines are tested with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale.config.schema import EngineConfig, GroupConfig, OptimConfig
from rae_scale.engines import Engine, StepResult

WIDTH, VOCAB, LENGTH, CHANNELS = 12, 17, 6, 5  # odd sizes: shards end in the middle of rows and parameters
LRS = {"llm": 1e-2, "dit": 2e-2}


class ToyOutput(NamedTuple):
    velocity: Tensor
    text_loss_sum: Tensor


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x) if condition is None else self.norm(x) * (1 + condition)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Conditioner(nn.Module):
    """Tied embedding and head, a parameter of its own, a frozen projector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.queries = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.projector = nn.Linear(CHANNELS, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) + self.queries + self.projector(features)
        for layer in self.layers:
            x = layer(x)
        return x, F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


class Denoiser(nn.Module):
    """Entered by `forward_tokens`, as the DiT is: no hook of the module itself runs."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embed = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.final = nn.Linear(WIDTH, CHANNELS)

    def forward_tokens(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.x_embed(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.final(hidden)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conditioner = Conditioner()
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.dit = Denoiser()

    def forward(self, *, ids: Tensor, features: Tensor, x: Tensor) -> ToyOutput:
        states, text_loss_sum = self.conditioner(ids, features)
        return ToyOutput(self.dit.forward_tokens(x, self.connector(states)), text_loss_sum)

    def condition(self, ids: Tensor, features: Tensor) -> Tensor:
        return self.connector(self.conditioner(ids, features)[0])


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def group_of(name: str) -> str:
    return "llm" if name.startswith("conditioner.") else "dit"


def optim(max_grad_norm: float = 0.5, ema_decay: float | None = 0.9) -> OptimConfig:
    """Clipping bites in most steps. A large eps: AdamW divides gradients by their size, and where the true gradient is
    0 (attention is blind to the key bias) a small one makes rounding errors into full steps."""
    return OptimConfig(
        groups={
            "llm": GroupConfig(lr=1.0, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.01),
            "dit": GroupConfig(lr=1.0, betas=(0.8, 0.95), eps=1e-3),
        },
        max_grad_norm=max_grad_norm,
        ema_decay=ema_decay,
    )


def engine_config(name: str, stage: int = 3, precision: str = "fp32", checkpointing: str = "none") -> EngineConfig:
    return EngineConfig(name=name, zero_stage=stage, precision=precision, activation_checkpointing=checkpointing)


class ToyBatch(NamedTuple):
    ids: Tensor
    features: Tensor
    x: Tensor
    target: Tensor


def micro_batches(step: int, rank: int, world: int, count: int, size: int = 8) -> Iterator[ToyBatch]:
    """This rank's micro-batches of global step `step`: the same `size` samples at every world and count."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCAB, (size, LENGTH), generator=generator)
    features, x, target = torch.randn(3, size, LENGTH, CHANNELS, generator=generator)
    batch = ToyBatch(ids, features, x, target)
    for part in zip(*(tensor.chunk(world)[rank].chunk(count) for tensor in batch), strict=True):
        yield ToyBatch(*part)


def loss_of(engine: Engine, batch: ToyBatch, size: int = 8) -> Tensor:
    """This micro-batch's share of the global loss: a sum over its samples of means over all samples."""
    with engine.autocast():
        output = engine.module(ids=batch.ids, features=batch.features, x=batch.x)
        flow = (output.velocity.float() - batch.target).square().mean(dim=(1, 2)).sum() / size
        return 2 * flow + output.text_loss_sum / (size * (LENGTH - 1))


def train_step(
    engine: Engine, step: int, rank: int, world: int, count: int, spoil: Callable[[Tensor], Tensor] = lambda loss: loss
) -> tuple[float, StepResult]:
    """One step in `count` micro-steps. Returns this rank's part of the loss and the engine's result."""
    total = 0.0
    batches = list(micro_batches(step, rank, world, count))
    for number, batch in enumerate(batches, start=1):
        loss = spoil(loss_of(engine, batch))
        engine.backward(loss, last=number == len(batches))
        total += float(loss.detach())
    return total, engine.step(LRS)
