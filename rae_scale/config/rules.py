"""Rules that hold between settings. Each problem is one line: setting, value, why it cannot be, and the fix."""

from __future__ import annotations

from rae_scale.config.schema import Config

GROUPS_OF_STAGE = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "pretrain": ("llm", "dit"),
    "finetune": ("llm", "dit"),
}


def check(config: Config) -> list[str]:
    """Return every problem found; an empty list is a valid configuration."""
    return [
        *check_batch(config),
        *check_images(config),
        *check_latent_cache(config),
        *check_groups(config),
        *check_engine(config),
        *check_memory_options(config),
        *check_checkpointing(config),
        *check_compile(config),
        *check_fp8(config),
        *check_steps(config),
    ]


def check_batch(config: Config) -> list[str]:
    data, parallel = config.data, config.parallel
    ranks = parallel.dp_replicate * parallel.dp_shard
    if data.global_batch_size % ranks:
        return [
            f"data.global_batch_size={data.global_batch_size} does not divide by parallel.dp_replicate x dp_shard = "
            f"{ranks} data-parallel ranks; choose a multiple of {ranks}"
        ]
    if data.global_batch_size % data.lanes:
        return [
            f"data.lanes={data.lanes} does not divide data.global_batch_size={data.global_batch_size}; choose a "
            "divisor of it: the number of nodes, or a small multiple"
        ]
    local = data.global_batch_size // ranks
    if data.micro_batch_size and local % data.micro_batch_size:
        return [
            f"data.micro_batch_size={data.micro_batch_size} does not divide the {local} samples of each rank "
            f"(data.global_batch_size={data.global_batch_size} over {ranks} ranks); choose a divisor of {local}"
        ]
    return []


def check_images(config: Config) -> list[str]:
    data, stage = config.data, config.stage
    problems = []
    if data.flip and stage != "decoder":
        problems.append(
            f"data.flip=true with stage={stage}: captions say left and right, and letters would be mirrored; set "
            "data.flip=false (stage=decoder, which reads no text, may flip)"
        )
    if data.caption_choice != "first" and stage == "decoder":
        problems.append(
            f"data.caption_choice={data.caption_choice} with stage=decoder would be ignored: it reads no captions; "
            "remove it"
        )
    return problems


def check_latent_cache(config: Config) -> list[str]:
    data, stage = config.data, config.stage
    if data.latent_cache is None:
        return []
    problems = []
    if stage in ("encoder", "decoder"):
        problems.append(
            f"data.latent_cache with stage={stage}, which learns from pixels; remove data.latent_cache (it serves "
            "pretrain and finetune)"
        )
    if data.crop == "random":
        problems.append(
            "data.latent_cache with data.crop=random: an image is encoded once, so its crop would never change; use "
            "data.crop=center or square, or remove data.latent_cache"
        )
    return problems


def check_groups(config: Config) -> list[str]:
    wanted, given = GROUPS_OF_STAGE[config.stage], config.optim.groups
    problems = [
        f"optim.groups.{name} is missing: stage={config.stage} trains {', '.join(wanted)}; give it at least an lr"
        for name in wanted
        if name not in given
    ]
    problems += [
        f"optim.groups.{name} is not trained by stage={config.stage}, which trains {', '.join(wanted)}; remove it"
        for name in given
        if name not in wanted
    ]
    return problems


def check_engine(config: Config) -> list[str]:
    problems = []
    parallel = config.parallel
    if config.engine.name == "eager" and parallel.world_size > 1:
        problems.append(
            f"engine.name=eager runs one process, but parallel asks for {parallel.world_size}; "
            "use engine.name=zero or fsdp2, or set every parallel size to 1"
        )
    if config.stage in ("encoder", "decoder"):
        problems += [
            f"parallel.{axis}={size} with stage={config.stage}: its model is small and runs data parallel only; set "
            f"parallel.{axis}=1 and raise parallel.dp_shard"
            for axis, size in (("sp", parallel.sp), ("tp", parallel.tp))
            if size > 1
        ]
    if config.engine.name == "zero" and parallel.dp_replicate > 1:
        problems.append(
            f"parallel.dp_replicate={parallel.dp_replicate} with engine.name=zero: DeepSpeed shards over all "
            "data-parallel ranks; set parallel.dp_replicate=1 and raise parallel.dp_shard, or use fsdp2"
        )
    return problems


def check_memory_options(config: Config) -> list[str]:
    engine, parallel = config.engine, config.parallel
    stage3 = engine.name == "zero" and engine.zero_stage == 3
    named = f"engine.name={engine.name}" + (f" engine.zero_stage={engine.zero_stage}" if engine.name == "zero" else "")
    problems = []
    if engine.zero_hpz > 1 and not stage3:
        problems.append(
            f"engine.zero_hpz={engine.zero_hpz} with {named} would be ignored: only ZeRO-3 keeps a second copy of the "
            "parameters; use engine.name=zero engine.zero_stage=3 (with fsdp2, parallel.dp_replicate serves the same "
            "end), or set engine.zero_hpz=1"
        )
    elif (parallel.dp_shard * parallel.sp) % engine.zero_hpz:
        problems.append(
            f"engine.zero_hpz={engine.zero_hpz} does not divide the parallel.dp_shard x sp = "
            f"{parallel.dp_shard * parallel.sp} ranks that parameters are sharded over; choose a divisor, as a rule "
            "the data-parallel ranks of one node"
        )
    if engine.offload_optimizer and engine.name == "zero" and not stage3:
        problems.append(
            f"engine.offload_optimizer=true with {named}: DeepSpeed's stages 1 and 2 keep whole float32 weights on the "
            "device, so little would be gained; use engine.zero_stage=3 or engine.name=fsdp2"
        )
    if config.optim.moments == "bf16" and engine.name == "zero":
        problems.append(
            f"optim.moments=bf16 with {named}: DeepSpeed updates the moments with PyTorch's AdamW, which would lose "
            "small changes of bfloat16 ones; use engine.name=fsdp2 or eager, or set optim.moments=fp32"
        )
    elif config.optim.moments == "bf16" and engine.offload_optimizer:
        problems.append(
            "optim.moments=bf16 with engine.offload_optimizer=true: a CPU takes many times as long to round them as to "
            "update float32 ones; set engine.offload_optimizer=false, or optim.moments=fp32"
        )
    return problems


def check_checkpointing(config: Config) -> list[str]:
    mode, saved_ops = config.engine.activation_checkpointing, config.engine.saved_ops
    if mode == "selective" and not any(saved_ops.values()):
        return [
            f"engine.saved_ops={saved_ops} with engine.activation_checkpointing=selective keeps nothing; give a class "
            "of operators an output to keep, or use engine.activation_checkpointing=full"
        ]
    if mode != "selective" and saved_ops:
        return [
            f"engine.saved_ops={saved_ops} with engine.activation_checkpointing={mode} would be ignored; use "
            "engine.activation_checkpointing=selective, or remove engine.saved_ops"
        ]
    return []


def check_compile(config: Config) -> list[str]:
    engine, mode = config.engine, config.engine.compile
    problems = []
    if mode == "none":
        return []
    if engine.name == "zero" and engine.zero_stage == 3:
        problems.append(
            f"engine.compile={mode} with engine.name=zero engine.zero_stage=3: DeepSpeed gathers parameters by hooks "
            "inside a block, which torch.compile refuses; use engine.name=fsdp2, engine.zero_stage=2 or "
            "engine.compile=none"
        )
    if engine.activation_checkpointing == "selective":
        problems.append(
            f"engine.compile={mode} with engine.activation_checkpointing=selective: what watches single operators "
            "cannot look into a compiled block; use engine.activation_checkpointing=none (the compiler chooses itself "
            "what a block keeps) or full"
        )
    if mode == "blocks-cudagraphs":
        if engine.name != "eager":
            problems.append(
                f"engine.compile={mode} with engine.name={engine.name}: a recorded launch reads parameters where they "
                "were; use engine.name=eager, or engine.compile=blocks"
            )
        if engine.activation_checkpointing == "full":
            problems.append(
                f"engine.compile={mode} with engine.activation_checkpointing=full: replaying a forward pass inside of "
                "backward is untested, and the small models that gain by CUDA graphs fit without; use "
                "engine.activation_checkpointing=none, or engine.compile=blocks"
            )
        if config.run.device == "cpu":
            problems.append(
                f"engine.compile={mode} with run.device=cpu: CUDA graphs need a GPU; use engine.compile=blocks"
            )
    return problems


def check_fp8(config: Config) -> list[str]:
    engine, parallel = config.engine, config.parallel
    if not engine.fp8:
        return []
    problems = []
    if "dit" not in GROUPS_OF_STAGE[config.stage]:
        problems.append(f"engine.fp8=true with stage={config.stage}, which has no DiT; set engine.fp8=false")
    if engine.precision != "bf16":
        problems.append(
            f"engine.fp8=true with engine.precision={engine.precision}: 8-bit products give bfloat16; use "
            "engine.precision=bf16, or engine.fp8=false"
        )
    if engine.name == "zero":
        problems.append(
            "engine.fp8=true with engine.name=zero: tested with eager and fsdp2 only; use engine.name=fsdp2, or "
            "engine.fp8=false"
        )
    if parallel.tp > 1:
        problems.append(
            f"engine.fp8=true with parallel.tp={parallel.tp}: layers that are split over ranks multiply in bfloat16; "
            "set parallel.tp=1 and raise parallel.dp_shard, or engine.fp8=false"
        )
    return problems


def check_steps(config: Config) -> list[str]:
    low, high = config.sampler.guidance_interval
    problems = []
    if low >= high:
        problems.append(f"sampler.guidance_interval=[{low}, {high}] is empty; the first time must be the smaller one")
    if config.sampler.grid == "compat":
        if config.sampler.method != "euler":
            problems.append(
                f"sampler.method={config.sampler.method} with sampler.grid=compat: the official release has Euler "
                "steps only; use sampler.method=euler, or sampler.grid=clean"
            )
        if not 3 <= config.sampler.steps <= 1000:
            problems.append(
                f"sampler.steps={config.sampler.steps} with sampler.grid=compat: steps are picked from the official "
                "release's 1000 times; choose 3 to 1000"
            )
    if "{caption}" not in config.data.prompt_template:
        problems.append(f"data.prompt_template={config.data.prompt_template!r} has no {{caption}} in it; add one")
    return problems
