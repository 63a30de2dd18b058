"""A model, an engine and synthetic inputs: a training step without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rae_scale.config import Config, parse_config
from rae_scale.engines import Engine, build_engine
from rae_scale.flow.loss import flow_loss
from rae_scale.models.composite import build_scale_rae, group_of
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.flops import dit_cost, linear, llm_cost
from rae_scale.models.packing import IGNORE_LABEL
from rae_scale.models.zoo import DIT_ZOO, dit_config
from rae_scale.parallel import Mesh

WEIGHT_STD = 0.02

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class StepSetup:
    """What is stepped. overrides: of any setting, as in `rae-scale train`; they win over the arguments before them.

    tokens: per image, a square; None is the model's own grid. text_tokens: of a caption, with_llm.
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

    def dit(self, config: Config) -> DiTConfig:
        named = dit_config(config.model)
        if self.tokens is None:
            return named
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
    """One forward, backward and optimizer step on random inputs. The same setup gives the same numbers."""

    def __init__(self, setup: StepSetup, device: torch.device, prepare: Callable[[nn.Module], None]) -> None:
        """prepare: what is done to the module before the engine has it, such as compiling its blocks."""
        self.setup, self.device = setup, device
        self.config = setup.config()
        self.dit = setup.dit(self.config)
        torch.manual_seed(0)
        module = self.build()
        randomise(module)
        prepare(module)
        groups: Callable[[str], str] = group_of if setup.with_llm else lambda name: "dit"
        self.engine: Engine = build_engine(self.config.engine, self.config.optim, module, groups, Mesh(device))
        self.lrs = {name: group.lr for name, group in self.config.optim.groups.items()}

    def build(self) -> nn.Module:
        """float32, made where it will run: a model that fits on the GPU need not fit in the host's memory."""
        with self.device:
            if not self.setup.with_llm:
                return DiTAlone(DiT(self.dit))
            if self.setup.tokens is not None:
                raise ValueError("--tokens changes the DiT alone; leave it out with --with-llm")
            return build_scale_rae(self.config.model, self.dit.in_channels, self.dit.num_tokens, None)

    def inputs(self, batch: int, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
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
        """The loss: a mean over the batch of the flow loss, and of the text loss with the language model."""
        arguments = {name: tensor for name, tensor in inputs.items() if name != "target"}
        with self.engine.autocast():
            if not self.setup.with_llm:
                return flow_loss(self.engine.module(**arguments), inputs["target"]).mean()
            out = self.engine.module(**arguments)
            text = out.text_loss_sum / (len(inputs["t"]) * self.setup.text_tokens)
            return flow_loss(out.velocity, inputs["target"]).mean() + text

    def run(self, inputs: Inputs) -> None:
        """A whole step.

        Raises:
            FloatingPointError: the gradient was not finite, so a step was not what was timed.
        """
        self.engine.backward(self.forward(inputs), last=True)
        if self.engine.step(self.lrs).skipped:
            raise FloatingPointError("the gradient of a benchmark step is not finite: the optimizer was skipped")

    def flops(self, batch: int) -> float:
        """Model FLOPs of one step: what MFU counts."""
        generator = dit_cost(self.dit)
        if not self.setup.with_llm:
            return batch * generator.training
        module = self.engine.module
        llm, tokens, text = module.conditioner.llm.config, self.dit.num_tokens, self.setup.text_tokens
        for layer in (part for part in module.connector.modules() if isinstance(part, nn.Linear)):
            generator += linear(tokens, layer.in_features, layer.out_features)
        language = llm_cost(llm, text + tokens, (text + tokens) ** 2, text - 1)
        of_language = language.training if self.config.model.llm.train else language.frozen_training
        return batch * (generator.training + of_language)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Give every parameter random numbers: a new DiT's gates are zero, so its branches would get zero gradients."""
    for parameter in module.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0, WEIGHT_STD)
    for part in module.modules():
        if isinstance(part, DiT):
            part.init_constants()
