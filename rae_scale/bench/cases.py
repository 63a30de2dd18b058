"""The memory-bound operations at the shapes of a DiT block, as something to run, check and time.

Inputs are random, in the types of training: residual stream float32, all else bfloat16; shift, scale and gate are parts
of one packed tensor, as the adaLN layer leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rae_kernels
from rae_kernels.dispatch import Choice
from rae_scale.bench.timing import size

EPS = 1e-6
IMAGE_TOKENS = 256
SWIGLU_MULTIPLE = 128
NOISE: dict[str, Any] = {"seed": 1, "step": 2, "stream": 3}

Tensors = tuple[Tensor, ...]


@dataclass
class Case:
    """One operation on one set of inputs.

    run:      inputs, in order -> results.
    inputs:   by name; those that require gradients get some.
    reads:    names of the inputs that backward has to read again.
    passes:   names of the inputs whose gradient is handed on and not written.
    gradients: of the results.
    """

    name: str
    run: Callable[..., Tensors]
    inputs: dict[str, Tensor]
    reads: tuple[str, ...]
    passes: tuple[str, ...]
    gradients: Tensors

    @property
    def differentiable(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.inputs.items() if tensor.requires_grad}

    @property
    def forward_bytes(self) -> int:
        """Each input read once, each result written once."""
        return size([*self.inputs.values(), *self.gradients])

    @property
    def backward_bytes(self) -> int:
        """Gradients of results and what is needed of the inputs read once, gradients of inputs written once."""
        written = [tensor for name, tensor in self.differentiable.items() if name not in self.passes]
        return size([*self.gradients, *(self.inputs[name] for name in self.reads), *written])

    def forward(self) -> Tensors:
        return self.run(*self.inputs.values())

    def backward(self, results: Tensors) -> Tensors:
        """Gradients of the inputs; the graph stays for another time."""
        return torch.autograd.grad(
            [result for result in results if result.requires_grad],
            list(self.differentiable.values()),
            [g for result, g in zip(results, self.gradients, strict=True) if result.requires_grad],
            retain_graph=True,
        )

    def all_results(self, choice: Choice) -> dict[str, Tensor]:
        """Results and gradients by name, computed by `choice`, in the types that our operators give."""
        with rae_kernels.use(choice):
            results = self.forward()
            found = {f"result {number}": result.detach() for number, result in enumerate(results)}
            if self.differentiable:
                gradients = self.backward(results)
                found |= {f"d{name}": g for name, g in zip(self.differentiable, gradients, strict=True)}
        return found

    def in_float64(self) -> Case:
        """The same numbers, and exact arithmetic for all purposes."""
        inputs = {name: wide(tensor) for name, tensor in self.inputs.items()}
        gradients = tuple(gradient.double() for gradient in self.gradients)
        return Case(self.name, self.run, inputs, self.reads, self.passes, gradients)


def wide(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


class Builder:
    """Makes cases of `tokens` in all, `hidden` channels, heads of `head_dim`, as a batch of images of 256 tokens."""

    def __init__(self, tokens: int, hidden: int, head_dim: int, device: torch.device, seed: int = 0) -> None:
        if hidden % head_dim:
            raise ValueError(f"--head-dim={head_dim} does not divide --hidden={hidden}; choose one that does")
        self.length = math.gcd(tokens, IMAGE_TOKENS)
        self.batch = tokens // self.length
        self.hidden, self.head_dim, self.device = hidden, head_dim, device
        self.inner = -(-(8 * hidden // 3) // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(dtype)

    def stream(self) -> Tensor:
        return self.draw(self.batch, self.length, self.hidden, dtype=torch.float32).requires_grad_()

    def branch(self, width: int | None = None) -> Tensor:
        return self.draw(self.batch, self.length, width or self.hidden).requires_grad_()

    def weight(self) -> Tensor:
        return (1 + 0.1 * self.draw(self.hidden, dtype=torch.float32)).requires_grad_()

    def modulation(self, names: str) -> dict[str, Tensor]:
        parts = self.draw(self.batch, self.length, 6 * self.hidden).mul_(0.5).chunk(6, dim=-1)
        return {name: part.requires_grad_() for name, part in zip(names.split(), parts, strict=False)}

    def case(
        self, name: str, run: Callable[..., Any], inputs: dict[str, Tensor], reads: str = "", passes: str = ""
    ) -> Case:
        with torch.no_grad():
            results = as_tuple(run(*inputs.values()))
        gradients = tuple(self.draw(*result.shape, dtype=result.dtype) for result in results)
        types = [result.dtype for result in results]

        def run_to_types(*given: Tensor) -> Tensors:
            """Our types also from the reference, which leaves the cast to autocast; float64 stays."""
            found = as_tuple(run(*given))
            return tuple(
                result if result.dtype == torch.float64 else result.to(dtype)
                for result, dtype in zip(found, types, strict=True)
            )

        return Case(name, run_to_types, inputs, tuple(reads.split()), tuple(passes.split()), gradients)

    def norm_modulate(self) -> Case:
        def run(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            with autocast(x):
                return rae_kernels.norm_modulate(x, weight, shift, scale, EPS)

        inputs = {"x": self.stream(), "weight": self.weight(), **self.modulation("shift scale")}
        return self.case("norm_modulate", run, inputs, "x weight scale")

    def gated_residual_norm_modulate(self) -> Case:
        def run(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensors:
            with autocast(x):
                return rae_kernels.gated_residual_norm_modulate(x, y, gate, weight, shift, scale, EPS)

        parts = self.modulation("gate shift scale")
        inputs = {"x": self.stream(), "y": self.branch(), "gate": parts.pop("gate"), "weight": self.weight(), **parts}
        return self.case("gated_residual_norm_modulate", run, inputs, "x y gate weight scale")

    def gated_residual(self) -> Case:
        inputs = {"x": self.stream(), "y": self.branch(), **self.modulation("gate")}
        return self.case("gated_residual", rae_kernels.gated_residual, inputs, "y gate", "x")

    def qk_rope(self) -> Case:
        def run(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
            return rae_kernels.qk_norm_rope(qkv, cos, sin, head_dim=self.head_dim, eps=EPS)

        return self.case("qk_rope", run, {"qkv": self.branch(3 * self.hidden), **self.tables()}, "cos sin")

    def qk_norm_rope(self) -> Case:
        def run(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensors:
            weights = {"q_weight": q_weight, "k_weight": k_weight}
            return rae_kernels.qk_norm_rope(qkv, cos, sin, head_dim=self.head_dim, eps=EPS, **weights)

        weights = {
            name: (1 + 0.1 * self.draw(self.head_dim, dtype=torch.float32)).requires_grad_()
            for name in ("q_weight", "k_weight")
        }
        inputs = {"qkv": self.branch(3 * self.hidden), **self.tables(), **weights}
        return self.case("qk_norm_rope", run, inputs, "qkv cos sin q_weight k_weight")

    def tables(self) -> dict[str, Tensor]:
        angles = self.draw(self.length, self.head_dim // 2, dtype=torch.float32).repeat_interleave(2, dim=-1)
        return {"cos": angles.cos(), "sin": angles.sin()}

    def swiglu(self) -> Case:
        return self.case("swiglu", rae_kernels.swiglu, {"packed": self.branch(2 * self.inner)}, "packed")

    def flow_interpolate(self) -> Case:
        def run(x: Tensor, t: Tensor, sample_index: Tensor) -> Tensor:
            return rae_kernels.flow_interpolate(x, t, sample_index=sample_index, **NOISE)

        times = torch.rand(self.batch, device=self.device, generator=self.generator)
        inputs = {"x": self.stream().detach(), "t": times, "sample_index": torch.arange(self.batch, device=self.device)}
        return self.case("flow_interpolate", run, inputs)

    def flow_matching_loss(self) -> Case:
        def run(velocity: Tensor, x: Tensor, sample_index: Tensor) -> Tensor:
            return rae_kernels.flow_matching_loss(velocity, x, sample_index=sample_index, **NOISE)

        inputs = {
            "velocity": self.branch(),
            "x": self.stream().detach(),
            "sample_index": torch.arange(self.batch, device=self.device),
        }
        # Backward scales the difference that forward kept in the type of the velocity.
        return self.case("flow_matching_loss", run, inputs, "velocity")


CASES: dict[str, Callable[[Builder], Case]] = {
    "norm_modulate": Builder.norm_modulate,
    "gated_residual_norm_modulate": Builder.gated_residual_norm_modulate,
    "gated_residual": Builder.gated_residual,
    "qk_rope": Builder.qk_rope,
    "qk_norm_rope": Builder.qk_norm_rope,
    "swiglu": Builder.swiglu,
    "flow_interpolate": Builder.flow_interpolate,
    "flow_matching_loss": Builder.flow_matching_loss,
}


def as_tuple(results: Any) -> Tensors:
    return results if isinstance(results, tuple) else (results,)


def autocast(x: Tensor) -> torch.autocast:
    """As in training; not for float64, which is there to be exact."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64)
