"""The README.md of a shared model: what it is and how it was made, from what its checkpoint says, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import PurePath

import yaml
from torch import nn

from rae_scale.config import Config
from rae_scale.models.zoo import logical_parameters
from rae_scale.state.weights import WeightKind

PAPER = "https://arxiv.org/abs/2601.16208"
PAPER_TITLE = "Scaling Text-to-Image Diffusion Transformers with Representation Autoencoders"
UNKNOWN_LICENSE = "unknown"  # the hub's own word for it

# Parts of the model, in the order of the data's way.
PARTS = (
    ("conditioner.llm", "Language model"),
    ("conditioner.latent_queries", "Learned queries"),
    ("conditioner.mm_projector", "Projector of user images"),
    ("connector", "Connector"),
    ("dit", "DiT"),
)
DECODER = "Decoder"


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    parameters: by part, as `parameters_by_part` counts them. command: what wrote the folder.
    """

    name: str
    config: Config
    parameters: Mapping[str, int]
    kind: WeightKind | None
    dtype: str
    step: int | None
    command: str
    license: str = UNKNOWN_LICENSE
    draws: bool = True
    """Whether the folder holds what decodes."""
    recorded: bool = True
    """Whether the settings in `config` are those of the training, and not defaults that stand in for them."""


def parameters_by_part(model: nn.Module, decoder: int | None) -> dict[str, int]:
    """Parameters of the published model by part, without our padding; the decoder's are given."""
    counted = {}
    for name, part in PARTS:
        found = attrgetter(name)(model)
        counted[part] = logical_parameters(found) if isinstance(found, nn.Module) else found.numel()
    return counted if decoder is None else counted | {DECODER: decoder}


def model_card(facts: CardFacts) -> str:
    front = {
        "library_name": "rae-scale",
        "pipeline_tag": "text-to-image",
        "license": facts.license,
        "tags": ["text-to-image", "representation-autoencoder", "scale-rae"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {facts.name}",
        what_it_is(facts.config),
        usage(facts),
        "## Parameters",
        table(("Part", "Parameters"), ((part, f"{count:,}") for part, count in facts.parameters.items())),
        "## Training",
        table(("", ""), training(facts)),
        "All settings are in `config.json`. No results are claimed here: whoever measures some may add them.",
        f"## Made by\n\n```bash\n{facts.command}\n```",
        f"## Licence\n\n{licence(facts.license)}",
    ]
    return "\n\n".join(parts) + "\n"


def what_it_is(config: Config) -> str:
    model = config.model
    return (
        f"A text-to-image model of the Scale-RAE kind ([{PAPER_TITLE}]({PAPER})): the diffusion transformer "
        f"`{model.name}` generates the latents of the encoder `{model.encoder.name}`, conditioned token by token on "
        f"the language model `{model.llm.name}`; the decoder `{model.decoder.name}` turns them into pixels."
    )


def usage(facts: CardFacts) -> str:
    decoder = "" if facts.draws else ', decoder="DECODER-FOLDER"'
    note = "" if facts.draws else "\n\nThe decoder is not in this folder: without one, latents are not pictures."
    return (
        "## Use\n\n```python\nfrom rae_scale import RaeScale\n"
        f'model = RaeScale.from_pretrained("{facts.name}"{decoder})\n'
        'image = model.generate("a red circle above a blue square", seed=0)\n```\n\n'
        f'`"{facts.name}"` is the path of this folder, or the name under which it is on the hub.{note}'
    )


def training(facts: CardFacts) -> Iterable[tuple[str, str]]:
    config = facts.config
    kinds = {"ema": "moving average (EMA), ", "weight": "raw, ", None: ""}
    yield "Weights", f"{kinds[facts.kind]}{facts.dtype}"
    yield "Steps", "not recorded" if facts.step is None else f"{facts.step:,}"
    if not facts.recorded:
        yield "Settings", "not recorded"
        return
    yield "Stage", config.stage
    yield "Images per step", f"{config.data.global_batch_size:,}"
    names = [PurePath(source.path).name for source in config.data.sources]
    yield "Data", ", ".join(f"`{name}`" for name in names) or "not recorded"
    if facts.kind == "ema":
        yield "EMA decay", str(config.optim.ema_decay)
    yield "Trained in", config.engine.precision
    yield "Language model", "trained" if config.model.llm.train else "frozen"


def licence(name: str) -> str:
    if name == UNKNOWN_LICENSE:
        return (
            "Not stated by who made this folder. Set `license` above; the licences of the language model, the encoder "
            "and the data bear on it."
        )
    return f"{name}, as stated by who made this folder."


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
