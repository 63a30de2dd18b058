"""One optimizer step in one pass: clipping, AdamW, a bfloat16 copy of the weight, and its moving average.

Bytes that move per parameter, with float32 gradients: 28 for AdamW (16 read, 12 written), 8 more for a moving average
and 2 for a copy, 8 less for moments in bfloat16 and 2 less for bfloat16 gradients. Clipping is free.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rae_kernels import cuda
from rae_kernels.dispatch import NAMESPACE, VARIABLE, chosen, fall_back
from rae_kernels.philox import MASK32
from rae_kernels.spec import adamw as spec
from rae_kernels.spec.adamw import Random, Scalars

THREADS, CHUNK, WIDTH = 256, 1 << 15, 8

PROGRAM = cuda.Program("adamw_ema.cu", (("THREADS", THREADS), ("CHUNK", CHUNK), ("STREAM", spec.ROUNDING_STREAM)))

MOMENT_DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_DTYPES = (torch.float32, torch.bfloat16)


def adamw_ema_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    clip_factor: float = 1.0,
    ema_decay: float = 0.0,
    seed: int = 0,
    parameters: Sequence[int] = (),
    first_elements: Sequence[int] = (),
) -> None:
    """One step of torch.optim.AdamW with `clip_factor` times the gradients, then ema <- lerp(weight, ema, ema_decay).

    weights, emas: float32 [N_i]. gradients: float32 or bfloat16; what is in them afterwards is undefined. exp_avgs,
    exp_avg_sqs: float32, or bfloat16, which is rounded at random. copies: bfloat16, become the rounded weights. emas
    and copies: one for each weight, or none at all. step: 1 at the first update.
    seed, parameters, first_elements: the random numbers are a function of (seed, step, parameters[i], first_elements[i]
    + j) for element j of tensor i, hence not of how a parameter is cut into tensors. By default parameters[i] is i, and
    every tensor begins at element 0.

    On a GPU one kernel covers all tensors; elsewhere, and under RAE_KERNELS=reference, PyTorch's fused AdamW runs.

    Raises:
        ValueError: tensors do not fit together, a beta or the step is out of its range, or a kernel is demanded where
            there is none.
    """
    if step < 1 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"step={step} with betas={betas} has no bias correction: count steps from 1 and choose betas from 0 to "
            "below 1"
        )
    check(weights, gradients, exp_avgs, exp_avg_sqs, emas, copies)
    parameters = list(parameters) or list(range(len(weights)))
    first_elements = list(first_elements) or [0] * len(weights)
    if not weights:
        return
    has_kernel = weights[0].device.type == "cuda"
    if not has_kernel and chosen() not in ("auto", "reference"):
        raise ValueError(
            f"{VARIABLE}={chosen()}, but the optimizer's tensors are on {weights[0].device}, and adamw_ema_ has a "
            f"kernel for CUDA only; keep them on a GPU, or set {VARIABLE}=auto"
        )
    # The custom operator looks at every tensor several times, which is not worth it where no kernel follows.
    run = adamw_ema if has_kernel and chosen() != "reference" else specification
    with torch.no_grad():
        run(
            list(weights),
            list(gradients),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(emas),
            list(copies),
            lr,
            *betas,
            eps,
            weight_decay,
            step,
            clip_factor,
            ema_decay,
            # The operator's integers have a sign.
            seed - (1 << 64) if seed >> 63 else seed,
            parameters,
            first_elements,
        )


def specification(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    clip_factor: float,
    ema_decay: float,
    seed: int,
    parameters: Sequence[int],
    first_elements: Sequence[int],
) -> None:
    if exp_avgs[0].dtype == torch.float32:
        spec.fused_update(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            emas,
            copies,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            clip_factor=clip_factor,
            ema_decay=ema_decay,
        )
        return
    numbers = spec.scalars(lr, (beta1, beta2), eps, weight_decay, step, clip_factor, ema_decay)
    random = Random(seed % (1 << 64), step)
    for i, tensors in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs, strict=True)):
        ema, copy = emas[i] if emas else None, copies[i] if copies else None
        spec.update_(*tensors, ema, copy, numbers, random, parameters[i], first_elements[i])


adamw_ema = torch.library.custom_op(
    f"{NAMESPACE}::adamw_ema",
    specification,
    mutates_args=("weights", "gradients", "exp_avgs", "exp_avg_sqs", "emas", "copies"),
)


@adamw_ema.register_kernel("cuda")
def on_gpu(*arguments: Any) -> None:
    """The operator on CUDA tensors. arguments: those of `specification`."""
    _, gradients, exp_avgs, *_ = arguments
    device = gradients[0].device
    kernel, reason = cuda.find_kernel(PROGRAM, kernel_name(gradients[0].dtype, exp_avgs[0].dtype), device.index)
    if kernel is None:
        fall_back("adamw_ema", "cuda", reason)
        specification(*arguments)
        return
    with torch.cuda.device(device):
        launch(kernel, *arguments)


def launch(
    kernel: cuda.Kernel,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    clip_factor: float,
    ema_decay: float,
    seed: int,
    parameters: Sequence[int],
    first_elements: Sequence[int],
) -> None:
    """`kernel` over all of the tensors at once."""
    lists = [weights, gradients, exp_avgs, exp_avg_sqs, emas, copies]
    rows, blocks = table(lists, parameters, first_elements)
    if not rows:
        return
    numbers = spec.scalars(lr, (beta1, beta2), eps, weight_decay, step, clip_factor, ema_decay)
    device = weights[0].device
    # From page-locked memory, so that the copy only joins the queue.
    on_device = torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    kernel.launch(
        blocks,
        THREADS,
        ctypes.c_void_p(on_device.data_ptr()),
        ctypes.c_int(len(rows)),
        KernelScalars(*numbers),
        KernelRandom(seed & MASK32, (seed >> 32) & MASK32, step),
    )


@adamw_ema.register_fake
def _(*args: object) -> None:
    return None


def kernel_name(gradients: torch.dtype, moments: torch.dtype) -> str:
    return f"adamw_{gradients}_{moments}".replace("torch.", "")


class KernelScalars(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in Scalars._fields)


class KernelRandom(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("seed_low", "seed_high", "step"))


def table(
    lists: Sequence[Sequence[Tensor]], parameters: Sequence[int], first_elements: Sequence[int]
) -> tuple[list[list[int]], int]:
    """The kernel's `Row` of each tensor that has elements, and how many blocks they take. lists: as `launch` has."""
    weights, _, exp_avgs, *_ = lists
    rows, blocks = [], 0
    rounded = exp_avgs[0].dtype == torch.bfloat16
    for i, weight in enumerate(weights):
        numel = weight.numel()
        if not numel:
            continue
        # Where the weight is aligned, so are the others, or else the kernel reads those element by element.
        head = -(weight.data_ptr() // weight.element_size()) % WIDTH
        if rounded and (first_elements[i] + head) % 4:
            head = -first_elements[i] % 4  # vectors begin where a group of random numbers does
        head = min(head, numel)
        pointers = [tensors[i].data_ptr() if tensors else 0 for tensors in lists]
        rows.append([*pointers, numel, head, blocks, parameters[i], first_elements[i]])
        blocks += max(1, -(-(numel - head) // CHUNK))
    return rows, blocks


def check(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
) -> None:
    if not weights:
        return
    kinds: dict[str, tuple[Sequence[Tensor], tuple[torch.dtype, ...]]] = {
        "weights": (weights, (torch.float32,)),
        "gradients": (gradients, GRADIENT_DTYPES),
        "exp_avgs": (exp_avgs, MOMENT_DTYPES),
        "exp_avg_sqs": (exp_avg_sqs, tuple(tensor.dtype for tensor in exp_avgs[:1])),
        **({"emas": (emas, (torch.float32,))} if emas else {}),
        **({"copies": (copies, (torch.bfloat16,))} if copies else {}),
    }
    sizes = [weight.numel() for weight in weights]
    for name, (tensors, dtypes) in kinds.items():
        found = [tensor.numel() for tensor in tensors]
        if found != sizes or not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError(
                f"{name} have {found} elements beside weights of {sizes}, or are not contiguous; give a flat tensor of "
                "the same size for each weight"
            )
        types = {tensor.dtype for tensor in tensors}
        if len(types) > 1 or not types <= set(dtypes):
            known, given = ", ".join(map(str, dtypes)), ", ".join(sorted(map(str, types)))
            raise ValueError(f"{name} are {given}; they must all be one of {known}")
        places = {tensor.device for tensor in (weights[0], *tensors)}
        if len(places) > 1:
            raise ValueError(f"{name} are on {', '.join(sorted(map(str, places)))}; all tensors must be on one device")
