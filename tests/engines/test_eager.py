"""The reference engine, held to torch's own optimizer, clipping and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from toy_model import LRS, engine_config, group_of, loss_of, micro_batches, optim, toy, train_step

from rae_scale.engines import Engine, Piece, build_engine
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import whole

CPU = torch.device("cpu")


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = build(toy())
    yield engine
    engine.close()


def build(module: nn.Module, precision: str = "fp32", checkpointing: str = "none", **settings: float | None) -> Engine:
    cfg = engine_config("eager", precision=precision, checkpointing=checkpointing)
    return build_engine(cfg, optim(**settings), module, group_of, Mesh(CPU))


def run(engine: Engine, steps: range, count: int = 1) -> None:
    for step in steps:
        train_step(engine, step, 0, 1, count)


def contents(engine: Engine) -> dict[tuple[str, str], Tensor]:
    return {(piece.kind, piece.name): piece.tensor.clone() for piece in engine.pieces()}


def assert_same_bits(engine: Engine, expected: dict[tuple[str, str], Tensor]) -> None:
    found = contents(engine)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def pieces_by_key(engine: Engine) -> dict[tuple[str, str], Piece]:
    return {(piece.kind, piece.name): piece for piece in engine.pieces()}


def test_training_is_torch_adamw_with_torch_clipping(engine: Engine) -> None:
    model, settings = toy(), optim()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(
        [
            {
                "params": [p for name, p in trainable.items() if group_of(name) == group],
                "lr": LRS[group],
                "betas": cfg.betas,
                "eps": cfg.eps,
                "weight_decay": cfg.weight_decay,
            }
            for group, cfg in settings.groups.items()
        ],
        foreach=False,
        fused=False,
    )
    for step in range(5):
        (batch,) = micro_batches(step, 0, 1, 1)
        output = model(ids=batch.ids, features=batch.features, x=batch.x)
        flow = (output.velocity - batch.target).square().mean(dim=(1, 2)).sum() / 8
        (2 * flow + output.text_loss_sum / 40).backward()
        groups = {
            group: math.sqrt(sum(float(p.grad.square().sum()) for n, p in trainable.items() if group_of(n) == group))
            for group in settings.groups
        }
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), settings.max_grad_norm)
        adamw.step()
        adamw.zero_grad()

        _, result = train_step(engine, step, 0, 1, 1)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert result.group_norms == pytest.approx(groups, rel=1e-5)
        assert not result.skipped
    assert engine.optimizer_step == 5
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(engine.module.named_parameters())[name], parameter, rtol=1e-5, atol=1e-6)


def test_micro_steps_add_up_to_the_whole_batch(engine: Engine) -> None:
    other = build(toy())
    run(engine, range(3), count=1)
    run(other, range(3), count=4)
    for key, tensor in contents(other).items():
        torch.testing.assert_close(tensor, contents(engine)[key], rtol=1e-5, atol=1e-6)


def test_a_gradient_within_the_limit_is_not_touched() -> None:
    engine = build(toy(), max_grad_norm=1e6)
    batch = next(micro_batches(0, 0, 1, 1))
    engine.backward(loss_of(engine, batch), last=True)
    gradient = engine.module.connector.weight.grad.clone()
    engine.step(LRS)
    first_moment = pieces_by_key(engine)["exp_avg", "connector.weight"].tensor
    assert torch.equal(first_moment, (1 - 0.8) * gradient)


def test_frozen_parameters_stay_and_have_no_optimizer_state(engine: Engine) -> None:
    before = contents(engine)
    run(engine, range(2))
    name = "conditioner.projector.weight"
    assert torch.equal(contents(engine)["weight", name], before["weight", name])
    assert not torch.equal(contents(engine)["weight", "connector.weight"], before["weight", "connector.weight"])
    assert {kind for kind, piece_name in before if piece_name == name} == {"weight"}


def test_moving_average_follows_the_weights(engine: Engine) -> None:
    key = ("ema", "connector.weight")
    expected = contents(engine)["weight", "connector.weight"]
    assert torch.equal(contents(engine)[key], expected)
    for step in range(3):
        run(engine, range(step, step + 1))
        expected = 0.9 * expected + 0.1 * contents(engine)["weight", "connector.weight"]
    torch.testing.assert_close(contents(engine)[key], expected)


def test_using_ema_shows_the_average_and_gives_every_bit_back(engine: Engine) -> None:
    run(engine, range(2))
    before = contents(engine)
    with engine.using_ema():
        for name, parameter in engine.module.named_parameters():
            expected = before["ema" if ("ema", name) in before else "weight", name]
            assert torch.equal(parameter.detach(), expected)
    assert_same_bits(engine, before)


def test_the_average_is_put_back_after_an_error(engine: Engine) -> None:
    run(engine, range(2))
    before = contents(engine)
    with pytest.raises(KeyError), engine.using_ema():
        raise KeyError
    assert_same_bits(engine, before)


def test_without_an_average_using_ema_keeps_the_weights() -> None:
    engine = build(toy(), ema_decay=None)
    run(engine, range(1))
    before = contents(engine)
    assert not any(kind == "ema" for kind, _ in before)
    with engine.using_ema():
        assert_same_bits(engine, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(engine: Engine, value: float) -> None:
    run(engine, range(2))
    before = contents(engine)
    _, result = train_step(engine, 2, 0, 1, 2, spoil=lambda loss: loss * value)
    assert result.skipped
    assert not math.isfinite(result.grad_norm)
    assert engine.optimizer_step == 2
    assert_same_bits(engine, before)

    _, result = train_step(engine, 2, 0, 1, 2)
    assert not result.skipped
    straight = build(toy())
    run(straight, range(2))
    run(straight, range(2, 3), count=2)
    assert_same_bits(engine, contents(straight))


def test_a_discarded_step_leaves_no_trace(engine: Engine) -> None:
    run(engine, range(2))
    before = contents(engine)
    engine.backward(loss_of(engine, next(micro_batches(9, 0, 1, 1))), last=False)
    engine.discard()
    assert_same_bits(engine, before)
    run(engine, range(2, 4))
    straight = build(toy())
    run(straight, range(4))
    assert_same_bits(engine, contents(straight))


def test_resume_is_bitwise(engine: Engine) -> None:
    run(engine, range(2))
    saved, step = contents(engine), engine.optimizer_step
    run(engine, range(2, 4))

    resumed = build(toy())
    run(resumed, range(5, 6))
    resumed.load_pieces(lambda kind, name, box: saved.get((kind, name)), step)
    assert resumed.optimizer_step == 2
    assert_same_bits(resumed, saved)
    run(resumed, range(2, 4))
    assert_same_bits(resumed, contents(engine))


def test_weights_alone_start_moments_at_zero_and_the_average_at_the_weights(engine: Engine) -> None:
    run(engine, range(2))
    saved = contents(engine)
    started = build(toy())
    run(started, range(5, 6))
    started.load_pieces(lambda kind, name, box: saved[kind, name] if kind == "weight" else None, 0)
    found = contents(started)
    assert torch.equal(found["ema", "connector.weight"], saved["weight", "connector.weight"])
    assert all(not tensor.any() for (kind, _), tensor in found.items() if kind.startswith("exp_avg"))
    assert started.optimizer_step == 0


def test_a_missing_weight_is_named(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"no weight for parameter conditioner.queries"):
        engine.load_pieces(lambda kind, name, box: None, 0)


def test_pieces_cover_every_parameter_once(engine: Engine) -> None:
    pieces = pieces_by_key(engine)
    for name, parameter in engine.module.named_parameters():
        piece = pieces["weight", name]
        assert (piece.shape, piece.box) == (tuple(parameter.shape), whole(parameter.shape))
        assert engine.shapes[name] == piece.shape
    assert "conditioner.head.weight" not in engine.shapes, "tied to the embedding, so it is no parameter of its own"


def test_bf16_computes_in_bfloat16_over_float32_weights() -> None:
    engine = build(toy(), precision="bf16")
    batch = next(micro_batches(0, 0, 1, 1))
    with engine.autocast():
        output = engine.module(ids=batch.ids, features=batch.features, x=batch.x)
    assert output.velocity.dtype == torch.bfloat16
    loss, _ = train_step(engine, 0, 0, 1, 1)
    expected, _ = train_step(build(toy()), 0, 0, 1, 1)
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.02)
    assert all(piece.tensor.dtype == torch.float32 for piece in engine.pieces())


def test_activation_checkpointing_is_applied_to_the_blocks_and_changes_no_bit(engine: Engine) -> None:
    calls = []
    checkpointed = build(toy(), checkpointing="full")
    checkpointed.module.dit.blocks[0].mlp.register_forward_pre_hook(lambda *args: calls.append(args))
    run(checkpointed, range(2))
    run(engine, range(2))
    assert len(calls) == 4
    assert_same_bits(checkpointed, contents(engine))


def test_eager_refuses_several_processes() -> None:
    with pytest.raises(ValueError, match=r"engine.name=eager runs one process, not 2; use engine.name=zero or fsdp2"):
        build_engine(engine_config("eager"), optim(), toy(), group_of, Mesh(CPU, dp_shard=2))


def test_a_parameter_without_settings_is_named() -> None:
    with pytest.raises(ValueError, match=r"parameter connector.weight belongs to optim.groups.other, which is not set"):
        build_engine(
            engine_config("eager"),
            optim(),
            nn.ModuleDict({"connector": nn.Linear(2, 2)}),
            lambda _: "other",
            Mesh(CPU),
        )


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter conditioner.queries is torch.bfloat16; engines keep float32"):
        build(toy().bfloat16())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build(toy().requires_grad_(False))


def test_a_group_without_trainable_parameters_is_left_out() -> None:
    module = toy()
    module.conditioner.requires_grad_(False)
    engine = build(module)
    _, result = train_step(engine, 0, 0, 1, 1)
    assert set(result.group_norms) == {"dit"}
    assert result.grad_norm == pytest.approx(result.group_norms["dit"])
