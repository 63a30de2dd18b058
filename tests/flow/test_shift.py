"""The dimension-dependent shift against the numbers of the paper's formula."""

from __future__ import annotations

import pytest
import torch

from rae_scale.config.schema import FlowConfig
from rae_scale.flow import resolve_alpha, shift_alpha, shift_time


@pytest.mark.parametrize(
    ("tokens", "channels", "alpha"),
    [(256, 1152, 8.4853), (256, 1024, 8.0), (256, 64, 2.0), (256, 768, 6.9282)],
    ids=["siglip2", "webssl", "flux-vae", "dinov2"],
)
def test_alpha_of_the_published_latents(tokens, channels, alpha):
    assert shift_alpha(tokens * channels, 4096) == pytest.approx(alpha, abs=5e-5)


@pytest.mark.parametrize(
    ("dim", "shifted"),
    [
        (256 * 1152, [0.147608, 0.485281, 0.894574, 0.987075]),
        (256 * 1024, [0.140351, 0.470588, 0.888889, 0.986301]),
        (256 * 64, [0.039216, 0.181818, 0.666667, 0.947368]),
    ],
)
def test_shifted_times(dim, shifted):
    alpha = shift_alpha(dim, 4096)
    times = [0.02, 0.1, 0.5, 0.9]
    assert [shift_time(t, alpha) for t in times] == pytest.approx(shifted, abs=1e-6)
    torch.testing.assert_close(shift_time(torch.tensor(times), alpha), torch.tensor(shifted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.3535533905932738, 1.0, 8.485281374238571, 1000.0])
def test_the_ends_stay_and_rounding_does_not_leave_the_interval(alpha):
    assert (shift_time(0.0, alpha), shift_time(1.0, alpha)) == (0.0, 1.0)
    t = torch.linspace(0, 1, 10_001)
    shifted = shift_time(t, alpha)
    assert (shifted[0], shifted[-1]) == (0.0, 1.0)
    assert (shifted.diff() >= 0).all() and shifted.max() <= 1.0
    torch.testing.assert_close(shifted, alpha * t / (1 + (alpha - 1) * t))


def test_the_setting_overrides_the_dimension():
    assert resolve_alpha(FlowConfig(), 256 * 64) == 2.0
    assert resolve_alpha(FlowConfig(base_dim=1024), 256 * 64) == 4.0
    assert resolve_alpha(FlowConfig(shift=3.0), 256 * 64) == 3.0
