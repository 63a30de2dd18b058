"""Text-to-image sampling: seconds of latents, of decoding, and of both, by batch size, steps and guidance."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_scale.bench.chart import bars
from rae_scale.bench.harness import Base, Benchmark, Case, Measured, Overrides, check_relevant, run_benchmark
from rae_scale.bench.record import Measure, Record, config_sections, facts_of
from rae_scale.bench.session import Session
from rae_scale.bench.timing import seconds_waited
from rae_scale.config import Config
from rae_scale.data.chat import TokenizedSample
from rae_scale.data.collate import Batch, collate
from rae_scale.flow import resolve_alpha
from rae_scale.infer.pipeline import TextToImage, to_uint8
from rae_scale.models.composite import ScaleRAE, build_scale_rae
from rae_scale.models.encoders import build_encoder
from rae_scale.models.encoders.flux_vae import FluxVAEEncoder
from rae_scale.models.packing import IGNORE_LABEL
from rae_scale.models.zoo import build_decoder, dit_config
from rae_scale.train.sampling import prompt_batch, sample_latents

PROMPT = "a red circle above a blue square"
SEED = 0
SECTIONS = ("model", "flow", "sampler", "engine.precision", "data.global_batch_size")

COLUMNS = {
    "setting": "{name}",
    "images/s": "{images_per_s:.3f}",
    "s per image": "{seconds_per_image:.4f}",
    "latents ms": "{latents_ms:.1f}",
    "decode ms": "{decode_ms:.1f}",
    "total ms": "{total_ms:.1f}",
    "10 - 90 %": "{total_low_ms:.1f} - {total_high_ms:.1f}",
    "peak GB": "{peak_gb:.2f}",
    "power W": "{power_draw_w:.0f}",
}


@dataclass(frozen=True)
class Drawer:
    """A model that draws.

    decode: latents [B, T, C] to pixels [B, 3, S, S] in [0, 1]. request: that many prompts as a batch, on the device.
    """

    model: ScaleRAE
    decode: Callable[[Tensor], Tensor]
    request: Callable[[int], Batch]
    bf16: bool


def bench_sample(
    base: Base,
    drawer_of: Callable[[Config], Drawer],
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    weights: str,
    repeats: int = 5,
    warm_up: int = 1,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point, of one process. `data.global_batch_size` is how many pictures are made at once.

    drawer_of: `random_drawer` or `LoadedDrawer`. weights: "random", or what tells a checkpoint from others.
    """
    kept: dict[str, Drawer] = {}

    def drawer(config: Config) -> Drawer:
        key = str(config_sections(config, ["model", "engine.precision"]))
        if key not in kept:
            # One model at a time: two need not fit.
            kept.clear()
            gc.collect()
            kept[key] = drawer_of(config)
        return kept[key]

    def cases_of(point: Overrides) -> list[Case]:
        config = base.config(point)
        check_relevant("sample", [*base.overrides, *point], SECTIONS)
        settings = {"weights": weights, "config": config_sections(config, SECTIONS)}
        run = functools.partial(measure, config, drawer, session.device, repeats, warm_up)
        return [Case(settings, facts_of(config, precision=config.engine.precision, kernels="ours"), run)]

    return run_benchmark(SAMPLE, points, cases_of, session, after_row=after_row)


@torch.inference_mode()
def measure(
    config: Config, drawer_of: Callable[[Config], Drawer], device: torch.device, repeats: int, warm_up: int
) -> Measured:
    drawer, count = drawer_of(config), config.data.global_batch_size
    dit, batch = drawer.model.dit.cfg, drawer.request(count)
    alpha = resolve_alpha(config.flow, dit.num_tokens * dit.in_channels)

    def latents() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=drawer.bf16):
            return sample_latents(drawer.model, batch, config.sampler, alpha=alpha, seed=SEED)

    def decode(found: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=drawer.bf16):
            return drawer.decode(found)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    drawn = latents()
    timed = functools.partial(seconds_waited, device=device, repeats=repeats, warm_up=warm_up)
    measures = {
        "latents": Measure.of(timed([latents])),
        "decode": Measure.of(timed([lambda: decode(drawn)])),
        # As a user gets them: 8-bit pictures in host memory.
        "total": Measure.of(timed([lambda: to_uint8(decode(latents()))])),
    }
    if device.type == "cuda":
        measures["peak"] = Measure.count(torch.cuda.max_memory_allocated(device))
    total = measures["total"].median
    return Measured(measures, {"images_per_s": count / total, "seconds_per_image": total / count})


def random_drawer(config: Config, device: torch.device, text_tokens: int) -> Drawer:
    """The models that `config` names with random weights, and random texts of `text_tokens` tokens.

    Raises:
        ValueError: a name names nothing, or the decoder does not take the DiT's latents.
    """
    dit = dit_config(config.model)
    torch.manual_seed(SEED)
    with device:
        model = build_scale_rae(config.model, dit.in_channels, dit.num_tokens, None).eval().requires_grad_(False)
    rows = model.conditioner.llm.config.vocab_size

    def request(count: int) -> Batch:
        generator = torch.Generator().manual_seed(SEED)
        length = text_tokens + dit.num_tokens + 1  # and the end of the image, as `encode_prompt` has it
        samples = [
            TokenizedSample(
                torch.randint(rows, (length,), generator=generator).tolist(), [IGNORE_LABEL] * length, text_tokens, -1
            )
            for _ in range(count)
        ]
        names = [str(number) for number in range(count)]
        return collate(
            samples,
            [None] * count,
            image_size=1,
            pad_id=0,
            sample_index=range(count),
            sample_ids=names,
            captions=names,
        ).to(device)

    return Drawer(model, random_decode(config, device), request, config.engine.precision == "bf16")


def random_decode(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    dit, cfg = dit_config(config.model), config.model.decoder
    if config.model.encoder.name == "flux-vae":
        vae = build_encoder(config.model.encoder).to(device)
        assert isinstance(vae, FluxVAEEncoder)
        return vae.decode
    decoder = build_decoder(cfg, dit.in_channels).eval().requires_grad_(False).to(device)
    if decoder.cfg.num_tokens != dit.num_tokens:
        raise ValueError(
            f"model.decoder.name={cfg.name!r} decodes {decoder.cfg.num_tokens} tokens, but model.name="
            f"{config.model.name!r} makes {dit.num_tokens}; choose the decoder made for it (`rae-scale model list`)"
        )
    return decoder.decode


class LoadedDrawer:
    """A checkpoint's model, with its own settings but those of sampling."""

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        """
        Raises:
            ValueError: it cannot be loaded; see `TextToImage.from_checkpoint`.
        """
        self.pipeline = TextToImage.from_checkpoint(checkpoint, device=device.type)

    def __call__(self, config: Config) -> Drawer:
        pipeline, own = self.pipeline, self.pipeline.config
        for name in ("model", "flow", "engine"):
            if getattr(config, name) != getattr(own, name):
                raise ValueError(
                    f"{name}.* is overridden, but the checkpoint's own settings hold; sweep sampler.* and "
                    "data.global_batch_size, or leave --checkpoint out"
                )

        def request(count: int) -> Batch:
            template = own.data.prompt_template
            return prompt_batch(pipeline.chat, [PROMPT] * count, template, pipeline.image_size).to(pipeline.device)

        return Drawer(pipeline.model, pipeline.decode, request, pipeline.bf16)

    def tree(self) -> dict[str, Any]:
        """The checkpoint's settings, to be overridden."""
        return self.pipeline.config.model_dump(mode="json")


SAMPLE = Benchmark("sample", "Text-to-image sampling", COLUMNS, bars("latents", "decode", "total"))
