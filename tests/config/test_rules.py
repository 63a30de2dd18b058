"""Rules between settings: each names the setting, its value, why it cannot be and the fix."""

from __future__ import annotations

import pytest

from rae_scale.config import ConfigError, parse_config

TWO_RANKS = {"engine": {"name": "zero"}, "parallel": {"dp_shard": 2}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {**TWO_RANKS, "data": {"global_batch_size": 7}},
            "data.global_batch_size=7 does not divide by parallel.dp_replicate x dp_shard = 2",
        ),
        (
            {**TWO_RANKS, "data": {"global_batch_size": 16, "micro_batch_size": 3}},
            "data.micro_batch_size=3 does not divide the 8 samples of each rank",
        ),
        (
            {"data": {"global_batch_size": 16, "lanes": 3}},
            "data.lanes=3 does not divide data.global_batch_size=16; choose a divisor of it",
        ),
        (
            {"data": {"flip": True}},
            "data.flip=true with stage=pretrain: captions say left and right, and letters would be mirrored",
        ),
        (
            {"stage": "decoder", "data": {"caption_choice": "weighted"}},
            "data.caption_choice=weighted with stage=decoder would be ignored",
        ),
        (
            {"stage": "decoder", "optim": {"groups": {"dit": {"lr": 1}}}},
            "optim.groups.decoder is missing: stage=decoder trains decoder",
        ),
        (
            {"optim": {"groups": {"llm": {"lr": 1}, "dit": {"lr": 1}, "encoder": {"lr": 1}}}},
            "optim.groups.encoder is not trained by stage=pretrain",
        ),
        ({"parallel": {"dp_shard": 2}}, "engine.name=eager runs one process, but parallel asks for 2"),
        (
            {"stage": "encoder", "engine": {"name": "fsdp2"}, "parallel": {"sp": 2}},
            "parallel.sp=2 with stage=encoder: its model is small and runs data parallel only; set parallel.sp=1",
        ),
        (
            {"stage": "decoder", "engine": {"name": "zero"}, "parallel": {"tp": 4}},
            "parallel.tp=4 with stage=decoder",
        ),
        (
            {"engine": {"name": "zero"}, "parallel": {"dp_replicate": 2}},
            "parallel.dp_replicate=2 with engine.name=zero",
        ),
        (
            {"engine": {"name": "fsdp2", "zero_hpz": 2}, "parallel": {"dp_shard": 2}},
            "engine.zero_hpz=2 with engine.name=fsdp2 would be ignored",
        ),
        (
            {"engine": {"name": "zero", "zero_stage": 2, "zero_hpz": 2}, "parallel": {"dp_shard": 2}},
            "engine.zero_hpz=2 with engine.name=zero engine.zero_stage=2 would be ignored",
        ),
        (
            {"engine": {"name": "zero", "zero_hpz": 4}, "parallel": {"dp_shard": 3, "sp": 2}},
            "engine.zero_hpz=4 does not divide the parallel.dp_shard x sp = 6 ranks",
        ),
        (
            {"engine": {"name": "zero", "zero_stage": 1, "offload_optimizer": True}},
            "engine.offload_optimizer=true with engine.name=zero engine.zero_stage=1",
        ),
        (
            {"engine": {"activation_checkpointing": "full", "saved_ops": {"linear": 2}}},
            "engine.saved_ops={'linear': 2} with engine.activation_checkpointing=full would be ignored",
        ),
        (
            {"engine": {"activation_checkpointing": "selective", "saved_ops": {"linear": 0}}},
            "engine.saved_ops={'linear': 0} with engine.activation_checkpointing=selective keeps nothing",
        ),
        (
            {"engine": {"activation_checkpointing": "selective", "saved_ops": {"atention": 1}}},
            "engine.saved_ops.atention.[key]='atention': Input should be 'linear', 'attention' or 'communication'",
        ),
        (
            {"engine": {"activation_checkpointing": "selective", "saved_ops": {"linear": -2}}},
            "engine.saved_ops.linear=-2: Input should be greater than or equal to -1",
        ),
        (
            {"engine": {"name": "zero", "zero_stage": 3, "compile": "blocks"}},
            "engine.compile=blocks with engine.name=zero engine.zero_stage=3: DeepSpeed gathers parameters by hooks",
        ),
        (
            {"engine": {"compile": "blocks", "activation_checkpointing": "selective"}},
            "engine.compile=blocks with engine.activation_checkpointing=selective",
        ),
        (
            {"engine": {"name": "fsdp2", "compile": "blocks-cudagraphs"}},
            "engine.compile=blocks-cudagraphs with engine.name=fsdp2: a recorded launch reads parameters",
        ),
        (
            {"engine": {"compile": "blocks-cudagraphs", "activation_checkpointing": "full"}},
            "engine.compile=blocks-cudagraphs with engine.activation_checkpointing=full",
        ),
        (
            {"engine": {"compile": "blocks-cudagraphs"}, "run": {"device": "cpu"}},
            "engine.compile=blocks-cudagraphs with run.device=cpu: CUDA graphs need a GPU; use engine.compile=blocks",
        ),
        (
            {"engine": {"name": "fsdp2", "fp8": True}, "parallel": {"tp": 2}},
            "engine.fp8=true with parallel.tp=2: layers that are split over ranks multiply in bfloat16",
        ),
        (
            {"engine": {"name": "zero", "fp8": True}},
            "engine.fp8=true with engine.name=zero",
        ),
        (
            {"engine": {"fp8": True, "precision": "fp32"}},
            "engine.fp8=true with engine.precision=fp32",
        ),
        (
            {"stage": "decoder", "engine": {"fp8": True}, "optim": {"groups": {"decoder": {"lr": 1}}}},
            "engine.fp8=true with stage=decoder, which has no DiT",
        ),
        ({"sampler": {"guidance_interval": [0.6, 0.2]}}, "sampler.guidance_interval=[0.6, 0.2] is empty"),
        (
            {"sampler": {"grid": "compat", "method": "heun"}},
            "sampler.method=heun with sampler.grid=compat: the official release has Euler steps only",
        ),
        ({"sampler": {"grid": "compat", "steps": 2}}, "sampler.steps=2 with sampler.grid=compat"),
        (
            {
                "stage": "decoder",
                "optim": {"groups": {"decoder": {"lr": 1}}},
                "data": {"latent_cache": {"dir": "latents"}},
            },
            "data.latent_cache with stage=decoder, which learns from pixels",
        ),
        (
            {"data": {"latent_cache": {"dir": "latents"}, "crop": "random"}},
            "data.latent_cache with data.crop=random: an image is encoded once",
        ),
        (
            {"data": {"latent_cache": {"dir": "latents"}, "flip": True}},
            "data.flip=true with stage=pretrain",
        ),
        ({"data": {"prompt_template": "draw it"}}, "data.prompt_template='draw it' has no {caption}"),
    ],
)
def test_impossible_combinations_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(tree)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        TWO_RANKS,
        {"engine": {"name": "fsdp2"}, "parallel": {"dp_replicate": 2, "dp_shard": 4}},
        {"engine": {"name": "fsdp2"}, "parallel": {"dp_replicate": 2, "dp_shard": 4, "sp": 2, "tp": 2}},
        {"engine": {"name": "zero"}, "parallel": {"sp": 2, "tp": 4}},
        {"stage": "finetune", "engine": {"name": "zero"}, "parallel": {"tp": 2}},
        {**TWO_RANKS, "data": {"global_batch_size": 16, "micro_batch_size": 4}},
        {"stage": "encoder", "optim": {"groups": {"encoder": {"lr": 1e-3}}}},
        {"engine": {"activation_checkpointing": "full"}},
        {"engine": {"activation_checkpointing": "full", "compile": "blocks"}},
        {"engine": {"name": "zero", "zero_stage": 2, "compile": "blocks"}, "parallel": {"sp": 2, "tp": 2}},
        {"engine": {"name": "fsdp2", "compile": "blocks", "fp8": True}, "parallel": {"dp_shard": 2, "sp": 2}},
        {"engine": {"compile": "blocks-cudagraphs"}},
        {"engine": {"activation_checkpointing": "selective", "saved_ops": {"attention": -1, "linear": 0}}},
    ],
)
def test_possible_combinations_are_accepted(tree: dict[str, object]) -> None:
    parse_config(tree)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_what_a_mode_of_checkpointing_keeps_by_default_survives_saving_the_configuration(mode: str) -> None:
    config = parse_config({"engine": {"activation_checkpointing": mode}})
    assert bool(config.engine.saved_ops) == (mode == "selective")
    assert parse_config(config.model_dump(mode="json")) == config
