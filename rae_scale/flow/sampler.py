"""From noise to latents: integrate dx/dt = v from t = 1 to t = 0 (paper section 3.1: 50 Euler steps).

Two grids of times. `clean` is t_i = shift(1 - i / N) and ends at exactly 0. `compat` repeats the official release, to
compare with its pictures: it starts at the last time but one (0.9976 for 50 steps and SigLIP-2 latents), stops short
of 0 (at 0.0084), and then evaluates the model once more, at the first time, on the almost finished latents.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rae_scale.config.schema import SamplerConfig
from rae_scale.flow.guidance import VelocityFn
from rae_scale.flow.shift import shift_time

OFFICIAL_TIMES = 1000


@torch.no_grad()
def sample(velocity_fn: VelocityFn, noise: Tensor, cfg: SamplerConfig, alpha: float) -> Tensor:
    """Integrate from `noise` [B, T, C] to latents [B, T, C], in float32.

    velocity_fn(x [B, T, C], t [B]) -> [B, T, C]; guidance is applied to it before (`flow.guided`).
    alpha: the time shift of the training. Raises ValueError for settings that the compat grid does not have.
    """
    if cfg.grid == "compat":
        return sample_compat(velocity_fn, noise, cfg, alpha)
    step = heun_step if cfg.method == "heun" else euler_step
    x = noise.float()
    grid = clean_grid(cfg.steps, alpha)
    for t, t_next in pairwise(grid):
        x = step(velocity_fn, x, t, t_next)
    return x


def clean_grid(steps: int, alpha: float) -> list[float]:
    """N + 1 falling times shift(1 - i / N), from exactly 1 to exactly 0."""
    return [shift_time(1 - i / steps, alpha) for i in range(steps + 1)]


def official_grid(steps: int, alpha: float) -> list[float]:
    """The official release's rising times: `steps` evenly spread ones of shift(0.001), shift(0.002), ..., shift(1)."""
    stride = (OFFICIAL_TIMES - 1) / (steps - 1)
    return [shift_time((round(i * stride) + 1) / OFFICIAL_TIMES, alpha) for i in range(steps)]


def euler_step(velocity_fn: VelocityFn, x: Tensor, t: float, t_next: float) -> Tensor:
    return x + (t_next - t) * evaluate(velocity_fn, x, t)


def heun_step(velocity_fn: VelocityFn, x: Tensor, t: float, t_next: float) -> Tensor:
    """The average of the velocities at both ends, but an Euler step where the end is t = 0.

    Training never visits t = 0, where the latents hold no noise to be told from them; so N steps cost 2N - 1
    evaluations.
    """
    velocity = evaluate(velocity_fn, x, t)
    predicted = x + (t_next - t) * velocity
    if t_next == 0.0:
        return predicted
    return x + (t_next - t) * 0.5 * (velocity + evaluate(velocity_fn, predicted, t_next))


def sample_compat(velocity_fn: VelocityFn, noise: Tensor, cfg: SamplerConfig, alpha: float) -> Tensor:
    """The official release's sampler with its defects: N - 2 Euler steps and one last evaluation at the first time."""
    if cfg.method != "euler":
        raise ValueError(
            f"sampler.method={cfg.method} with sampler.grid=compat: the official grid is reproduced for euler only; "
            "set sampler.method=euler or sampler.grid=clean"
        )
    if not 2 < cfg.steps <= OFFICIAL_TIMES:
        raise ValueError(
            f"sampler.steps={cfg.steps} with sampler.grid=compat: the official grid picks 3 to {OFFICIAL_TIMES} of its "
            f"{OFFICIAL_TIMES} times; the release uses 50"
        )
    grid = official_grid(cfg.steps, alpha)[::-1]
    x = noise.float()
    for t, t_next in pairwise(grid[1:]):
        x = euler_step(velocity_fn, x, t, t_next)
    # Meant for stochastic samplers there: a step from the first time used, grid[1], up to grid[0] = 1.
    return euler_step(velocity_fn, x, grid[1], grid[0])


def evaluate(velocity_fn: VelocityFn, x: Tensor, t: float) -> Tensor:
    """The velocity at one time for the whole batch, in float32."""
    return velocity_fn(x, torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)).float()
