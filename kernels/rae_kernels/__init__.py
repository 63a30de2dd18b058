"""Operations of diffusion transformers on per-token conditioning, each stated in plain PyTorch."""

from rae_kernels import traffic
from rae_kernels.adamw import adamw_ema_
from rae_kernels.attention import attention, attention_backend_report
from rae_kernels.chunks import chunks
from rae_kernels.dispatch import use
from rae_kernels.flow import flow_interpolate, flow_matching_loss
from rae_kernels.linear_cross_entropy import cross_entropy_sum, linear_cross_entropy, rows_per_chunk
from rae_kernels.norm import (
    gated_residual,
    gated_residual_norm_modulate,
    gated_residual_sum,
    norm_modulate,
    norm_modulate_from_sum,
    rms_norm,
    sum_of_squares,
)
from rae_kernels.philox import philox_normal, philox_uniform
from rae_kernels.qk_rope import qk_norm_rope
from rae_kernels.report import report
from rae_kernels.swiglu import swiglu, swiglu_into, swiglu_pair
from rae_kernels.varlen import Sequences, varlen_attention

__version__ = "0.1.0"

__all__ = [
    "Sequences",
    "adamw_ema_",
    "attention",
    "attention_backend_report",
    "chunks",
    "cross_entropy_sum",
    "flow_interpolate",
    "flow_matching_loss",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gated_residual_sum",
    "linear_cross_entropy",
    "norm_modulate",
    "norm_modulate_from_sum",
    "philox_normal",
    "philox_uniform",
    "qk_norm_rope",
    "report",
    "rms_norm",
    "rows_per_chunk",
    "sum_of_squares",
    "swiglu",
    "swiglu_into",
    "swiglu_pair",
    "traffic",
    "use",
    "varlen_attention",
]
