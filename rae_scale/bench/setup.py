"""A model, an engine and synthetic inputs: a training step without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rae_scale.config import Config, parse_config
from rae_scale.config.schema import ParallelConfig
from rae_scale.engines import Engine, build_engine
from rae_scale.flow.loss import flow_loss
from rae_scale.models.composite import build_connector, build_scale_rae, group_of
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.flops import dit_cost, linear, llm_cost
from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.packing import IGNORE_LABEL
from rae_scale.models.zoo import DIT_ZOO, dit_config
from rae_scale.parallel import Mesh

WEIGHT_STD = 0.02

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class StepSetup:
    """What is stepped. overrides: of any setting, as in `rae-scale train`; they win over the arguments before them.

    batch: images of the whole step, over all ranks and micro-batches. tokens: per image, a square; None is the model's
    own grid. text_tokens: of a caption, with_llm.
    """

    model: str = "dit-2.4b"
    batch: int = 64
    tokens: int | None = None
    with_llm: bool = False
    llm: str = "qwen2.5-1.5b"
    text_tokens: int = 128
    overrides: tuple[str, ...] = ()

    def config(self) -> Config:
        """
        Raises:
            ValueError: there is no such model, or an override is no setting.
        """
        if self.model not in DIT_ZOO:
            raise ValueError(f"--model={self.model!r} names no DiT; choose one of {', '.join(DIT_ZOO)}")
        tree: dict[str, Any] = {
            "model": {"name": self.model, "llm": {"name": self.llm}},
            "data": {"global_batch_size": self.batch},
            "engine": {"name": "eager", "precision": "bf16"},
        }
        return parse_config(tree, self.overrides, origin="bench step")

    def with_overrides(self, more: Sequence[str]) -> StepSetup:
        return replace(self, overrides=(*self.overrides, *more))

    def dit(self, config: Config) -> DiTConfig:
        named = dit_config(config.model)
        if self.tokens is None:
            return named
        if self.with_llm:
            raise ValueError("--tokens changes the DiT alone; leave it out with --with-llm")
        side = math.isqrt(self.tokens)
        if side * side != self.tokens:
            raise ValueError(f"--tokens={self.tokens} is no square grid; choose 256, 1024 or another square")
        return replace(named, grid_size=side)


class DiTAlone(nn.Module):
    """The DiT as an engine's module: engines want to be called, not reached into."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, drop: Tensor) -> Tensor:
        """x_t: [B, T, C]; t: [B]; condition: [B, T, z]; drop: bool [B]. Velocity [B, T, C]."""
        return self.dit.forward_tokens(x_t, t, condition, drop)


class Step:
    """One forward, backward and optimizer step on random inputs. The same setup gives the same numbers.

    batch: of one rank's micro-batch. micro_steps: how many of them make its part of the global batch.
    """

    def __init__(self, setup: StepSetup, mesh: Mesh) -> None:
        self.setup, self.mesh, self.device = setup, mesh, mesh.device
        self.config = setup.config()
        self.dit = setup.dit(self.config)
        check_parallel(setup, self.config.parallel)
        data = self.config.data
        self.global_batch = data.global_batch_size
        self.batch = data.micro_batch_size or self.global_batch // mesh.dp_world
        self.micro_steps = self.global_batch // mesh.dp_world // self.batch
        torch.manual_seed(0)
        module = self.build()
        randomise(module)
        self.flops_per_image = step_flops(setup)[1]
        groups: Callable[[str], str] = group_of if setup.with_llm else lambda name: "dit"
        self.engine: Engine = build_engine(self.config.engine, self.config.optim, module, groups, mesh)
        self.lrs = {name: group.lr for name, group in self.config.optim.groups.items()}

    def build(self) -> nn.Module:
        """float32, made where it will run: a model that fits on the GPU need not fit in the host's memory."""
        with self.device:
            if not self.setup.with_llm:
                return DiTAlone(DiT(self.dit))
            return build_scale_rae(self.config.model, self.dit.in_channels, self.dit.num_tokens, None)

    def inputs(self, batch: int, seed: int) -> Inputs:
        """Equal on the ranks that work on the same samples, and on those only."""
        generator = torch.Generator(self.device).manual_seed(seed * self.mesh.dp_world + self.mesh.dp_rank)
        tokens, channels = self.dit.num_tokens, self.dit.in_channels

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=generator)

        found = {
            "x_t": draw(batch, tokens, channels),
            "t": torch.rand(batch, device=self.device, generator=generator),
            "target": draw(batch, tokens, channels),
            "drop": torch.rand(batch, device=self.device, generator=generator) < self.dit.class_dropout_prob,
        }
        if not self.setup.with_llm:
            return found | {"condition": draw(batch, tokens, self.dit.z_channels)}
        length = self.setup.text_tokens + tokens
        rows = self.engine.shapes["conditioner.llm.model.embed_tokens.weight"][0]
        ids = torch.randint(rows, (batch, length), device=self.device, generator=generator)
        labels = ids.clone()
        labels[:, self.setup.text_tokens :] = IGNORE_LABEL
        start = torch.full((batch,), self.setup.text_tokens, device=self.device)
        return found | {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "answer_start": start,
            "user_start": torch.full_like(start, -1),
            "user_features": draw(batch, tokens, channels),
        }

    def forward(self, inputs: Inputs) -> Tensor:
        """This rank's share of the step's loss: a mean over all images of the flow loss, and of the text loss with the
        language model."""
        arguments = {name: tensor for name, tensor in inputs.items() if name != "target"}
        share = 1 / (self.mesh.dp_world * self.micro_steps)
        with self.engine.autocast():
            if not self.setup.with_llm:
                return share * flow_loss(self.engine.module(**arguments), inputs["target"]).mean()
            out = self.engine.module(**arguments)
            # A sequence-parallel rank has a slice of the image tokens.
            count = out.velocity.shape[1]
            target = inputs["target"][:, out.first_token : out.first_token + count]
            flow = flow_loss(out.velocity, target).mean() * count / self.dit.num_tokens
            text = out.text_loss_sum / (len(inputs["t"]) * self.setup.text_tokens)
            return share * (flow + text)

    def run(self, micro_batches: Sequence[Inputs]) -> None:
        """A whole step. Collective.

        Raises:
            FloatingPointError: the gradient was not finite, so a step was not what was timed.
        """
        for number, inputs in enumerate(micro_batches, start=1):
            self.engine.backward(self.forward(inputs), last=number == len(micro_batches))
        if self.engine.step(self.lrs).skipped:
            raise FloatingPointError("the gradient of a benchmark step is not finite: the optimizer was skipped")


def step_flops(setup: StepSetup) -> tuple[str, float]:
    """Name of the formula, and model FLOPs of training on one image, which MFU counts. There is no encoder in a step of
    random latents."""
    config = setup.config()
    dit = setup.dit(config)
    generator = dit_cost(dit)
    if not setup.with_llm:
        return "models.flops: dit_cost", generator.training
    name = config.model.llm.name
    if name not in LLM_ZOO:
        raise ValueError(f"--llm={name!r} is not a named language model; choose one of {', '.join(LLM_ZOO)}")
    llm, tokens, text = LLM_ZOO[name].to_qwen2(), dit.num_tokens, setup.text_tokens
    with torch.device("meta"):
        connector = build_connector(config.model.llm.connector, llm.hidden_size, dit.z_channels)
    for layer in (part for part in connector.modules() if isinstance(part, nn.Linear)):
        generator += linear(tokens, layer.in_features, layer.out_features)
    language = llm_cost(llm, text + tokens, (text + tokens) ** 2, text - 1)
    of_language = language.training if config.model.llm.train else language.frozen_training
    return "models.flops: dit_cost, llm_cost, connector", generator.training + of_language


def check_parallel(setup: StepSetup, parallel: ParallelConfig) -> None:
    if not setup.with_llm and parallel.tp * parallel.sp > 1:
        raise ValueError(
            f"parallel.tp={parallel.tp}, parallel.sp={parallel.sp} without --with-llm: the DiT alone is stepped data "
            "parallel only; add --with-llm, or set both to 1 and raise parallel.dp_shard"
        )


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Give every parameter random numbers: a new DiT's gates are zero, so its branches would get zero gradients."""
    for parameter in module.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0, WEIGHT_STD)
    for part in module.modules():
        if isinstance(part, DiT):
            part.init_constants()
