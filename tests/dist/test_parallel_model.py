"""The model in parts on several ranks computes what one process does: outputs and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward import TOKENS, inputs, scale_rae
from harness import run_ranks
from torch import Tensor

from rae_scale.config.schema import ParallelConfig
from rae_scale.models.composite import ScaleRAE
from rae_scale.parallel import Mesh, build_mesh, init_distributed, parallelize, share_samples, shutdown_distributed

pytestmark = pytest.mark.dist


def loss_of(model: ScaleRAE, arguments: dict[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    output = model(**arguments)
    share = slice(output.first_token, output.first_token + output.velocity.shape[1])
    error = (output.velocity - target[:, share]).square()
    return output.velocity, error.sum() / TOKENS + output.text_loss_sum


def check_layout(tp: int, sp: int, **variant: object) -> None:
    mesh = build_mesh(ParallelConfig(tp=tp, sp=sp), torch.device("cpu"))
    reference, model = scale_rae(**variant), scale_rae(**variant)
    placements = parallelize(model, mesh)
    arguments = inputs()
    target = torch.randn(arguments["x_t"].shape, generator=torch.Generator().manual_seed(1))
    velocity, expected_loss = loss_of(reference, arguments, target)
    part, loss = loss_of(model, arguments, target)
    slice_of_sp = slice(mesh.sp_rank * TOKENS // sp, (mesh.sp_rank + 1) * TOKENS // sp)
    torch.testing.assert_close(part, velocity[:, slice_of_sp], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mesh.all_reduce(loss.detach().clone()), expected_loss.detach(), rtol=1e-5, atol=0)
    expected_loss.backward()
    loss.backward()
    whole = dict(reference.named_parameters())
    assert {name for name, _ in model.named_parameters()} == whole.keys() == placements.keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = mesh.all_reduce(parameter.grad)
        expected = placements[name].slice(whole[name].grad)
        scale = float(whole[name].grad.abs().max()) + 1e-3
        assert gradient.shape == placements[name].local_shape
        error = float((gradient - expected).abs().max()) if gradient.numel() else 0.0
        assert error < 2e-5 * scale, (name, tp, sp, error, scale)
    check_sampling(reference, model, arguments)


@torch.no_grad()
def check_sampling(reference: ScaleRAE, model: ScaleRAE, arguments: dict[str, Tensor]) -> None:
    """Every rank gets the velocity of all tokens."""
    texts = [arguments[name] for name in ("input_ids", "attention_mask", "answer_start", "user_start", "user_features")]
    x, t = arguments["x_t"], arguments["t"]
    for drop in (None, arguments["drop"]):
        expected = reference.velocity(x, t, reference.condition(*texts), drop)
        torch.testing.assert_close(model.velocity(x, t, model.condition(*texts), drop), expected, rtol=1e-4, atol=1e-4)


def check_shared_work() -> None:
    """Each of the two ranks encodes half of the samples, a missing one replaced by zeros, and knows all results."""
    mesh = build_mesh(ParallelConfig(sp=2), torch.device("cpu"))
    seen = []

    def encode(samples: Tensor) -> Tensor:
        seen.append(samples)
        return 2 * samples.flatten(1)

    for size in (1, 2, 5):
        samples = torch.arange(1.0, 1 + 6 * size).view(size, 3, 2)
        torch.testing.assert_close(share_samples(encode, mesh)(samples), 2 * samples.flatten(1))
        assert len(seen.pop()) == (size + 1) // 2
    assert share_samples(encode, Mesh(torch.device("cpu"))) is encode


def two_ranks() -> None:
    init_distributed(ParallelConfig(tp=2), "cpu")
    check_shared_work()
    for tp, sp in ((2, 1), (1, 2)):
        check_layout(tp, sp)
        check_layout(tp, sp, ddt=False, tied=False, mask="query-block")
    shutdown_distributed()


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)


def four_ranks() -> None:
    init_distributed(ParallelConfig(tp=2, sp=2), "cpu")
    for tp, sp in ((2, 2), (1, 4)):
        check_layout(tp, sp)
    shutdown_distributed()


def test_four_ranks(tmp_path: Path) -> None:
    run_ranks(four_ranks, 4, tmp_path)


def test_mesh_places() -> None:
    """Slowest to fastest: dp_replicate, dp_shard, sp, tp."""
    meshes = [Mesh(torch.device("cpu"), dp_replicate=2, dp_shard=2, sp=3, tp=2, rank=rank) for rank in range(24)]
    assert [mesh.tp_rank for mesh in meshes] == [0, 1] * 12
    assert [mesh.sp_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2] * 4
    assert [mesh.dp_rank for mesh in meshes] == [rank // 6 for rank in range(24)]
    assert [mesh.sample_rank for mesh in meshes] == list(range(6)) * 4
