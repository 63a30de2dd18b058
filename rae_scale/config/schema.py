"""The typed configuration tree. Unknown keys are errors; each part of the system receives only its own section.

Defaults are the paper's pre-training recipe (Scale-RAE, Table 8) wherever the paper gives a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(Section):
    """What this run is, how long it lasts and where it writes."""

    dir: str = "runs/default"
    seed: NonNegative = 0
    max_steps: Positive = 30_000
    save_every: NonNegative = Field(1000, description="steps between checkpoints; 0 saves only at the end")
    keep_last: Positive = Field(2, description="how many of the newest checkpoints stay on disk")
    keep_every: NonNegative = Field(0, description="checkpoints at multiples of this step stay for ever; 0 keeps none")
    save_buffer_gb: float = Field(
        16.0,
        ge=0,
        allow_inf_nan=False,
        description="host memory per rank (10^9 bytes) for copies of a checkpoint: training goes on while they are "
        "written; 0 writes it before the next step",
    )
    log_every: Positive = 1
    sample_every: NonNegative = Field(0, description="steps between grids of `sample_prompts`; 0 is never")
    sample_prompts: tuple[str, ...] = ()
    resume: Literal["auto", "never"] = Field("auto", description="auto: continue from the newest checkpoint in `dir`")
    init_from: str | None = Field(None, description="checkpoint or exported weights to start from (weights only)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = True


class LLMConfig(Section):
    """The conditioner: a Qwen2 language model with learned queries (paper section 3.1)."""

    name: str = Field("qwen2.5-1.5b", description="a named LLM (`rae-scale model list`)")
    path: str | None = Field(None, description="folder or hub id of weights; null starts from random weights")
    tokenizer: str | None = Field(None, description="folder or hub id; null takes it from `path`")
    train: bool = True
    mask: Literal["causal", "query-block"] = "causal"
    connector: Literal["linear", "mlp"] = "linear"


class EncoderConfig(Section):
    """The frozen encoder whose latents are generated."""

    name: str = Field("siglip2-so400m", description="siglip2-so400m | webssl-l | flux-vae | siglip-demo")
    path: str | None = Field(None, description="folder or hub id of weights; null starts from random weights")


class DecoderConfig(Section):
    name: str = Field("vit-xl", description="vit-b | vit-l | vit-xl | vit-tiny")
    path: str | None = Field(None, description="folder of weights; null leaves latents undecoded")


class ModelConfig(Section):
    name: str = Field("dit-2.4b", description="a named DiT (`rae-scale model list`)")
    qk_norm: bool = False
    class_dropout_prob: Fraction = Field(0.1, description="chance that a sample's condition becomes the null vector")
    ddt_num_heads: Positive | None = Field(
        None,
        description="heads of the wide DDT head; null is 21, and 16 or 42 divide by 2 for parallel.tp or sp (the "
        "published width 2688 has no published number)",
    )
    llm: LLMConfig = LLMConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()


class FlowConfig(Section):
    """Flow matching (paper sections 3.1 and 3.2)."""

    time: Literal["logit_normal", "uniform"] = "logit_normal"
    base_dim: Positive = Field(4096, description="n of the shift alpha = sqrt(m / n)")
    shift: float | None = Field(None, gt=0, description="alpha itself; null derives it from the latent's dimension")
    flow_weight: float = Field(2.0, ge=0, description="flow loss weight beside the text loss")
    text_weight: float = Field(1.0, ge=0)


class SamplerConfig(Section):
    method: Literal["euler", "heun"] = "euler"
    steps: Positive = 50
    grid: Literal["clean", "compat"] = Field("clean", description="compat: the official release's grid and extra step")
    guidance: float = Field(1.0, ge=0)
    guidance_interval: tuple[Fraction, Fraction] = Field((0.0, 1.0), description="times t in which guidance acts")


class LossConfig(Section):
    """Weights of the `decoder` and `encoder` stages (paper section 2; the demo's encoder)."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0, description="squared error beside l1: learns sparse drawings sooner")
    contrastive: float = Field(1.0, ge=0, description="encoder stage: sigmoid loss between image and caption")
    dense: float = Field(1.0, ge=0, description="encoder stage: per-token pixel regression, keeps tokens local")


Crop = Literal["square", "center", "random"]


class SourceConfig(Section):
    path: str = Field(description="folder of MDS shards (holds index.json)")
    weight: float = Field(1.0, gt=0)


class LatentCacheConfig(Section):
    """Encoder latents on disk in place of images that are encoded in every step."""

    dir: str = Field(description="folder that every rank sees; the first run fills it, others of the same data use it")
    dtype: Literal["bf16", "int8"] = Field("bf16", description="int8: half of it, one scale per token")
    batch_size: Positive = Field(32, description="images that a rank encodes at once while the cache is made")


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = ()
    global_batch_size: Positive = 2048
    micro_batch_size: Positive | None = Field(None, description="samples per rank and forward; null is one micro-step")
    max_seq_len: Positive = 512
    prompt_template: str = Field("Generate an image of {caption}", description="human turn of a captioned image")
    label_markup: bool = Field(False, description="text loss also on ChatML markup of all turns, as the release does")
    num_workers: NonNegative = 2
    lanes: Positive = Field(
        1,
        description="independent streams that each step is cut into; a node reads the shards of its lanes only. 1 for "
        "one node, else the number of nodes or a small multiple; changes the data order",
    )
    shuffle_block: Positive = Field(
        65_536, description="samples that are shuffled at a time, after the shards; changes the data order"
    )
    prefetch_blocks: NonNegative = Field(
        1, description="shuffle blocks per lane and source that are fetched ahead, where shards come through the cache"
    )
    max_bad_fraction: Fraction = Field(0.01, description="stop when more samples than this could not be read")
    max_pixels: Positive = Field(89_478_485, description="images with more pixels are refused before decoding")
    bad_shards: Literal["quarantine", "stop"] = Field(
        "quarantine",
        description="what a shard that is missing or fails its hash does: its samples count as bad, or stop",
    )
    cache_dir: str | None = Field(
        None, description="folder for shards of remote sources, on a local disk; null is one in the temporary folder"
    )
    cache_gb: float = Field(100.0, gt=0, description="limit of cache_dir, 1e9 bytes, for all processes of a machine")
    fetch_timeout_s: float = Field(
        60.0, gt=0, description="an attempt to fetch ends after so long without a byte, or so far behind 256 KiB/s"
    )
    fetch_attempts: Positive = Field(6, description="attempts before a remote source counts as unreachable")
    crop: Crop = Field("square", description="square squashes all of a picture; others cut its largest square out")
    flip: bool = Field(False, description="mirror half of the pictures; only for stages that read no captions")
    scaled_decode: bool = Field(
        False,
        description="decode large JPEGs at 1/2 to 1/8 of their size, never below the target: half the time, and pixels "
        "that differ by about as much as JPEG quality 90 costs",
    )
    latent_cache: LatentCacheConfig | None = Field(
        None, description="encode every image once and train on what is kept (small sets, generation stages)"
    )
    caption_choice: Literal["first", "weighted"] = Field(
        "first", description="of a sample with several captions; weighted draws by their weights, or equally"
    )


class GroupConfig(Section):
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class OptimConfig(Section):
    groups: dict[str, GroupConfig] = {
        "llm": GroupConfig(lr=5e-5, betas=(0.9, 0.999)),
        "dit": GroupConfig(lr=5e-4, betas=(0.9, 0.95)),
    }
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.0134
    min_lr_ratio: Fraction = 0.0
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, ge=0, lt=1)
    moments: Literal["fp32", "bf16"] = Field(
        "fp32", description="how AdamW's moments are kept; bf16 halves them and rounds at random (eager, fsdp2)"
    )


class EngineConfig(Section):
    name: Literal["eager", "zero", "fsdp2"] = "eager"
    zero_stage: Literal[1, 2, 3] = 3
    zero_hpz: Positive = Field(
        1, description="zero stage 3: a second copy of the parameters within this many neighbouring ranks (a node)"
    )
    offload_optimizer: bool = Field(
        False, description="master weights, moments and EMA in host memory, updated there (fsdp2, zero stage 3)"
    )
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="what is kept of a block for backward: all, its input, or its input and `saved_ops`"
    )
    saved_ops: dict[Literal["linear", "attention", "communication"], Annotated[int, Field(ge=-1)]] = Field(
        {}, description="selective: outputs kept per block, the first ones of each class; -1 keeps all, no entry none"
    )
    compile: Literal["none", "blocks", "blocks-cudagraphs"] = Field(
        "none",
        description="torch.compile of each block (DiT, decoder) in place of our kernels; blocks-cudagraphs replays its "
        "launches too, for small models on one GPU",
    )
    fp8: bool = Field(
        False, description="8-bit matrix products in the DiT's blocks (torchao, sm_90 or newer); weights stay float32"
    )

    @model_validator(mode="before")
    @classmethod
    def default_saved_ops(cls, given: Any) -> Any:
        """For selective only, so that a saved configuration lists what its run kept and nothing that it ignored."""
        if isinstance(given, dict) and given.get("activation_checkpointing") == "selective":
            # Of a DiT block's products, those up to the one after attention: what is between them is cheap.
            return {"saved_ops": {"linear": 3, "attention": -1, "communication": -1}, **given}
        return given


class ParallelConfig(Section):
    """Mesh sizes, slowest to fastest axis. Their product is the number of processes."""

    dp_replicate: Positive = 1
    dp_shard: Positive = 1
    sp: Positive = 1
    tp: Positive = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.sp * self.tp


class FaultConfig(Section):
    """When a run is stuck or goes wrong: how long each phase may make no progress, and what is done about bad steps."""

    start_timeout_s: float = Field(
        1800,
        gt=0,
        allow_inf_nan=False,
        description="a rank without progress for so long before its first step is stuck",
    )
    train_timeout_s: float = Field(
        600, gt=0, allow_inf_nan=False, description="the same within a step, after the first"
    )
    save_timeout_s: float = Field(1800, gt=0, allow_inf_nan=False, description="the same while saving")
    eval_timeout_s: float = Field(1800, gt=0, allow_inf_nan=False, description="the same while drawing sample pictures")
    heartbeat_s: float = Field(
        10, gt=0, allow_inf_nan=False, description="how often each rank writes where it is into `heartbeats/`"
    )
    stop_grace_s: float = Field(
        30, ge=0, allow_inf_nan=False, description="after a signal, a rank whose data does not come waits no longer"
    )
    spike_factor: float = Field(
        0, ge=0, allow_inf_nan=False, description="skip a step whose loss is above this many medians; 0 never does"
    )
    grad_spike_factor: float = Field(0, ge=0, allow_inf_nan=False, description="the same for the norm of the gradients")
    spike_window: Positive = Field(64, description="kept steps whose losses and norms make the median")
    max_skips_in_row: NonNegative = Field(
        5, description="after so many, roll back to the newest checkpoint and leave that data out; 0 never does"
    )
    max_rollbacks: NonNegative = Field(3, description="rollbacks after which the run fails")
    replica_check_every: NonNegative = Field(
        100, description="steps between comparisons of what replicas must hold alike; 0 is never"
    )
    on_save_failure: Literal["stop", "continue"] = Field(
        "continue", description="when a checkpoint cannot be written; the last one of a run must always succeed"
    )

    @property
    def collective_timeout_s(self) -> float:
        """Of the groups that train: they must outlast every phase of another rank, and its watchdog's verdict."""
        return 60 + max(self.start_timeout_s, self.train_timeout_s, self.save_timeout_s, self.eval_timeout_s)

    @property
    def save_collective_timeout_s(self) -> float:
        """Of the group that the thread which writes checkpoints has for itself."""
        return 60 + self.save_timeout_s


class Config(Section):
    stage: Literal["encoder", "decoder", "pretrain", "finetune"] = "pretrain"
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    sampler: SamplerConfig = SamplerConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    fault: FaultConfig = FaultConfig()
