"""What needs no second rank of the measurements; the rest runs in test_run.py."""

from __future__ import annotations

import time

import torch

from rae_scale.preflight.measure import heat

CPU = torch.device("cpu")


def test_heating_ends_and_looks_once() -> None:
    looked = []
    started = time.monotonic()
    assert heat(CPU, 8, 0.05, lambda: looked.append(time.monotonic()) or "hot") == "hot"
    assert len(looked) == 1
    assert looked[0] - started >= 0.05
