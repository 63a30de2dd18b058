"""Making the latent cache of a run before it, with whatever processes there are."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.config.schema import ParallelConfig
from rae_scale.data.latents import LatentCache
from rae_scale.models.encoders import build_encoder
from rae_scale.parallel import build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.ranks import resolve_ranks
from rae_scale.parallel.same import check_same
from rae_scale.train.latents.build import prepare_latents
from rae_scale.train.setup import rank_log
from rae_scale.train.watch import Watch


def make_latents(config: Config) -> LatentCache:
    """What the first step of `rae-scale train` would wait for, and no more: no other model is built.

    The number of processes is the launcher's, whatever `parallel` says: they have the images to share, nothing else.

    Raises:
        ValueError: as `prepare_latents`; or the configuration has no cache.
    """
    if config.data.latent_cache is None:
        raise ValueError(
            "data.latent_cache is not set, so there are no latents to make; name a folder with "
            "data.latent_cache.dir=FOLDER"
        )
    launched = resolve_ranks(os.environ, config.parallel.world_size).world_size
    config = config.model_copy(update={"parallel": ParallelConfig(dp_shard=launched)})
    with ExitStack() as closing:
        closing.enter_context(rank_log(config))
        timeout = config.fault.collective_timeout_s
        device = init_distributed(config.parallel, config.run.device, timeout_s=timeout)
        closing.callback(shutdown_distributed)
        check_same(config)
        mesh = build_mesh(config.parallel, device, config.fault)
        resolved = resolve_paths(config)
        torch.manual_seed(config.run.seed)  # as `build_parts`: the encoder may have random weights
        return prepare_latents(resolved, build_encoder(resolved.model.encoder), mesh, Watch(config.fault))
