"""Which implementation each operation runs: chosen by RAE_KERNELS or `use`, and never silently another one.

    auto       the library's operators: Triton kernels where they can run, elsewhere the same formulas in PyTorch
    reference  plain PyTorch functions that autograd and torch.compile see through: what the operators are held to
    triton     as auto, but what a kernel cannot do is an error
    cuda       as triton, with the CUDA C++ kernels where there are some

The choice belongs to the process and not to a thread: backward runs in autograd's own threads.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAMESPACE = "rae_kernels"
VARIABLE = "RAE_KERNELS"
Choice = Literal["auto", "reference", "triton", "cuda"]

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs on the CPU, in Python: for tests. Triton reads the variable when it is imported, and so do we."""

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def parse_choice(text: str, origin: str) -> Choice:
    if text not in get_args(Choice):
        raise ValueError(f"{origin}={text!r} names no implementation; choose one of {', '.join(get_args(Choice))}")
    return cast(Choice, text)


_choice: Choice = parse_choice(os.environ.get(VARIABLE, "auto"), VARIABLE)


def chosen() -> Choice:
    """The choice in force."""
    return _choice


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Within it, operations run on `choice`; ValueError if there is none of that name. Backward passes of what ran
    inside stay on what they ran on."""
    global _choice
    before, _choice = _choice, parse_choice(choice, "use")
    try:
        yield
    finally:
        _choice = before


def plain(x: Tensor) -> bool:
    """Whether the operation on `x` is to be the plain PyTorch function.

    Raises:
        ValueError: kernels are demanded, and there is none for the device of `x`.
    """
    if _choice == "reference":
        return True
    if _choice != "auto" and x.device.type == "cpu" and not INTERPRET:
        raise ValueError(
            f"{VARIABLE}={_choice}, but a tensor is on the CPU, where Triton runs only under TRITON_INTERPRET=1; "
            f"move it to a GPU, or set {VARIABLE}=auto"
        )
    return False


def compute_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """What a result that a matrix product reads is stored in: autocast's type inside autocast, else by promotion."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # it knows no autocast on meta
        return torch.get_autocast_dtype(x.device.type)
    return functools.reduce(torch.promote_types, (other.dtype for other in others), x.dtype)


def wide(x: Tensor) -> Tensor:
    """`x` in the type of all arithmetic here: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


OPERATIONS: list[str] = []
"""Names of the custom operators that have a Triton kernel."""

_fallbacks: dict[tuple[str, str], str] = {}


def fallbacks() -> dict[tuple[str, str], str]:
    """(operator, device type) -> why its kernel did not run, for every operator of this process that fell back."""
    return dict(_fallbacks)


def operation(launcher: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the custom operator `rae_kernels::<its name>`.

    The function is the specification in plain PyTorch and runs where no kernel does. launcher: "module:function" that
    takes the same arguments and launches the Triton kernel. It is imported at the first use on a GPU.
    """

    def decorate(specification: Callable[..., Any]) -> Any:
        name = specification.__name__
        operator = torch.library.custom_op(f"{NAMESPACE}::{name}", specification, mutates_args=mutates_args)

        @functools.wraps(specification)
        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
            reason = why_not_triton(tensors)
            if reason is not None:
                fall_back(name, tensors[0].device.type, reason)
                return specification(*args, **kwargs)
            # Triton launches on the current GPU, which need not be the tensors'.
            with torch.cuda.device_of(tensors[0]):
                return load(launcher)(*args, **kwargs)

        for device in ("cuda", *(("cpu",) if INTERPRET else ())):
            operator.register_kernel(device)(run)
        # FlopCounterMode counts operators that have a formula. These need none: there is no matrix product in them.
        OPERATIONS.append(name)
        return operator

    return decorate


@functools.cache
def load(launcher: str) -> Callable[..., Any]:
    module, _, function = launcher.partition(":")
    return cast(Callable[..., Any], getattr(import_module(module), function))


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(tensors: list[Tensor]) -> str | None:
    """Why no Triton kernel takes these tensors; None if one does."""
    if not triton_is_installed():
        return "triton is not installed"
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            return f"a tensor is {tensor.dtype}; the kernels take bfloat16, float16 and float32"
    return None


def fall_back(name: str, device: str, reason: str) -> None:
    """Say once that an operator runs as plain PyTorch although a kernel could be expected; an error where demanded."""
    if _choice not in ("auto", "reference"):
        raise ValueError(f"{VARIABLE}={_choice}, but {name} has no kernel for this call: {reason}; set {VARIABLE}=auto")
    if (name, device) not in _fallbacks:
        _fallbacks[name, device] = reason
        logger.warning("%s on %s runs as plain PyTorch: %s", name, device, reason)
