"""Confidence intervals for shares."""

from __future__ import annotations

Z_95 = 1.959964


def wilson(successes: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a share; it stays inside [0, 1] and is useful at 0 and `total` successes.

    Raises:
        ValueError: not 0 <= successes <= total with total > 0.
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} successes of {total} is no share; give 0 <= successes <= total and total > 0")
    share = successes / total
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5 / scale
    return max(0.0, center - half), min(1.0, center + half)
