"""What runs in this process, and why."""

from __future__ import annotations

import logging
from functools import cache
from importlib import metadata

import torch

from rae_kernels.attention import attention_backend_report

logger = logging.getLogger(__name__)

PLAIN_OPS = (
    "apply_rope",
    "gated_residual",
    "modulate",
    "philox_normal",
    "philox_uniform",
    "rms_norm",
    "rms_norm_from_sum",
    "sum_of_squares",
    "swiglu",
)

OPTIONAL_PACKAGES = {
    "flash-attn": "attention runs on PyTorch's own backends, which hold the same flash kernels",
    "apex": "the norms are this package's own",
    "megatron-core": "no operation calls it",
}


@cache
def report() -> str:
    """Say what each operation runs on, and which optional packages are absent. The first call also logs it."""
    text = "\n".join(
        [
            f"torch {torch.__version__}",
            f"{', '.join(PLAIN_OPS)}: plain PyTorch",
            attention_backend_report(),
            *(f"{name}: {installed_version(name)} ({why})" for name, why in OPTIONAL_PACKAGES.items()),
        ]
    )
    logger.info("%s", text)
    return text


def installed_version(distribution: str) -> str:
    try:
        return f"{metadata.version(distribution)}, not used"
    except metadata.PackageNotFoundError:
        return "not installed, not needed"
