"""Real training steps of a small model on gloo ranks, and the memory that they take at most.

    run_ranks(measure_all, ranks, folder, args=([case, ...],))      bytes of each case on each rank

PyTorch's profiler records every allocation and release of tensors' memory, those inside of operators too. What is
reported is the highest total within one step in the steady state, less what was there before the model was built.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rae_scale import ops
from rae_scale.config import Config
from rae_scale.data.collate import Batch
from rae_scale.engines import build_engine
from rae_scale.models import llm_zoo, zoo
from rae_scale.models.composite import build_scale_rae
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.models.encoders import build_encoder
from rae_scale.models.encoders.siglip_demo import SiglipDemoConfig, SiglipDemoEncoder
from rae_scale.models.llm_zoo import LLMSpec
from rae_scale.parallel import Mesh, build_mesh, init_distributed, share_samples, shutdown_distributed
from rae_scale.train.loop import Run, global_step
from rae_scale.train.stages import GenerationStage

CPU = torch.device("cpu")
MARK = "memory mark: "
ENTER, LEAVE = "[", "]"
PHASES = ("prepare", "forward", "backward", "optimizer")
GRID, CHANNELS, PIXELS = 4, 24, 64
SLOTS = GRID * GRID
TEXT = 8  # tokens beside the image
LENGTH = SLOTS + TEXT
LABELLED = 4
# Weights and activations weigh about the same.
DIT = DiTConfig(CHANNELS, hidden_size=192, depth=4, num_heads=4, z_channels=160, grid_size=GRID)
WIDE = replace(DIT, ddt=DDTHeadConfig(hidden_size=256, depth=2, num_heads=4))
LLM = LLMSpec(128, 3, 4, 2, 320, 600, tie_word_embeddings=True)
UNTIED = replace(LLM, tie_word_embeddings=False, vocab_size=1200)
WARM_UP = 3
"""Steps before the measured one: DeepSpeed's stage 3 knows the order of its gathers from the third on."""


def add_models() -> None:
    """The models of these measurements, by name."""
    zoo.DIT_ZOO |= {"dit-measured": DIT, "dit-measured-ddt": WIDE}
    llm_zoo.LLM_ZOO |= {"qwen2-measured": LLM, "qwen2-measured-untied": UNTIED}


def save_encoder(folder: Path) -> str:
    """A frozen encoder of the sizes that the models here take."""
    SiglipDemoEncoder(
        SiglipDemoConfig(image_size=PIXELS, patch_size=PIXELS // GRID, channels=CHANNELS)
    ).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Case:
    """engine, parallel: sections of the configuration. encoder: its folder. images: per rank and micro-step.

    kernels: of RAE_KERNELS.
    """

    name: str
    engine: dict[str, Any]
    parallel: dict[str, int]
    encoder: str
    dit: str = "dit-measured"
    llm: str = "qwen2-measured"
    llm_trains: bool = True
    ema: bool = False
    images: int = 24
    micro_steps: int = 1
    kernels: Literal["auto", "reference"] = "auto"

    def config(self) -> Config:
        config = Config.model_validate(
            {
                "run": {"device": "cpu", "max_steps": 100},
                "model": {
                    "name": self.dit,
                    "llm": {"name": self.llm, "train": self.llm_trains},
                    "encoder": {"name": "siglip-demo", "path": self.encoder},
                },
                "optim": {
                    "groups": {"llm": {"lr": 1e-4}, "dit": {"lr": 1e-4}},
                    "ema_decay": 0.99 if self.ema else None,
                },
                "engine": self.engine,
                "parallel": self.parallel,
            }
        )
        parallel = config.parallel
        samples = self.images * self.micro_steps * parallel.dp_replicate * parallel.dp_shard
        data = {"global_batch_size": samples, "micro_batch_size": self.images, "max_seq_len": LENGTH}
        return config.model_copy(update={"data": config.data.model_copy(update=data)})


def batch_of(size: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(500, (size, LENGTH), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -LABELLED:] = ids[:, -LABELLED:]
    return Batch(
        input_ids=ids,
        labels=labels,
        attention_mask=torch.ones_like(ids),
        answer_start=torch.full((size,), 2),
        user_start=torch.full((size,), -1),
        pixels=torch.rand(size, 3, PIXELS, PIXELS, generator=generator),
        has_image=torch.ones(size, dtype=torch.bool),
        sample_index=torch.arange(step * size, (step + 1) * size),
        sample_ids=[str(number) for number in range(size)],
        captions=[""] * size,
    )


def batches(case: Case) -> Iterator[list[Batch]]:
    step = 0
    while True:
        yield [batch_of(case.images, step + number) for number in range(case.micro_steps)]
        step += case.micro_steps


def build(case: Case, mesh: Mesh) -> Run:
    config = case.config()
    torch.manual_seed(0)
    model = build_scale_rae(config.model, CHANNELS, SLOTS, None)
    encoder = build_encoder(config.model.encoder)
    stage = GenerationStage(model, encoder, config.flow, seed=3)
    stage.encode = share_samples(stage.encoder, mesh)
    engine = build_engine(config.engine, config.optim, model, stage.group_of, mesh)
    loader: Any = batches(case)
    return Run(config, Path(), mesh, CPU, stage, engine, loader, callbacks=[])


class Mark(NamedTuple):
    """name: of the phase that begins, "" if none does; `ENTER` and `LEAVE` stand around a collective.

    released: address of a memory that a collective had, and the number of the mark before which it was allocated.
    tensors:  addresses of what the collective that ends here was given and has returned.
    """

    name: str
    released: tuple[tuple[int, int], ...]
    tensors: frozenset[int]


class Recording(TorchDispatchMode):
    """Everything that happens to tensors' memory while it is entered, and marks between.

    The profiler sees every allocation and release, those inside of operators too, but for releases that a thread of
    gloo's makes. So what a collective has is followed until it is gone, and a mark says so. Copies that gloo makes for
    itself do not count: NCCL's buffers are no tensors. (The profiler's low-level interface can be asked for memory
    alone; with all operators, reading the result takes minutes.)
    """

    def __enter__(self) -> Recording:
        options = (ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
        config, kinds = ProfilerConfig(*options), {ProfilerActivity.CPU}
        self.marks: list[Mark] = []
        self.followed: list[tuple[int, int, StorageWeakRef]] = []
        _prepare_profiler(config, kinds)
        _enable_profiler(config, kinds, {RecordScope.USER_SCOPE})
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self.events: list[tuple[int, str, int, int]] = []  # time, name, address, bytes
        self.read(_disable_profiler().experimental_event_tree())
        self.events.sort(key=lambda event: event[0])

    def read(self, tree: list[Any]) -> None:
        for event in tree:
            fields = event.extra_fields
            address, size = (fields.ptr, fields.alloc_size) if event.name == "[memory]" else (0, 0)
            self.events.append((event.start_time_ns, event.name, address, size))
            self.read(event.children)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collective = func.namespace in ("c10d", "_c10d_functional")
        if collective:
            self.mark(ENTER)
        out = func(*args, **(kwargs or {}))
        if collective:
            leaves = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor))
            storages = [leaf.untyped_storage() for leaf in leaves]
            self.followed += [(each.data_ptr(), len(self.marks), StorageWeakRef(each)) for each in storages]
            self.mark(LEAVE, frozenset(each.data_ptr() for each in storages))
        elif any(reference.expired() for _, _, reference in self.followed):
            self.mark("")
        return out

    def mark(self, name: str, tensors: frozenset[int] = frozenset()) -> None:
        """Begin a phase, "<case> <phase>"; without a name, only say what is gone."""
        # Asked once: between two questions a thread may let go of it.
        expired = [reference.expired() for _, _, reference in self.followed]
        gone = tuple((each[0], each[1]) for each, is_gone in zip(self.followed, expired, strict=True) if is_gone)
        self.followed = [each for each, is_gone in zip(self.followed, expired, strict=True) if not is_gone]
        with torch.profiler.record_function(f"{MARK}{len(self.marks)}"):
            pass
        self.marks.append(Mark(name, gone, tensors))

    def peaks(self) -> dict[str, dict[str, int]]:
        """Case -> phase -> highest total within it, less the total at the case's mark "begin"."""
        living: dict[int, tuple[int, int]] = {}  # address -> bytes, mark before
        inside: dict[int, int] | None = None  # address -> bytes of what is allocated during a collective
        total = begin = number = 0
        peaks, phase, case = dict[str, dict[str, int]](), "", ""
        for _, event, address, change in self.events:
            if event == "[memory]" and inside is not None and change > 0:
                inside[address] = change
            elif event == "[memory]" and inside is not None and address in inside:
                del inside[address]
            elif event == "[memory]":
                total -= living.pop(address, (0, 0))[0]
                if change > 0:
                    living[address] = change, number
                    total += change
            elif event.startswith(MARK):
                number = int(event.removeprefix(MARK))
                name, released, tensors = self.marks[number]
                for gone, noted in released:
                    if gone in living and living[gone][1] < noted:
                        total -= living.pop(gone)[0]
                if name == ENTER:
                    inside = {}
                elif name == LEAVE:
                    for address, size in (inside or {}).items():
                        total -= living.pop(address, (0, 0))[0]
                        if address in tensors:
                            living[address] = size, number - 1
                            total += size
                    inside = None
                elif name:
                    case, phase = name.rsplit(" ", 1)
                    begin = total if phase == "begin" else begin
            if phase in PHASES:
                found = peaks.setdefault(case, {})
                found[phase] = max(found.get(phase, 0), total - begin)
        return peaks


def watch_phases(run: Run, mark: Callable[[str], None]) -> None:
    """Let the run mark where each phase of a step begins."""

    def marked(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mark(phase)
            return function(*args, **kwargs)

        return call

    stage, engine = cast(Any, run.stage), cast(Any, run.engine)
    stage.prepare = marked("prepare", stage.prepare)
    stage.loss = marked("forward", stage.loss)
    engine.backward = marked("backward", engine.backward)
    engine.step = marked("optimizer", engine.step)


def measure(case: Case, mesh: Mesh, recording: Recording) -> None:
    gc.collect()
    recording.mark(f"{case.name} begin")
    with ops.use(case.kernels):
        run = build(case, mesh)
        for _ in range(WARM_UP):
            global_step(run)
        gc.collect()
        watch_phases(run, lambda phase: recording.mark(f"{case.name} {phase}"))
        metrics = global_step(run)
        recording.mark(f"{case.name} end")
        assert not run.skipped, metrics
        run.engine.close()


def measure_all(cases: list[Case]) -> dict[str, dict[str, int]]:
    """On each rank of a run: the peaks of cases whose layouts all have as many ranks."""
    add_models()
    torch.set_num_threads(1)
    parallel = cases[0].config().parallel
    device = init_distributed(parallel, "cpu")
    with Recording() as recording:
        for case in cases:
            layout = case.config().parallel
            mesh = Mesh(CPU) if layout.world_size == 1 else build_mesh(layout, device)
            measure(case, mesh, recording)
    if parallel.world_size > 1:
        shutdown_distributed()
    return recording.peaks()
