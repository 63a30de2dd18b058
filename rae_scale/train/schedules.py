"""Learning rates as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from rae_scale.config.schema import OptimConfig


def lr_factor(optim: OptimConfig, step: int, max_steps: int) -> float:
    """Return what every group's learning rate is multiplied with at `step` (0 is the first).

    Warm-up rises linearly over `warmup_ratio * max_steps` steps and never starts at zero: the first step learns too.
    Then `constant` stays at 1 and `cosine` falls from 1 to `min_lr_ratio` (paper Table 8), reached as the run ends.
    """
    warmup_steps = math.ceil(optim.warmup_ratio * max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rates(optim: OptimConfig, step: int, max_steps: int) -> dict[str, float]:
    """The learning rate of each parameter group at `step`."""
    factor = lr_factor(optim, step, max_steps)
    return {name: group.lr * factor for name, group in optim.groups.items()}
