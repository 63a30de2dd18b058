"""Real training steps of a small model on gloo ranks, and the memory that they take at most.

    run_ranks(measure_all, ranks, folder, args=([case, ...],))      bytes of each case on each rank

PyTorch's profiler records every allocation and release of tensors' memory, those inside of operators too. What is
reported is the highest total within one step in the steady state, less what was there before the model was built.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

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

sys.path.insert(0, str(Path(__file__).parent))  # a rank loads this file alone

from profiled import Recording

CPU = torch.device("cpu")
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
        pixels=torch.randint(256, (size, PIXELS, PIXELS, 3), dtype=torch.uint8, generator=generator),
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


def warm_up(case: Case) -> int:
    """Steps until each is like the one before: DeepSpeed's stage 3 knows the order of its gathers from the third on."""
    return 3 if case.config().engine.name == "zero" and case.config().engine.zero_stage == 3 else 1


def measure(case: Case, mesh: Mesh, recording: Recording) -> None:
    gc.collect()
    recording.mark(f"{case.name} begin")
    with ops.use(case.kernels):
        run = build(case, mesh)
        for _ in range(warm_up(case)):
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
