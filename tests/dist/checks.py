"""What every sharded engine is held to. Each check runs on all ranks and raises on the rank that sees a fault."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from toy_model import engine_config, group_of, loss_of, micro_batches, optim, toy, train_step

from rae_scale.config.schema import EngineConfig
from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh
from rae_scale.state import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
TOLERANCE = 1e-5
Snapshot = dict[tuple[str, str, tuple[int, ...]], Tensor]


def build(cfg: EngineConfig, mesh: Mesh, freeze_llm: bool = False) -> Engine:
    module = toy()
    if freeze_llm:
        module.conditioner.embed.requires_grad_(False)
        module.conditioner.layers.requires_grad_(False)
    return build_engine(cfg, optim(), module, group_of, mesh)


def build_eager(freeze_llm: bool = False) -> Engine:
    """The reference: one process with the whole batch, here on every rank."""
    return build(engine_config("eager"), Mesh(CPU), freeze_llm)


def snapshot(engine: Engine) -> Snapshot:
    return {(p.kind, p.name, p.box.start): p.tensor.float().clone() for p in engine.pieces()}


def assert_same_bits(engine: Engine, expected: Snapshot, when: str) -> None:
    found = snapshot(engine)
    assert found.keys() == expected.keys(), when
    different = [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]
    assert not different, f"{when}: {different}"


def assert_close_to(engine: Engine, reference: Engine, when: str) -> None:
    """Compare this rank's pieces with the same ranges of an engine that holds everything."""
    whole = {(p.kind, p.name): p.tensor for p in reference.pieces()}
    for piece in engine.pieces():
        expected = whole[piece.kind, piece.name][piece.box.slices]
        torch.testing.assert_close(
            piece.tensor, expected, rtol=TOLERANCE, atol=1e-6, msg=lambda m, p=piece: f"{when}: {p.kind} {p.name}\n{m}"
        )


def run(engine: Engine, mesh: Mesh, steps: range, count: int = 2) -> None:
    for step in steps:
        train_step(engine, step, mesh.dp_rank, mesh.dp_world, count)


def check_curve(cfg: EngineConfig, mesh: Mesh, steps: int = 20, count: int = 2, freeze_llm: bool = False) -> None:
    """Losses, gradient norms and the final state are those of one process with the same global batch."""
    engine, reference = build(cfg, mesh, freeze_llm), build_eager(freeze_llm)
    clipped = 0
    for step in range(steps):
        local, result = train_step(engine, step, mesh.dp_rank, mesh.dp_world, count)
        loss = float(mesh.all_reduce(torch.tensor(local, dtype=torch.float64)))
        expected_loss, expected = train_step(reference, step, 0, 1, 1)
        assert abs(loss - expected_loss) <= TOLERANCE * abs(expected_loss), (step, loss, expected_loss)
        assert abs(result.grad_norm - expected.grad_norm) <= TOLERANCE * expected.grad_norm, (step, result, expected)
        for group, norm in expected.group_norms.items():
            assert abs(result.group_norms[group] - norm) <= TOLERANCE * expected.grad_norm, (step, group)
        clipped += expected.grad_norm > optim().max_grad_norm
    assert clipped > steps // 2, "the curve must be one that clipping shapes"
    assert_close_to(engine, reference, f"{cfg.name} after {steps} steps")
    engine.close()


def check_interruptions(cfg: EngineConfig, mesh: Mesh, folder: Path) -> None:
    """Bitwise: neither a step that is given up, nor one with a gradient that is not finite, nor an evaluation, nor a
    stop with a resume changes what training comes to."""
    straight = build(cfg, mesh)
    run(straight, mesh, range(2))
    middle = snapshot(straight)
    run(straight, mesh, range(2, 6))
    end = snapshot(straight)
    straight.close()

    engine = build(cfg, mesh)
    run(engine, mesh, range(2))
    assert_same_bits(engine, middle, "two runs of the same steps")
    check_evaluation(engine)
    assert_same_bits(engine, middle, "an evaluation with the moving average")
    path = save_checkpoint(folder, 2, engine, mesh, {"seed": 7}, keep_last=2)
    check_not_finite(engine, mesh)
    assert_same_bits(engine, middle, "a step whose gradient is not finite")
    # A real step follows each fault at once: another fault in between could clear up after it.
    run(engine, mesh, range(2, 3))
    for step, backwards in ((3, 1), (4, 2), (5, 0)):
        before = snapshot(engine)
        give_up_after(engine, mesh, backwards)
        assert_same_bits(engine, before, f"discard after {backwards} of 2 backwards")
        run(engine, mesh, range(step, step + 1))
    assert_same_bits(engine, end, "after interruptions")
    engine.close()

    resumed = build(cfg, mesh)
    run(resumed, mesh, range(7, 8))  # a state that loading has to replace
    state = load_checkpoint(path, resumed, mesh)
    assert (state["step"], state["optimizer_step"], state["seed"]) == (2, 2, 7), state
    assert resumed.optimizer_step == 2
    assert_same_bits(resumed, middle, "loaded")
    run(resumed, mesh, range(2, 6))
    assert_same_bits(resumed, end, "resumed")
    resumed.close()


def give_up_after(engine: Engine, mesh: Mesh, backwards: int) -> None:
    """Discard a step of two micro-batches after some backwards, with a forward behind them that gets none."""
    for number, batch in enumerate(micro_batches(5, mesh.dp_rank, mesh.dp_world, 2), start=1):
        loss = loss_of(engine, batch)
        if number > backwards:
            break
        engine.backward(loss, last=number == 2)
    engine.discard()


def check_not_finite(engine: Engine, mesh: Mesh) -> None:
    """A loss that breaks on the last rank only: no rank may step."""
    broken = mesh.rank == mesh.world_size - 1
    _, result = train_step(
        engine, 6, mesh.dp_rank, mesh.dp_world, 2, lambda loss: loss * float("nan") if broken else loss
    )
    assert result.skipped and result.grad_norm != result.grad_norm, result
    assert engine.optimizer_step == 2


def check_evaluation(engine: Engine) -> None:
    """Inside `using_ema` the weights are the moving average, and parts of the module run by themselves.

    The order matters: after a forward of the whole module, weights stay gathered that later calls may find there.
    """
    batch = next(micro_batches(9, 0, 1, 1))
    expected = expected_velocity(engine, batch)
    with torch.no_grad():
        raw = engine.module(ids=batch.ids, features=batch.features, x=batch.x).velocity
    assert not torch.allclose(raw, expected, rtol=1e-3), "the moving average must differ from the weights by now"
    with engine.using_ema(), torch.no_grad():
        parts = engine.module.dit.forward_tokens(batch.x, engine.module.condition(batch.ids, batch.features))
        whole = engine.module(ids=batch.ids, features=batch.features, x=batch.x).velocity
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = engine.module(ids=batch.ids, features=batch.features, x=batch.x).velocity
    assert torch.equal(again, raw)


def expected_velocity(engine: Engine, batch: object) -> Tensor:
    """The plain model with the engine's moving average, put together from all ranks' pieces."""
    model = toy()
    mine = [(p.name, p.box, p.tensor.clone()) for p in engine.pieces() if p.kind == "ema"]
    gathered: list[object] = [mine]
    if torch.distributed.is_initialized():
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, mine)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for pieces in gathered:
            for name, box, tensor in pieces:  # type: ignore[attr-defined]
                named[name][box.slices] = tensor
        return model(ids=batch.ids, features=batch.features, x=batch.x).velocity  # type: ignore[attr-defined]


def check_bf16(cfg: EngineConfig, mesh: Mesh) -> None:
    """Computes in bfloat16, starts from the exact float32 weights and keeps them, and learns as float32 does."""
    engine, reference = build(cfg, mesh), build_eager()
    for piece in engine.pieces():
        if piece.kind != "weight" or engine_freezes(piece.name):
            continue
        initial = dict(toy().named_parameters())[piece.name].detach()[piece.box.slices]
        assert piece.tensor.dtype == torch.float32
        assert torch.equal(piece.tensor, initial), piece.name
    batch = next(micro_batches(0, 0, 1, 1))
    with engine.autocast(), torch.no_grad():
        output = engine.module(ids=batch.ids, features=batch.features, x=batch.x)
    assert output.velocity.dtype == torch.bfloat16
    for step in range(4):
        local, result = train_step(engine, step, mesh.dp_rank, mesh.dp_world, 2)
        loss = float(mesh.all_reduce(torch.tensor(local, dtype=torch.float64)))
        expected_loss, expected = train_step(reference, step, 0, 1, 1)
        assert abs(loss - expected_loss) <= 0.02 * abs(expected_loss), (step, loss, expected_loss)
        assert abs(result.grad_norm - expected.grad_norm) <= 0.05 * expected.grad_norm, (step, result, expected)
    with engine.using_ema(), engine.autocast(), torch.no_grad():
        engine.module.dit.forward_tokens(batch.x, engine.module.condition(batch.ids, batch.features))
    engine.close()


def engine_freezes(name: str) -> bool:
    return name.startswith("conditioner.projector.")


def check_activation_checkpointing(cfg: EngineConfig, mesh: Mesh) -> None:
    full = {"activation_checkpointing": "full"}
    selective = {"activation_checkpointing": "selective", "saved_ops": {"linear": 2, "attention": -1}}
    for settings in (full, selective):
        check_curve(cfg.model_copy(update=settings), mesh, steps=4)
