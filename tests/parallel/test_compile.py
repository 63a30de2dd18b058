"""Compiled blocks compute what the others do, are compiled once, and see plain operations only."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from rae_kernels.dispatch import chosen, use
from rae_scale.config.schema import EngineConfig, GroupConfig, OptimConfig
from rae_scale.engines import build_engine
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.parallel import Mesh, apply_activation_checkpointing, compile_blocks
from rae_scale.parallel.compile import keep_gradients

CPU = torch.device("cpu")
CFG = DiTConfig(5, hidden_size=48, depth=3, num_heads=4, z_channels=40, grid_size=2, qk_norm=True)
HEAD = DDTHeadConfig(hidden_size=64, depth=2, num_heads=4)


class Denoiser(nn.Module):
    """A DiT under the name that it has in ScaleRAE, behind layers of varying length like the language model's."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
        self.dit = DiT(cfg)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(y)
        return self.dit.forward_tokens(x, t, y)


class Recorder:
    """A backend that runs what it is given as it stands, and keeps the graphs and counts their runs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.runs: Counter[str] = Counter()
        self.backend = aot_autograd(
            fw_compiler=functools.partial(self._compile, "forward"),
            bw_compiler=functools.partial(self._compile, "backward"),
        )

    def _compile(self, direction: str, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            self.runs[direction] += 1
            return graph(*args)

        return make_boxed_func(run)

    @property
    def operators(self) -> set[str]:
        nodes = [node for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"]
        return {str(node.target) for node in nodes}


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def denoiser(cfg: DiTConfig = CFG) -> Denoiser:
    """Random weights everywhere: gates start at 0, behind which a mistake would not show."""
    torch.manual_seed(0)
    module = Denoiser(cfg)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        module.dit.init_constants()
    return module


def arguments(step: int, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(size, 4, channels, generator=generator) for channels in (5, 40))
    return x, torch.rand(size, generator=generator), y


def gradients(module: nn.Module, step: int) -> dict[str, Tensor]:
    loss = module(*(argument.to(next(module.parameters()).device) for argument in arguments(step))).square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()} | {"": loss.detach()}
    module.zero_grad()
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = float((ours[name] - expected).abs().max())
        # A bias of keys has no gradient in truth: what there is of it is rounding.
        assert error <= 1e-5 * float(expected.abs().max()) + 1e-8, (name, error)


def test_losses_and_gradients_are_those_of_the_uncompiled_model(recorder: Recorder) -> None:
    module, plain = denoiser(), denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    for step in range(3):
        assert_close(gradients(module, step), gradients(plain, step))


def test_one_compilation_serves_all_blocks_and_all_steps(recorder: Recorder) -> None:
    module = denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    for step in range(3):
        gradients(module, step)
    assert len(recorder.graphs) == 2  # forward and backward
    assert recorder.runs == {"forward": 9, "backward": 9}


def test_the_wide_head_is_compiled_for_itself(recorder: Recorder) -> None:
    cfg = DiTConfig(5, hidden_size=48, depth=3, num_heads=4, z_channels=40, grid_size=2, ddt=HEAD)
    module, plain = denoiser(cfg), denoiser(cfg)
    compile_blocks(module, "blocks", CPU, recorder.backend)
    assert_close(gradients(module, 0), gradients(plain, 0))
    assert len(recorder.graphs) == 4
    assert recorder.runs == {"forward": 5, "backward": 5}


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_operations_are_plain_inside_and_as_chosen_outside(choice: str, recorder: Recorder) -> None:
    module, plain = denoiser(), denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    with use(choice):
        output = module(*arguments(0))
        assert chosen() == choice
        expected = plain(*arguments(0))
    output.sum().backward()
    assert not [name for name in recorder.operators if not name.startswith(("aten.", "prims.", "<built-in"))]
    assert any(name.startswith("aten.rsqrt") for name in recorder.operators), "the norms are in the graph"
    # The final layer, which is not in a block, has the operators of the choice.
    assert nodes_of(output) - {"CompiledFunctionBackward"} <= nodes_of(expected)
    assert any("rae_kernels" in name for name in nodes_of(output)) == (choice == "auto")


def nodes_of(output: Tensor) -> set[str]:
    """Names of everything that backward would go through."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


def test_an_error_in_a_block_leaves_the_choice_as_it_was(recorder: Recorder) -> None:
    module = denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    block = module.dit.blocks[0]
    with pytest.raises(Exception, match=r"shape|size"):
        block(torch.randn(2, 4, 48), torch.randn(2, 4, 3), module.dit.rope_cos)
    assert chosen() == "auto"


def test_what_needs_no_gradient_runs_uncompiled(recorder: Recorder) -> None:
    module, plain = denoiser(), denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    with torch.no_grad():
        for size in (1, 2, 3):  # samples have other sizes than training, each of which would be compiled
            assert torch.equal(module(*arguments(0, size)), plain(*arguments(0, size)))
    assert not recorder.graphs


def test_names_of_parameters_stay(recorder: Recorder) -> None:
    module, plain = denoiser(), denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_activation_checkpointing_runs_the_compiled_block_again(recorder: Recorder) -> None:
    module, plain = denoiser(), denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    apply_activation_checkpointing(module, "full", {})
    for step in range(2):
        assert_close(gradients(module, step), gradients(plain, step))
    assert len(recorder.graphs) == 2
    assert recorder.runs == {"forward": 12, "backward": 6}


def test_lists_of_varying_length_are_left_alone(recorder: Recorder) -> None:
    module = denoiser()
    compile_blocks(module, "blocks", CPU, recorder.backend)
    assert all("forward" in vars(block) for block in module.dit.blocks)
    assert not any("forward" in vars(layer) for layer in module.layers)


def test_mode_none_changes_nothing() -> None:
    module = denoiser()
    compile_blocks(module, "none", CPU)
    assert not any("forward" in vars(part) for part in module.modules())


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"engine\.compile: Linear has no nn\.ModuleList named blocks.*=none"):
        compile_blocks(nn.Linear(2, 2), "blocks", CPU)


def test_graphs_of_launches_need_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"engine\.compile=blocks-cudagraphs on cpu.*use engine\.compile=blocks"):
        compile_blocks(denoiser(), "blocks-cudagraphs", CPU)


class Replayed(torch.autograd.Function):
    """Hands out its gradient in the same memory each time, as a replayed backward pass does."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, memory: Tensor, value: float) -> Tensor:
        ctx.memory, ctx.value = memory, value
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.memory.fill_(ctx.value)
        # A tensor that nobody else holds, so that autograd takes it for the gradient as it is.
        return torch.empty(0).set_(ctx.memory.untyped_storage(), 0, (2, 2)), None, None


def test_gradients_of_replayed_launches_are_copied() -> None:
    block, memory = nn.Linear(2, 2, bias=False), torch.empty(2, 2)
    keep_gradients(block)
    for value in (1.0, 2.0):
        Replayed.apply(block.weight, memory, value).backward()
    assert torch.equal(block.weight.grad, torch.full((2, 2), 3.0))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_training_through_an_engine_comes_to_the_same_weights(
    checkpointing: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_recorder = functools.partial(compile_blocks, backend=recorder.backend)
    monkeypatch.setattr("rae_scale.engines.build.compile_blocks", with_recorder)
    trained = {mode: train(mode, checkpointing, CPU) for mode in ("none", "blocks")}
    assert trained["none"].keys() == trained["blocks"].keys()
    assert recorder.graphs
    for key, expected in trained["none"].items():
        assert torch.allclose(trained["blocks"][key], expected, rtol=1e-4, atol=1e-6), key


def train(mode: str, checkpointing: str, device: torch.device, steps: int = 3) -> dict[tuple[str, str], Tensor]:
    """Two micro-steps per step; an eps that does not blow rounding errors up to whole steps."""
    optim = OptimConfig(groups={"dit": GroupConfig(lr=1e-3, eps=1e-3)}, ema_decay=0.9)
    cfg = EngineConfig(precision="fp32", compile=mode, activation_checkpointing=checkpointing)
    engine = build_engine(cfg, optim, denoiser(), lambda name: "dit", Mesh(device))
    for step in range(steps):
        for last in (False, True):
            x, t, y = (argument.to(device) for argument in arguments(2 * step + last))
            engine.backward(engine.module(x, t, y).square().mean(), last=last)
        engine.step({"dit": 1e-3})
    state = {(piece.kind, piece.name): piece.tensor.clone() for piece in engine.pieces()}
    engine.close()
    return state


@pytest.mark.long
def test_inductor_gives_the_same_gradients() -> None:
    module, plain = denoiser(), denoiser()
    compile_blocks(module, "blocks", CPU)
    for step in range(2):
        assert_close(gradients(module, step), gradients(plain, step))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["blocks", "blocks-cudagraphs"])
def test_training_on_a_gpu_comes_to_the_same_weights(mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    trained = {name: train(name, "none", device, steps=6) for name in ("none", mode)}
    for key, expected in trained["none"].items():
        assert torch.allclose(trained[mode][key], expected, rtol=1e-3, atol=1e-5), key
