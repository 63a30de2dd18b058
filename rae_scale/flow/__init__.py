"""Flow matching: time and its shift, path and velocity, loss, guidance, sampling, and noise as a function."""

from rae_scale.flow.guidance import guided
from rae_scale.flow.loss import flow_loss
from rae_scale.flow.noise import Stream, drop_mask, sampling_noise
from rae_scale.flow.path import interpolate, sample_time, velocity_target
from rae_scale.flow.sampler import sample
from rae_scale.flow.shift import resolve_alpha, shift_alpha, shift_time

__all__ = [
    "Stream",
    "drop_mask",
    "flow_loss",
    "guided",
    "interpolate",
    "resolve_alpha",
    "sample",
    "sample_time",
    "sampling_noise",
    "shift_alpha",
    "shift_time",
    "velocity_target",
]
