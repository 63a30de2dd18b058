"""The config.json of an official Scale-RAE checkpoint, from our settings and back.

It describes the model and says nothing of how to train or sample it. What has no place in the other format is listed
as a remark, for the user to read; what would be another model there is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from rae_scale.config import Config
from rae_scale.config.schema import FlowConfig, SamplerConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.models.llm_zoo import LLM_ZOO, LLMSpec
from rae_scale.models.zoo import DIT_ZOO, dit_config

MODEL_TYPE = "cambrian_qwen"
MASKS = {"causal": "query", "query-block": "query-block"}
RELEASED_TOKENS = 256  # what the release's code takes where its config does not say
MAX_POSITIONS = 32_768  # of every published Qwen2.5 of these sizes
PUBLISHED_TOWERS = {
    "siglip2-so400m": "google/siglip2-so400m-patch14-224",
    "webssl-l": "facebook/webssl-dino300m-full2b-224",
}
DEMO_TOWER = "siglip-demo"
RELEASED_DECODER = "vit-xl"

# What the release's classes build whatever our settings are.
CONSTANTS: dict[str, Any] = {
    "architectures": ["ScaleRAEQwenForCausalLM"],
    "model_type": MODEL_TYPE,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_sliding_window": False,
    "use_mm_proj": True,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": True,
    "mm_use_im_patch_token": False,
    "mm_vision_select_layer": -1,
    "connector_only": True,
    "unfreeze_mm_vision_tower": False,
    "image_aspect_ratio": "square",
    "generation_alignment_tower": None,
    "dit_cls": "DiT",
    "ddt_encoder_depth": 2,  # without effect for both kinds of model here; the release's scripts set it
}


class Described(NamedTuple):
    """A model in the other format's words, and what to tell the user: what the format could not say."""

    settings: dict[str, Any]
    remarks: list[str]


def to_official_config(config: Config, vocab_size: int) -> Described:
    """The config.json for a generation model with `vocab_size` embedding rows.

    Raises:
        ValueError: the release's classes would build another model, into which these weights do not fit.
    """
    check_representable(config)
    model, flow = config.model, config.flow
    dit, llm = dit_config(model), LLM_ZOO[model.llm.name]
    settings = CONSTANTS | llm_settings(llm, vocab_size) | dit_settings(dit)
    settings |= {
        "mm_vision_tower_aux_list": [tower_of(config)],
        "vision_loss_mode": MASKS[model.llm.mask],
        "vision_coef": flow.flow_weight,
        "diffusion_base_dim": flow.base_dim,
        "tokenizer_model_max_length": config.data.max_seq_len,
    }
    return Described(settings, unsaid(config))


def check_representable(config: Config) -> None:
    model = config.model
    if config.stage not in ("pretrain", "finetune"):
        raise ValueError(
            f"stage={config.stage} trains no text-to-image model, which is what the official format holds; a decoder "
            "goes into --to official-decoder"
        )
    if model.llm.connector != "linear":
        raise ValueError(
            f"model.llm.connector={model.llm.connector!r}: the official class has one Linear there "
            "(diff_head_projector) and no place for a second; use --to hf"
        )
    if model.qk_norm:
        raise ValueError(
            "model.qk_norm=true: the official class builds its DiT without q and k norms and has no setting for them, "
            "so it would drop these weights; use --to hf"
        )
    if model.encoder.name == "flux-vae":
        raise ValueError(
            "model.encoder.name='flux-vae': the official VAE model reads user images through a second encoder "
            "(SigLIP-2, 1152 channels), this one through the VAE (64), so mm_projector has another shape; use --to hf"
        )


def llm_settings(llm: LLMSpec, vocab_size: int) -> dict[str, Any]:
    return asdict(llm) | {"vocab_size": vocab_size, "max_position_embeddings": MAX_POSITIONS}


def dit_settings(dit: DiTConfig) -> dict[str, Any]:
    """Sizes of the DiT; with the wide head, pairs (backbone, head), which is how the release tells the two apart."""
    sizes: dict[str, Any] = {"hidden_size": dit.hidden_size, "depth": dit.depth, "heads": dit.num_heads}
    if dit.ddt is not None:
        head = {"hidden_size": dit.ddt.hidden_size, "depth": dit.ddt.depth, "heads": dit.ddt.num_heads}
        sizes = {name: [size, head[name]] for name, size in sizes.items()}
    return {f"diffusion_model_{name}": size for name, size in sizes.items()} | {
        "vision_loss": "diffusion-loss" if dit.ddt is None else "ddt-loss",
        "diffusion_model_z_channels": dit.z_channels,
        "diffusion_model_channels": dit.in_channels,
        "diffusion_class_dropout_prob": dit.class_dropout_prob,
        "diffusion_split_per_token": dit.num_tokens,
        "vision_tower_aux_token_len_list": [dit.num_tokens],
        "mm_vision_tower_aux_token_len_list": [dit.num_tokens],
        "mm_hidden_size": dit.in_channels,
        "vision_hidden_size": dit.in_channels,
    }


def tower_of(config: Config) -> str:
    """The encoder as `mm_vision_tower_aux_list` names it: by hub id."""
    encoder = config.model.encoder
    if encoder.name in PUBLISHED_TOWERS:
        return PUBLISHED_TOWERS[encoder.name]
    return f"{DEMO_TOWER}:{encoder.path}" if encoder.path else DEMO_TOWER


def unsaid(config: Config) -> list[str]:
    """What of `config` the official format cannot say and the model's pictures depend on."""
    remarks = []
    if config.model.encoder.name == DEMO_TOWER:
        remarks.append(
            "model.encoder.name='siglip-demo': the official code knows no such encoder, so it can load these weights "
            "but not read images with them"
        )
    published = PUBLISHED_TOWERS.get(config.model.encoder.name)
    if config.model.encoder.path not in (None, published) and published is not None:
        remarks.append(
            f"model.encoder.path={config.model.encoder.path!r}: the official config names {published} in its place, "
            "which is to be the same encoder"
        )
    if config.flow.shift is not None:
        remarks.append(
            f"flow.shift={config.flow.shift}: the official format derives the shift from diffusion_base_dim; sample "
            "with this shift by hand"
        )
    for name, ours, default in (
        ("flow.time", config.flow.time, FlowConfig().time),
        ("flow.text_weight", config.flow.text_weight, FlowConfig().text_weight),
        ("model.llm.train", config.model.llm.train, True),
    ):
        if ours != default:
            remarks.append(f"{name}={ours}: used in training, the official config has no place for it")
    changed = {
        name: value for name, value in config.sampler.model_dump().items() if value != getattr(SamplerConfig(), name)
    }
    if changed:
        listed = ", ".join(f"{name}={value}" for name, value in changed.items())
        remarks.append(f"sampler: {listed}: give them again where pictures are drawn")
    remarks.append(
        f"data.prompt_template={config.data.prompt_template!r}: the official code adds no words to a prompt; write "
        "prompts in this form"
    )
    remarks.append("run, data, optim, engine and parallel describe the training and stay behind")
    return remarks


def from_official_config(official: Mapping[str, Any], tokenizer: str) -> Described:
    """Our settings, as a tree for `parse_config`, for the model that an official config.json describes.

    tokenizer: where the checkpoint's tokenizer lies.

    Raises:
        ValueError: it is none of the kinds of model that this package has, or of none of the named sizes.
    """
    for key, known in (
        ("model_type", (MODEL_TYPE,)),
        ("vision_loss", ("diffusion-loss", "ddt-loss")),
        ("vision_loss_mode", tuple(MASKS.values())),
        ("dit_cls", ("DiT", None)),
        ("generation_alignment_tower", (None, "")),
        ("diffusion_norm_stats_path", (None, "")),
        ("aux_regression", (None, False)),
    ):
        if official.get(key) not in known:
            raise ValueError(
                f"config.json: {key}={official.get(key)!r} is a kind of model that this package has not; it reads "
                f"{' or '.join(map(repr, known))}"
            )
    if (official["vision_loss"] == "ddt-loss") != isinstance(official.get("diffusion_model_hidden_size"), list):
        raise ValueError(
            f"config.json: vision_loss={official['vision_loss']!r} with diffusion_model_hidden_size="
            f"{official.get('diffusion_model_hidden_size')}: the wide head is 'ddt-loss' with pairs (backbone, head), "
            "the plain DiT 'diffusion-loss' with single sizes; the release's third kind, one DiT split in two, is none "
            "of this package's models"
        )
    dit_name, ddt_heads = named_dit(official)
    encoder, remarks = named_tower(official)
    mask = {theirs: ours for ours, theirs in MASKS.items()}[official["vision_loss_mode"]]
    flow = FlowConfig()
    tree = {
        "stage": "pretrain",
        "model": {
            "name": dit_name,
            "ddt_num_heads": ddt_heads,
            "class_dropout_prob": official.get("diffusion_class_dropout_prob", 0.0),
            "llm": {"name": named_llm(official), "tokenizer": tokenizer, "mask": mask},
            "encoder": encoder,
            "decoder": {"name": RELEASED_DECODER if encoder["name"] in PUBLISHED_TOWERS else "vit-tiny"},
        },
        "flow": {
            "base_dim": official.get("diffusion_base_dim") or flow.base_dim,
            "flow_weight": official.get("vision_coef", 1.0),
        },
        "data": {"max_seq_len": official.get("tokenizer_model_max_length", 512)},
    }
    remarks.append("sampler, prompt template and the settings of the training are not in an official config: defaults")
    return Described(tree, remarks)


def named_llm(official: Mapping[str, Any]) -> str:
    """The named language model of these sizes."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return the_one("language model", LLM_ZOO, names, lambda spec, name: getattr(spec, name), official)


DIT_SIZES = (
    "diffusion_model_hidden_size",
    "diffusion_model_depth",
    "diffusion_model_z_channels",
    "diffusion_model_channels",
    "diffusion_split_per_token",
)


def named_dit(official: Mapping[str, Any]) -> tuple[str, int | None]:
    """The named DiT of these sizes, and the wide head's number of heads where it is not the named one's."""
    given = {"diffusion_split_per_token": RELEASED_TOKENS} | dict(official)
    named = the_one("DiT", DIT_ZOO, DIT_SIZES, lambda dit, name: dit_settings(dit)[name], given)
    heads, dit = official.get("diffusion_model_heads"), DIT_ZOO[named]
    backbone, head = heads if isinstance(heads, list) else (heads, None)
    if backbone != dit.num_heads:
        raise ValueError(f"config.json: diffusion_model_heads={heads}: {named} has {dit.num_heads}")
    return named, head if dit.ddt is not None and head != dit.ddt.num_heads else None


def the_one(
    what: str, zoo: Mapping[str, Any], names: tuple[str, ...], size: Callable[[Any, str], Any], given: Mapping[str, Any]
) -> str:
    """The entry of `zoo` that has the sizes `names` of `given`."""
    for name, entry in zoo.items():
        if all(size(entry, key) == given.get(key) for key in names):
            return name
    sizes = ", ".join(f"{key}={given.get(key)}" for key in names)
    raise ValueError(f"config.json: no named {what} has {sizes} (`rae-scale model list` shows them)")


def named_tower(official: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The encoder section, and what is left open."""
    towers = official.get("mm_vision_tower_aux_list") or []
    tower = towers[0] if towers else ""
    for name, published in PUBLISHED_TOWERS.items():
        if tower == published:
            return {"name": name, "path": published}, []
    if tower.partition(":")[0] == DEMO_TOWER:
        path = tower.partition(":")[2]
        remarks = [] if path else ["model.encoder.path is not in the config: set it before images are encoded"]
        return {"name": DEMO_TOWER, "path": path or None}, remarks
    raise ValueError(
        f"config.json: mm_vision_tower_aux_list={towers}: this package has {', '.join(PUBLISHED_TOWERS.values())}"
    )
