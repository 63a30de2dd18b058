"""From configuration to a run that is ready for its next step, new or resumed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rae_scale import ops
from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.loader import build_loader
from rae_scale.engines import build_engine
from rae_scale.parallel import Mesh, build_mesh, init_distributed, share_samples, shutdown_distributed
from rae_scale.parallel.ranks import resolve_ranks
from rae_scale.parallel.same import check_same
from rae_scale.state import Saver, intact_checkpoint, latest_checkpoint, load_checkpoint, read_weights
from rae_scale.train.batches import ConversationBatches
from rae_scale.train.callbacks import Callback, Checkpoints, MetricsLog, ProgressLine, Samples, TensorBoard
from rae_scale.train.guard.replicas import ReplicaCheck
from rae_scale.train.guard.skipped_data import SkippedData, drop_abandoned, read_skipped_data
from rae_scale.train.latents import prepare_latents
from rae_scale.train.layout import check_layout
from rae_scale.train.loop import Run, run_loop
from rae_scale.train.parts import (
    GENERATION_STAGES,
    Parts,
    build_decode,
    build_parts,
    load_weights,
    put_away,
    without_llm_weights,
)
from rae_scale.train.provenance import save_provenance
from rae_scale.train.resume import check_identity, identity, set_progress
from rae_scale.train.sampling import prompt_batch
from rae_scale.train.shared_build import build_once_per_machine, parameters_on_meta
from rae_scale.train.stages import GenerationStage
from rae_scale.train.watch import RankLog, Watch

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Run the training that `config` describes, to its end or to a signal; go on where its folder's checkpoints end.

    Every process of the run calls this with the same configuration; a single one needs no launcher.

    Raises:
        ValueError: settings, data or a checkpoint that cannot be used. What an earlier run wrote is as it was then.
    """
    # Ended in reverse order: the watch last, since everything else can hang.
    with ExitStack() as closing:
        watch = Watch(config.fault, closing.enter_context(rank_log(config)))
        closing.callback(watch.close)
        device = init_distributed(config.parallel, config.run.device, timeout_s=config.fault.collective_timeout_s)
        closing.callback(shutdown_distributed)
        check_same(config)
        mesh = build_mesh(config.parallel, device, config.fault)
        with watch.outcome():
            watch.begin(config, mesh)
            run = build_run(config, mesh, watch)
            closing.callback(run.engine.close)
            closing.callback(lambda: run.batches.close())
            watch.ready(run.step)
            run_loop(run)
            watch.end("requeue" if run.step < config.run.max_steps else "finished", run.step, watch.stop_reason)


@contextmanager
def rank_log(config: Config) -> Iterator[RankLog]:
    """Progress from the main rank and warnings from all on stderr, unless the application has set up logging itself;
    and everything in each rank's own log."""
    ranks = resolve_ranks(os.environ, config.parallel.world_size)
    rank = f" rank {ranks.rank}" if ranks.world_size > 1 else ""
    stream = logging.StreamHandler()
    stream.setLevel(logging.INFO if ranks.rank == 0 else logging.WARNING)
    logging.basicConfig(format=f"%(asctime)s{rank} %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[stream])
    for package in ("rae_scale", "rae_kernels"):
        logging.getLogger(package).setLevel(logging.INFO)
    log = RankLog()
    logging.getLogger().addHandler(log)
    try:
        yield log
    finally:
        logging.getLogger().removeHandler(log)
        log.close()


def build_run(config: Config, mesh: Mesh, watch: Watch) -> Run:
    """Build everything, in the order in which mistakes are cheapest to find. Collective.

    Raises:
        StopAsked: on all ranks, if any was asked to stop meanwhile.
    """
    check_layout(config)
    resolved = resolve_paths(config)
    folder = Path(config.run.dir)
    own_identity = identity(resolved)
    skipped_data = read_skipped_data(folder, mesh)
    checkpoint = checkpoint_to_resume(config, folder, skipped_data, mesh)
    if checkpoint is not None:
        check_identity(checkpoint, own_identity)
    if checkpoint is not None or resolved.run.init_from is not None:
        resolved = without_llm_weights(resolved)
    watch.leave_if_asked(mesh)
    parts = build_shared_parts(resolved, mesh, resolved.run.init_from if checkpoint is None else None)
    latents = None
    if isinstance(parts.stage, GenerationStage):
        if not parts.stage.encodes:
            latents = prepare_latents(resolved, parts.stage.encoder, mesh, watch)
            put_away(parts.stage.encoder, resolved, mesh.device)
        parts.stage.encode = share_samples(parts.stage.encoder, mesh)
    saved = {"identity": own_identity, "config": config.model_dump(mode="json")}
    callbacks = build_callbacks(resolved, folder, parts, saved, mesh)
    watch.leave_if_asked(mesh)
    engine = build_engine(config.engine, config.optim, parts.stage.module, parts.stage.group_of, mesh)
    state = load_checkpoint(checkpoint, engine, mesh, verified=True) if checkpoint is not None else None
    open_batches = partial(
        build_loader,
        resolved.data,
        seed=config.run.seed,
        image_size=parts.batches.image_size,
        prepare=parts.batches.prepare,
        collate=parts.batches.collate,
        # One of the ranks that have the same samples lists the bad ones.
        quarantine_path=folder / "quarantine.jsonl" if mesh.sample_rank == 0 else os.devnull,
        dp_rank=mesh.dp_rank,
        dp_world=mesh.dp_world,
        batch_of=skipped_data.batch_of,
        pin_memory=mesh.device.type == "cuda",
        latents=latents,
    )
    if mesh.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_provenance(folder, config)
        ops.report()
    run = Run(
        config=config,
        folder=folder,
        mesh=mesh,
        device=mesh.device,
        stage=parts.stage,
        engine=engine,
        batches=open_batches(start_step=state["step"] if state else 0),
        callbacks=callbacks,
        watch=watch,
        skipped_data=skipped_data,
        open_batches=lambda step: open_batches(start_step=step),
    )
    if state is not None:
        set_progress(run, state)
        logger.info("resumed %s: %d of %d steps are done", checkpoint, run.step, config.run.max_steps)
    return run


def build_shared_parts(resolved: Config, mesh: Mesh, init_from: str | None) -> Parts:
    """The models with the weights that the run begins with; a large one exists once per machine. Collective."""

    def build() -> Parts:
        parts = build_parts(resolved, mesh.device)
        if init_from is not None:
            init_weights(parts.stage.module, init_from)
        return parts

    if resolved.stage not in GENERATION_STAGES or mesh.world_size == 1:
        return build()
    bare = without_llm_weights(resolved)
    return build_once_per_machine(
        build,
        lambda: build_parts(bare, mesh.device, parameters_on_meta),
        lambda parts: parts.stage.module,
        mesh,
    )


def checkpoint_to_resume(config: Config, folder: Path, skipped_data: SkippedData, mesh: Mesh) -> Path | None:
    """The newest intact checkpoint in the run's folder, None if it is new. Collective.

    A rollback that was interrupted is completed: what it gave up is no longer there.
    """
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None and config.run.resume == "never":
        raise ValueError(
            f"run.resume=never, but run.dir={config.run.dir!r} holds {checkpoint.name}, which a new run would replace; "
            "choose another run.dir, or run.resume=auto to continue it"
        )
    drop_abandoned(folder, skipped_data, mesh)
    return intact_checkpoint(folder, mesh)


def init_weights(module: nn.Module, origin: str) -> None:
    """Begin from exported weights, a checkpoint, or a run's newest one: from their moving average if they have it."""
    source = latest_checkpoint(origin) or Path(origin)
    load_weights(module, read_weights(source), f"run.init_from={origin!r}")
    logger.info("begin from the weights of %s", source)


def build_callbacks(config: Config, folder: Path, parts: Parts, saved: dict[str, Any], mesh: Mesh) -> list[Callback]:
    """In the order in which they run: a step is logged, then saved, then looked at."""
    run = config.run
    callbacks: list[Callback] = [MetricsLog(), ProgressLine(run.log_every)]
    if run.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard", run.log_every))
    if config.fault.replica_check_every:
        # Before the checkpoints: none is made of replicas that have drifted.
        callbacks.append(ReplicaCheck(config.fault.replica_check_every))
    callbacks.append(Checkpoints(saved, Saver(mesh, run.save_buffer_gb)))
    samples = build_samples(config, folder, parts, mesh.device)
    if samples is not None:
        callbacks.append(samples)
    return [callback for callback in callbacks if mesh.is_main or not callback.main_only]


def build_samples(config: Config, folder: Path, parts: Parts, device: torch.device) -> Samples | None:
    """Sample pictures, if they are asked for, the stage generates, and there is a decoder to see them with."""
    run, stage, batches = config.run, parts.stage, parts.batches
    if not run.sample_every or not run.sample_prompts:
        return None
    if not isinstance(stage, GenerationStage) or not isinstance(batches, ConversationBatches):
        logger.warning("run.sample_every=%d is ignored: stage=%s generates no pictures", run.sample_every, config.stage)
        return None
    decode = build_decode(config, stage.encoder, device)
    if decode is None:
        logger.warning("no sample pictures: model.decoder.path is not set, so latents cannot be decoded")
        return None
    prompts = prompt_batch(batches.chat, run.sample_prompts, config.data.prompt_template, batches.image_size)
    return Samples(folder / "samples", prompts, stage, decode, config.sampler, run.sample_every)
