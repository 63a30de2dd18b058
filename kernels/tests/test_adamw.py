"""The optimizer step: its arithmetic against torch.optim.AdamW, its CUDA source, run on the CPU, against its
specification bit by bit, and how it is called."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rae_kernels import adamw, cuda, dispatch
from rae_kernels.adamw import adamw_ema_
from rae_kernels.spec import adamw as spec

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1, "step": 7}
SIZES = (1, 7, 8, 9, 0, 1003, 32_768, 2 * 32_768 + 13)
GUARD = 16

Random = Callable[..., Tensor]


class State:
    """Lists of flat tensors, each in the middle of a larger one whose margins must stay."""

    def __init__(
        self,
        random: Random,
        sizes: tuple[int, ...] = SIZES,
        gradient: torch.dtype = FLOAT32,
        moment: torch.dtype = FLOAT32,
        with_ema: bool = True,
        with_copy: bool = True,
        offsets: tuple[int, ...] = (0, 0, 0, 0, 0, 0),
    ) -> None:
        kinds = [(FLOAT32, True), (gradient, True), (moment, True), (moment, True), (FLOAT32, with_ema)]
        kinds.append((BFLOAT16, with_copy))
        self.offsets, self.sizes = offsets, sizes
        self.memory = [[random(n + 2 * GUARD, dtype=dtype) for n in sizes] if there else [] for dtype, there in kinds]
        for squares in self.memory[3]:
            squares.square_()
        for copy in self.memory[5]:
            copy.fill_(float("nan"))

    @property
    def lists(self) -> list[list[Tensor]]:
        return [
            [x[GUARD + offset :][:n] for x, n in zip(tensors, self.sizes, strict=True)] if tensors else []
            for tensors, offset in zip(self.memory, self.offsets, strict=True)
        ]

    def clone(self) -> State:
        other = object.__new__(State)
        other.__dict__ = self.__dict__ | {"memory": [[x.clone() for x in tensors] for tensors in self.memory]}
        return other


def assert_same(found: State, expected: State) -> None:
    for kind, (ours, theirs) in enumerate(zip(found.memory, expected.memory, strict=True)):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text, kind=kind: f"{kind} {text}"
            )


def specify(state: State, clip_factor: float = 1.0, ema_decay: float = 0.99, seed: int = 5, **changes: Any) -> None:
    """One step, operation by operation."""
    numbers = spec.scalars(**SETTINGS | changes, clip_factor=clip_factor, ema_decay=ema_decay)
    weights, gradients, first, second, emas, copies = state.lists
    for i, tensors in enumerate(zip(weights, gradients, first, second, strict=True)):
        ema, copy = emas[i] if emas else None, copies[i] if copies else None
        spec.update_(*tensors, ema, copy, numbers, spec.Random(seed, (SETTINGS | changes)["step"]), i, 0)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The .cu file compiled for the CPU, as a stand-in for CUDA's driver."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, to run the CUDA source on the CPU")
    folder, library = Path(__file__).parent, tmp_path_factory.mktemp("host") / "adamw.so"
    # No contraction, as on the GPU.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
    includes = ["-I", str(folder), "-I", str(Path(adamw.__file__).parent / "csrc")]
    source = str(folder / "adamw_on_host.cpp")
    subprocess.run([compiler, *flags, *adamw.PROGRAM.definitions, *includes, source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def run_source(host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """One step by the CUDA source, launched as on a GPU."""
    monkeypatch.setattr(cuda, "driver", lambda: host)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))

    def run(
        state: State,
        clip_factor: float = 1.0,
        ema_decay: float = 0.99,
        seed: int = 5,
        parameters: list[int] | None = None,
        first_elements: list[int] | None = None,
        **changes: Any,
    ) -> None:
        settings, lists = SETTINGS | changes, state.lists
        kernel = cuda.Kernel(ctypes.c_void_p(), adamw.kernel_name(lists[1][0].dtype, lists[2][0].dtype))
        numbers = (settings["lr"], *settings["betas"], settings["eps"], settings["weight_decay"], settings["step"])
        places = parameters or list(range(len(lists[0]))), first_elements or [0] * len(lists[0])
        adamw.launch(kernel, *lists, *numbers, clip_factor, ema_decay, seed, *places)

    return run


def test_the_arithmetic_is_that_of_torch_adamw(random: Random):
    weights = random(400)
    module = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([module], lr=3e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, foreach=False)
    exp_avg, exp_avg_sq, ema = torch.zeros(400), torch.zeros(400), weights.clone()
    expected_ema = weights.clone()
    for step in range(1, 6):
        gradient = random(400)
        numbers = spec.scalars(**SETTINGS | {"step": step}, clip_factor=0.25, ema_decay=0.99)
        weights, exp_avg, exp_avg_sq, ema = spec.update(weights, gradient, exp_avg, exp_avg_sq, ema, numbers)
        module.grad = 0.25 * gradient
        optimizer.step()
        expected_ema.lerp_(module.detach(), 0.01)
        state = optimizer.state[module]
        for ours, theirs in ((weights, module), (exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"])):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ema, expected_ema, rtol=1e-6, atol=1e-7)


def test_the_fused_path_is_the_same_arithmetic(random: Random):
    fused = State(random, gradient=BFLOAT16)
    written = fused.clone()
    adamw_ema_(*fused.lists, **SETTINGS, clip_factor=0.3, ema_decay=0.99)
    specify(written, clip_factor=0.3)
    for kind, (ours, theirs) in enumerate(zip(fused.lists, written.lists, strict=True)):
        if kind != 1:  # gradients are undefined afterwards
            tolerance = {"rtol": 8e-3, "atol": 0} if kind == 5 else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("gradient", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("moment", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("with_ema", "with_copy"), [(True, True), (False, False), (True, False), (False, True)])
def test_the_source_gives_the_bits_of_the_specification(
    run_source: Callable[..., None],
    random: Random,
    gradient: torch.dtype,
    moment: torch.dtype,
    with_ema: bool,
    with_copy: bool,
):
    ours = State(random, SIZES, gradient, moment, with_ema, with_copy)
    theirs = ours.clone()
    run_source(ours, clip_factor=0.37, seed=2**63 + 5)
    specify(theirs, clip_factor=0.37, seed=2**63 + 5)
    assert_same(ours, theirs)


@pytest.mark.parametrize("moment", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("offsets", [(1, 1, 1, 1, 1, 1), (5, 5, 5, 5, 5, 5), (0, 3, 0, 0, 1, 0), (4, 0, 1, 2, 3, 5)])
def test_tensors_may_begin_anywhere(
    run_source: Callable[..., None], random: Random, moment: torch.dtype, offsets: tuple[int, ...]
):
    ours = State(random, (9, 1003, 5, 40_000), FLOAT32, moment, offsets=offsets)
    theirs = ours.clone()
    run_source(ours)
    specify(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("changes", [{"betas": (0.0, 0.0)}, {"betas": (0.3, 0.4)}, {"weight_decay": 0.0, "step": 1}])
@pytest.mark.parametrize("ema_decay", [0.0, 0.4, 0.9999])
def test_settings_of_all_sizes(
    run_source: Callable[..., None], random: Random, changes: dict[str, Any], ema_decay: float
):
    ours = State(random, (1003,), FLOAT32, FLOAT32)
    theirs = ours.clone()
    run_source(ours, ema_decay=ema_decay, **changes)
    specify(theirs, ema_decay=ema_decay, **changes)
    assert_same(ours, theirs)
    if ema_decay == 0:
        assert torch.equal(ours.lists[4][0], ours.lists[0][0])


def test_values_that_are_not_finite_stay_so(run_source: Callable[..., None], random: Random):
    ours = State(random, (64,), FLOAT32, BFLOAT16)
    ours.lists[1][0][:3] = torch.tensor([float("inf"), float("nan"), -float("inf")])
    ours.lists[2][0][3:5] = torch.tensor([float("inf"), float("nan")], dtype=BFLOAT16)
    theirs = ours.clone()
    run_source(ours)
    specify(theirs)
    assert_same(ours, theirs)
    assert not ours.lists[2][0][:5].isfinite().any() and ours.lists[2][0][5:].isfinite().all()


@pytest.mark.parametrize("cut", [8, 13, 402])
def test_rounding_does_not_depend_on_how_a_parameter_is_cut(run_source: Callable[..., None], random: Random, cut: int):
    whole = State(random, (1000,), FLOAT32, BFLOAT16, offsets=(0,) * 6)
    parts = whole.clone()
    parts.__dict__["memory"] = [[x[: GUARD + cut + GUARD].clone(), x[cut:].clone()] for (x,) in parts.memory]
    parts.sizes = (cut, 1000 - cut)
    specified = parts.clone()
    run_source(whole, parameters=[2**40 + 3])
    run_source(parts, parameters=[2**40 + 3] * 2, first_elements=[0, cut])
    adamw_ema_(
        *specified.lists,
        **SETTINGS,
        ema_decay=0.99,
        seed=5,
        parameters=[2**40 + 3] * 2,
        first_elements=[0, cut],
    )
    for kind in (0, 2, 3, 4, 5):
        assert torch.equal(torch.cat(parts.lists[kind]), whole.lists[kind][0])
        assert torch.equal(torch.cat(specified.lists[kind]), whole.lists[kind][0])


def test_rounding_differs_by_seed_step_parameter_and_moment(random: Random):
    def words(seed: int, step: int, parameter: int) -> Tensor:
        return spec.rounding_words(spec.Random(seed, step), parameter, 0, 1000, torch.device("cpu"))

    first = words(0, 1, 0)
    for other in (words(1, 1, 0), words(0, 2, 0), words(0, 1, 1)):
        assert (other == first).sum() < 3
    assert ((first & 0xFFFF) == (first >> 16)).sum() < 3


def test_moments_in_bfloat16_do_not_stall():
    """0.999 ** 300 of the squares is left without gradients; rounded to nearest they would stay at 1 for ever."""
    n = 2048
    weights, exp_avgs, exp_avg_sqs = (
        [torch.zeros(n)],
        [torch.ones(n, dtype=BFLOAT16)],
        [torch.ones(n, dtype=BFLOAT16)],
    )
    for step in range(1, 301):
        settings = SETTINGS | {"betas": (0.998, 0.999), "step": step}
        adamw_ema_(weights, [torch.zeros(n)], exp_avgs, exp_avg_sqs, **settings)
    assert exp_avgs[0].float().mean() == pytest.approx(0.998**300, rel=0.01)
    assert exp_avg_sqs[0].float().mean() == pytest.approx(0.999**300, rel=0.01)
    assert torch.tensor(0.999).to(BFLOAT16) == 1


def test_the_operator(random: Random):
    state, other = State(random, (5, 12)), State(random, (5, 12))
    other = state.clone()
    arguments = (3e-3, 0.9, 0.999, 1e-6, 0.1, 7, 0.5, 0.99, 0, [0, 1], [0, 0])
    adamw.adamw_ema(*state.lists, *arguments)
    adamw_ema_(*other.lists, **SETTINGS, clip_factor=0.5, ema_decay=0.99)
    assert_same(state, other)
    torch.library.opcheck(adamw.adamw_ema, (*state.lists, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_a_missing_kernel_is_reported_and_an_error_where_demanded(monkeypatch: pytest.MonkeyPatch, random: Random):
    monkeypatch.setattr(cuda, "find_kernel", lambda program, name, device: (None, f"no compiler for {name}"))
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    state = State(random, (5,))
    other = state.clone()
    arguments = (3e-3, 0.9, 0.999, 1e-6, 0.1, 7, 0.5, 0.99, 0, [0], [0])
    adamw.on_gpu(*state.lists, *arguments)
    adamw_ema_(*other.lists, **SETTINGS, clip_factor=0.5, ema_decay=0.99)
    assert_same(state, other)
    assert dispatch.fallbacks() == {("adamw_ema", "cuda"): "no compiler for adamw_float32_float32"}
    with dispatch.use("cuda"), pytest.raises(ValueError, match="no compiler for adamw_float32_float32"):
        adamw.on_gpu(*state.lists, *arguments)


def test_kernels_demanded_on_the_cpu_are_an_error(random: Random):
    with dispatch.use("cuda"), pytest.raises(ValueError, match=r"RAE_KERNELS=cuda, but the optimizer's tensors are on"):
        adamw_ema_(*State(random, (5,)).lists, **SETTINGS)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (0, torch.zeros(5, dtype=BFLOAT16), "weights are torch.bfloat16; they must all be one of torch.float32"),
        (1, torch.zeros(5, dtype=torch.float16), "gradients are torch.float16"),
        (1, torch.zeros(4), r"gradients have \[4\] elements beside weights of \[5\]"),
        (3, torch.zeros(5, dtype=BFLOAT16), "exp_avg_sqs are torch.bfloat16; they must all be one of torch.float32"),
        (4, torch.zeros(10)[::2], "or are not contiguous"),
        (5, torch.zeros(5), "copies are torch.float32"),
        (4, torch.zeros(5, device="meta"), "emas are on cpu, meta"),
    ],
)
def test_tensors_that_do_not_fit_are_named(random: Random, kind: int, wrong: Tensor, message: str):
    lists = State(random, (5,)).lists
    lists[kind] = [wrong]
    with pytest.raises(ValueError, match=message):
        adamw_ema_(*lists, **SETTINGS)


@pytest.mark.parametrize("wrong", [{"step": 0}, {"betas": (0.9, 1.0)}])
def test_settings_without_a_bias_correction_are_named(random: Random, wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="has no bias correction: count steps from 1 and choose betas from 0 to below"):
        adamw_ema_(*State(random, (5,)).lists, **SETTINGS | wrong)


def test_nothing_to_do():
    adamw_ema_([], [], [], [], **SETTINGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradient", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("moment", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0, 0), (4, 0, 1, 2, 3, 5)])
def test_the_kernel_on_a_gpu_gives_the_bits_of_the_specification(
    random: Random, gradient: torch.dtype, moment: torch.dtype, offsets: tuple[int, ...]
):
    theirs = State(random, SIZES, gradient, moment, offsets=offsets)
    ours = theirs.clone()
    ours.memory = [[x.cuda() for x in tensors] for tensors in ours.memory]
    with dispatch.use("cuda"):
        adamw_ema_(*ours.lists, **SETTINGS, clip_factor=0.37, ema_decay=0.99, seed=5)
    ours.memory = [[x.cpu() for x in tensors] for tensors in ours.memory]
    specify(theirs, clip_factor=0.37)
    assert_same(ours, theirs)
