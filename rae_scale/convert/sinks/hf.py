"""`--to hf`: the folder that is shared, for `RaeScale.from_pretrained`; `infer.published` says what is in it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

import rae_scale
from rae_scale.config import Config
from rae_scale.config.load import dump_config
from rae_scale.config.paths import resolve_path, resolve_paths
from rae_scale.convert.companions import Tokenizer, encoder_to_write, write_encoder
from rae_scale.convert.convert import convert
from rae_scale.convert.decoder_files import decoder_settings
from rae_scale.convert.model_card import UNKNOWN_LICENSE, CardFacts, model_card, parameters_by_part
from rae_scale.convert.names import table
from rae_scale.convert.open import open_source
from rae_scale.convert.ours import in_our_names
from rae_scale.convert.settings import Settings
from rae_scale.convert.sinks import Job, Plan
from rae_scale.convert.sinks.hub_files import weight_files, write_index, write_manifest
from rae_scale.convert.source import Naming
from rae_scale.infer.published import (
    CARD,
    CONFIG_JSON,
    DECODER,
    ENCODER,
    FORMAT_VERSION,
    MODEL_TYPE,
    TOKENIZER,
    shareable,
    with_model_path,
)
from rae_scale.models.composite import ScaleRAE
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.zoo import logical_parameters
from rae_scale.state.format import CHECKPOINTS, CONFIG, MANIFEST, CheckpointError, read_json, write_json
from rae_scale.train.parts import GENERATION_STAGES

NOTHING_INSIDE = {TOKENIZER: False, DECODER: False, ENCODER: False}
RAW_OR_EMA = {"ema": "ema", "weight": "raw"}


class HFSink:
    naming: Naming = "native"
    everything = False

    def plan(self, job: Job) -> Plan:
        job.whole_model("a shared folder")
        config = job.config
        if config.stage not in GENERATION_STAGES:
            raise CheckpointError(
                f"{job.source.what} is of stage {config.stage}, and a shared folder holds a text-to-image model; a "
                "decoder goes into --to official-decoder, or with its model: --decoder"
            )
        resolved = resolve_paths(config)
        tokenizer = Tokenizer.of(resolved)
        tokenizer.check_rows(job.settings.vocabulary)
        encoder = encoder_to_write(resolved)
        decoder = decoder_of(job, resolved)
        if decoder is not None:
            config = with_model_path(config, "decoder", "name", decoder.name)
        inside = {TOKENIZER: True, ENCODER: encoder is not None, DECODER: decoder is not None}
        shared = shareable(config, inside)
        files = weight_files(job.entries(table("native", job.module)), job.metadata)
        dtype = str(job.dtype).removeprefix("torch.")

        def complete(folder: Path, hashes: Mapping[str, str]) -> None:
            write_index(folder, files)
            tokenizer.write(folder / TOKENIZER)
            if encoder is not None:
                write_encoder(encoder, folder / ENCODER)
            if decoder is not None:
                decoder.write(folder / DECODER, dtype)
            write_json(folder / CONFIG_JSON, description(job, shared, dtype, hashes))
            (folder / CARD).write_text(model_card(card_facts(job, shared, dtype, decoder)), encoding="utf-8")
            write_manifest(folder, hashes)

        return Plan(files, complete, [*job.settings.remarks, *remarks(config, decoder)])


@dataclass(frozen=True)
class DecoderToWrite:
    """path: of any known format. name: as `model.decoder.name`. config: its own settings, without places."""

    path: Path
    name: str
    config: Config
    parameters: int

    def write(self, folder: Path, dtype: str) -> None:
        """As an export, which `model.decoder.path` takes."""
        convert(self.path, folder, "native", dtype=dtype)
        data = dump_config(self.config).encode()
        (folder / CONFIG).write_bytes(data)
        hashes = read_json(folder / MANIFEST) | {CONFIG: xxhash.xxh3_128_hexdigest(data)}
        write_json(folder / MANIFEST, hashes)


def decoder_of(job: Job, config: Config) -> DecoderToWrite | None:
    """The decoder that the user gives or the model was trained with, looked at before anything is written; None if
    there is none, or the encoder decodes by itself.

    Raises:
        CheckpointError: it is no decoder, or not one for this model's latents.
    """
    path = config.model.decoder.path if job.decoder is None else resolve_path(str(job.decoder))
    if path is None or config.model.encoder.name == "flux-vae":
        return None
    assert isinstance(job.module, ScaleRAE), "the model of a generation stage"
    dit = job.module.dit.cfg
    with open_source(path) as source:
        settings = Settings(source, Path(path))
        module = settings.module
        if not isinstance(module, ViTDecoder):
            raise CheckpointError(f"{source.what} holds a {type(module).__name__}, no decoder; give --decoder FOLDER")
        in_our_names(source, module)  # checks names and shapes
        cfg, own = module.cfg, shareable(settings.config, NOTHING_INSIDE)
    if (cfg.num_tokens, cfg.in_channels) != (dit.num_tokens, dit.in_channels):
        raise CheckpointError(
            f"the decoder at {path} takes {cfg.num_tokens} tokens of {cfg.in_channels} channels, the model makes "
            f"{dit.num_tokens} of {dit.in_channels}; give the decoder of this model's encoder: --decoder FOLDER"
        )
    return DecoderToWrite(
        Path(path), decoder_settings(cfg)["model"]["decoder"]["name"], own, logical_parameters(module)
    )


def remarks(config: Config, decoder: DecoderToWrite | None) -> list[str]:
    if decoder is not None or config.model.encoder.name == "flux-vae":
        return []
    return [
        "no decoder is in the folder (there is no model.decoder.path and no --decoder): who loads it gives one, "
        'RaeScale.from_pretrained(folder, decoder="...")'
    ]


def description(job: Job, shared: Config, dtype: str, hashes: Mapping[str, str]) -> dict[str, object]:
    """config.json."""
    return {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "rae_scale_version": rae_scale.__version__,
        "weights": {"kind": job.weights, "step": job.facts.step, "dtype": dtype, "xxh3_128": dict(hashes)},
        "config": shared.model_dump(mode="json"),
    }


def card_facts(job: Job, shared: Config, dtype: str, decoder: DecoderToWrite | None) -> CardFacts:
    options = ["--to", "hf"]
    if job.weights is not None:
        options += ["--weights", RAW_OR_EMA[job.weights]]
    if dtype != "float32":
        options += ["--dtype", dtype]
    if job.decoder is not None:
        options += ["--decoder", job.decoder.name]
    if job.license is not None:
        options += ["--license", job.license]
    command = ["rae-scale", "convert", source_name(job.settings.path.resolve()), job.out.name, *options]
    return CardFacts(
        name=job.out.name,
        config=shared,
        parameters=parameters_by_part(job.module, None if decoder is None else decoder.parameters),
        kind=job.weights,
        dtype=dtype,
        step=job.facts.step,
        command=shlex.join(command),
        license=job.license or UNKNOWN_LICENSE,
        # Weights from elsewhere come without one of these, and with settings made up of defaults.
        recorded=None not in (job.facts.config, job.facts.step, job.weights),
        draws=decoder is not None or shared.model.encoder.name == "flux-vae",
    )


def source_name(path: Path) -> str:
    """What of a source's path is of interest to others: a checkpoint's from its run on, else its last part."""
    parts = path.parts[-3:] if path.parent.name == CHECKPOINTS else path.parts[-1:]
    return str(Path(*parts))
