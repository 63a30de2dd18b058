"""The only door to `rae_kernels`: the rest of the package imports its operations from here."""

from rae_kernels import (
    apply_rope,
    attention,
    attention_backend_report,
    gated_residual,
    modulate,
    philox_normal,
    philox_uniform,
    report,
    rms_norm,
    rms_norm_from_sum,
    sum_of_squares,
    swiglu,
)

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
