"""AdamW's moments in bfloat16, and which parameters a step touches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from toy_model import LRS, engine_config, group_of, loss_of, micro_batches, optim, toy, train_step

from rae_scale.config import ConfigError, parse_config
from rae_scale.config.schema import ParallelConfig
from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.state.load import load_checkpoint
from rae_scale.state.save import save_checkpoint

MESH = Mesh(torch.device("cpu"))
MOMENTS = ("exp_avg", "exp_avg_sq")


def build(moments: str, name: str = "eager", mesh: Mesh = MESH, max_grad_norm: float = 0.5) -> Engine:
    settings = optim(max_grad_norm).model_copy(update={"moments": moments})
    return build_engine(engine_config(name), settings, toy(), group_of, mesh)


def run(engine: Engine, steps: range) -> Engine:
    for step in steps:
        train_step(engine, step, 0, 1, 1)
    return engine


def contents(engine: Engine) -> dict[tuple[str, str], Tensor]:
    return {(piece.kind, piece.name): piece.tensor.clone() for piece in engine.pieces()}


def assert_same(found: dict[tuple[str, str], Tensor], expected: dict[tuple[str, str], Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key


def test_only_the_moments_are_bfloat16_and_training_goes_the_same_way() -> None:
    halved, full = contents(run(build("bf16"), range(5))), contents(run(build("fp32"), range(5)))
    for (kind, name), tensor in halved.items():
        assert tensor.dtype == (torch.bfloat16 if kind in MOMENTS else torch.float32)
        rest = (tensor.float() - full[kind, name]).norm() / full[kind, name].norm()
        assert rest < 0.02, (kind, name)
    assert not torch.equal(halved["weight", "connector.weight"], full["weight", "connector.weight"])


def test_rounding_is_a_function_of_the_step() -> None:
    straight = run(build("bf16"), range(4))
    assert_same(contents(run(build("bf16"), range(4))), contents(straight))
    saved = contents(run(build("bf16"), range(2)))
    resumed = run(build("bf16"), range(7, 8))
    resumed.load_pieces(lambda kind, name, box: saved[kind, name].float(), 2)
    assert_same(contents(run(resumed, range(2, 4))), contents(straight))


def two_ranks() -> None:
    parallel = ParallelConfig(dp_shard=2)
    mesh = build_mesh(parallel, init_distributed(parallel, "cpu"))
    sharded, eager = build("bf16", "fsdp2", mesh), run(build("bf16"), range(3))
    for step in range(3):
        train_step(sharded, step, mesh.dp_rank, mesh.dp_world, 1)
    whole = contents(eager)
    found = [piece for piece in sharded.pieces() if piece.kind in MOMENTS]
    pairs = [(piece.tensor, whole[piece.kind, piece.name][piece.box.slices]) for piece in found]
    different = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
    # Gradients differ in their last bits. Other random numbers would make it half of all.
    assert different < 0.05 * sum(ours.numel() for ours, _ in pairs)
    shutdown_distributed()


@pytest.mark.dist
def test_shards_are_rounded_as_the_whole_is(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)


def test_rounding_of_a_parameter_does_not_depend_on_the_others() -> None:
    """Which parameters a rank holds, and which of them got a gradient, differs between layouts and steps."""
    engines = [build("bf16", max_grad_norm=1e6) for _ in range(2)]
    for engine in engines:
        engine.backward(loss_of(engine, next(micro_batches(0, 0, 1, 1))), last=True)
    engines[1].module.connector.weight.grad = None
    for engine in engines:
        engine.step(LRS)
    every, without = (contents(engine) for engine in engines)
    different = {key[1] for key, tensor in every.items() if not torch.equal(tensor, without[key])}
    assert different == {"connector.weight"}


@pytest.mark.parametrize(("before", "after"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_checkpoints_carry_moments_from_either_type_to_either(tmp_path: Path, before: str, after: str) -> None:
    engine, other = run(build(before), range(2)), run(build(after), range(7, 8))
    path = save_checkpoint(tmp_path, 2, engine, MESH, {"seed": 0, "config": {}}, keep_last=1)
    load_checkpoint(path, other, MESH)
    expected = contents(engine)
    if after == "bf16":
        expected = {key: x.bfloat16() if key[0] in MOMENTS else x for key, x in expected.items()}
    assert_same(contents(other), expected)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_parameter_without_a_gradient_stays_while_its_average_follows(moments: str) -> None:
    engine = run(build(moments), range(2))
    before = contents(engine)
    engine.backward(loss_of(engine, next(micro_batches(2, 0, 1, 1))), last=True)
    engine.module.connector.weight.grad = None
    engine.step(LRS)
    after, name = contents(engine), "connector.weight"
    for kind in ("weight", *MOMENTS):
        assert torch.equal(after[kind, name], before[kind, name])
        assert not torch.equal(after[kind, "connector.bias"], before[kind, "connector.bias"])
    expected = before["ema", name].lerp(before["weight", name], 0.1)
    torch.testing.assert_close(after["ema", name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"name": "zero"}, "optim.moments=bf16 with engine.name=zero engine.zero_stage=3: DeepSpeed updates"),
        ({"name": "fsdp2", "offload_optimizer": True}, "optim.moments=bf16 with engine.offload_optimizer=true: a CPU"),
    ],
)
def test_engines_that_cannot_have_them_are_named(engine: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"engine": engine, "optim": {"moments": "bf16"}})


@pytest.mark.parametrize("name", ["eager", "fsdp2"])
def test_engines_that_can_have_them(name: str) -> None:
    assert parse_config({"engine": {"name": name}, "optim": {"moments": "bf16"}}).optim.moments == "bf16"
