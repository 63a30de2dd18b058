"""What a training imports, so that processes forked after this import start in a second and not in seven.

Nothing here may start a thread: a forked child would not have it.
"""

import importlib

for name in (
    "deepspeed",
    "rae_scale.cli.main",
    "rae_scale.engines.fsdp2",
    "rae_scale.engines.zero",
    "rae_scale.train.setup",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "traced",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
):
    importlib.import_module(name)
