"""Process groups and what is applied to a model from outside: no model file knows of it."""

from rae_scale.parallel.apply import parallelize
from rae_scale.parallel.checkpointing import apply_activation_checkpointing, blocks_of
from rae_scale.parallel.compile import compile_blocks
from rae_scale.parallel.mesh import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.share import share_samples

__all__ = [
    "Mesh",
    "apply_activation_checkpointing",
    "blocks_of",
    "build_mesh",
    "compile_blocks",
    "init_distributed",
    "parallelize",
    "share_samples",
    "shutdown_distributed",
]
