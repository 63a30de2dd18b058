"""Operations of diffusion transformers on per-token conditioning, each stated in plain PyTorch."""

from rae_kernels.attention import attention, attention_backend_report
from rae_kernels.norm import gated_residual, modulate, rms_norm, rms_norm_from_sum, sum_of_squares
from rae_kernels.philox import philox_normal, philox_uniform
from rae_kernels.report import report
from rae_kernels.rope import apply_rope
from rae_kernels.swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "apply_rope",
    "attention",
    "attention_backend_report",
    "gated_residual",
    "modulate",
    "philox_normal",
    "philox_uniform",
    "report",
    "rms_norm",
    "rms_norm_from_sum",
    "sum_of_squares",
    "swiglu",
]
