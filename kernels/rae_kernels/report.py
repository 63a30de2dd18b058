"""What runs in this process, and why."""

from __future__ import annotations

import logging
from importlib import metadata

import torch

from rae_kernels.attention import attention_backend_report
from rae_kernels.dispatch import INTERPRET, OPERATIONS, VARIABLE, chosen, fallbacks, triton_is_installed
from rae_kernels.varlen import varlen_report

logger = logging.getLogger(__name__)

_reported: list[str] = []

OPTIONAL_PACKAGES = {
    "flash-attn": "serves packed sequences where PyTorch has no kernel for them; its dense kernels are in PyTorch",
    "apex": "not used: the norms and the optimizer are this package's own",
    "megatron-core": "not used: no operation calls it",
}


def report() -> str:
    """What each operation runs on in this process so far, and which optional packages are there. The first call logs
    it too."""
    text = "\n".join(
        line
        for line in (
            f"torch {torch.__version__}, triton {installed_version('triton')}, {VARIABLE}={chosen()}",
            *(device_line(device) for device in devices()),
            f"operators: {', '.join(sorted(name for name in OPERATIONS if not name.endswith('_backward')))}",
            *(f"{name} on {device} ran as plain PyTorch: {why}" for (name, device), why in fallbacks().items()),
            attention_backend_report(),
            varlen_report(),
            *(f"{name}: {installed_version(name)} ({why})" for name, why in OPTIONAL_PACKAGES.items()),
        )
        if line
    )
    if not _reported:
        logger.info("%s", text)
        _reported.append(text)
    return text


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def device_line(device: torch.device) -> str:
    """What the operators run on there."""
    if device.type == "cpu":
        if chosen() == "reference":
            return "cpu: plain PyTorch, differentiated by autograd"
        if INTERPRET:
            return "cpu: Triton kernels under their interpreter (TRITON_INTERPRET=1), for tests"
        if chosen() != "auto":
            return f"cpu: nothing, as {VARIABLE}={chosen()} demands kernels"
        return "cpu: the operators' formulas in PyTorch (Triton has no CPU target)"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{device}: {torch.cuda.get_device_name(device)} (sm_{major}{minor}), "
    if chosen() == "reference":
        return name + "plain PyTorch, differentiated by autograd"
    if not triton_is_installed():
        return name + "the operators' formulas in PyTorch: triton is not installed"
    return name + "Triton kernels, and CUDA C++ for the optimizer"


def installed_version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
