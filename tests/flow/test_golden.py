"""Loss and sampler equal the official release on a small DiT with its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rae_scale.config.schema import SamplerConfig
from rae_scale.flow import flow_loss, interpolate, sample, shift_alpha, velocity_target
from rae_scale.flow.sampler import official_grid
from rae_scale.models import from_official

GOLDEN = Path(__file__).parents[1] / "golden" / "flow_tiny.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        return tensors, json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def dit(golden):
    tensors, config = golden
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
    return from_official(state, config)


def noise_tokens(tensors):
    return tensors["in.noise_chw"].flatten(2).transpose(1, 2)


def test_alpha_and_grid(golden):
    tensors, config = golden
    alpha = shift_alpha(config["tokens"] * config["in_channels"], config["base_dim"])
    assert alpha == pytest.approx(config["alpha"], abs=1e-12)
    expected = tensors["out.official_grid"].tolist()
    assert official_grid(config["steps"], alpha) == pytest.approx(expected, rel=0, abs=1e-7)


@torch.no_grad()
def test_loss_of_each_sample(golden, dit):
    tensors, _ = golden
    x, eps, t = tensors["in.x_tokens"], noise_tokens(tensors), tensors["in.t"]
    velocity = dit.forward_tokens(interpolate(x, eps, t), t, tensors["in.condition"])
    loss = flow_loss(velocity, velocity_target(x, eps))
    torch.testing.assert_close(loss, tensors["out.loss_per_sample"], rtol=0, atol=2e-5)


def test_compat_sampler(golden, dit):
    tensors, config = golden
    latents = sample(
        lambda x, t: dit.forward_tokens(x, t, tensors["in.condition"]),
        noise_tokens(tensors),
        SamplerConfig(grid="compat", steps=config["steps"]),
        config["alpha"],
    )
    torch.testing.assert_close(latents, tensors["out.official_sample"], rtol=0, atol=2e-5)
