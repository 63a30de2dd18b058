"""Our settings and the model of a source, from what its format says or from what the user gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from rae_scale.config import Config, parse_config
from rae_scale.config.paths import resolve_paths
from rae_scale.convert.decoder_files import decoder_settings, from_diffusers_config, from_rae_config
from rae_scale.convert.official_config import from_official_config
from rae_scale.convert.source import Source
from rae_scale.models.composite import EMBEDDING, build_scale_rae
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.models.zoo import dit_config
from rae_scale.state.format import CheckpointError
from rae_scale.train.meta import build_parts_on_meta, without_weights
from rae_scale.train.parts import GENERATION_STAGES

DECODER_CONFIGS = {"official-decoder": from_rae_config, "diffusers-decoder": from_diffusers_config}
EMBEDDING_NAMES = {"official": "model.embed_tokens.weight", "llm": "model.embed_tokens.weight"}


@dataclass(frozen=True)
class Settings:
    """Settings and model of `source`, worked out when they are first asked for: copying a native checkpoint needs
    neither. given: settings that count before the source's own. remarks: what had to be assumed."""

    source: Source
    path: Path
    given: Config | None = None
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> Config:
        """Raises ValueError if there are none, or they name no model."""
        if self.given is not None:
            return self.given
        source, facts = self.source, self.source.facts
        if facts.config is not None:
            return parse_config(dict(facts.config), origin=source.what)
        if source.naming == "official" and facts.foreign:
            described = from_official_config(facts.foreign, str(self.path.resolve()))
            self.remarks.extend(described.remarks)
            return parse_config(described.settings, origin=source.what)
        decoder = self.foreign_decoder
        if decoder is not None:
            return parse_config(decoder_settings(decoder), origin=source.what)
        raise CheckpointError(
            f"{source.what} does not say which model it is of; give the settings that it was trained with: --config"
        )

    @cached_property
    def module(self) -> nn.Module:
        """The model, on the meta device. Its vocabulary has the rows of the source's embedding."""
        decoder = self.foreign_decoder if self.given is None else None
        if decoder is not None:
            with torch.device("meta"):
                return ViTDecoder(decoder)
        config = without_weights(resolve_paths(self.config))
        if config.stage not in GENERATION_STAGES:
            return build_parts_on_meta(config).stage.module
        dit = dit_config(config.model)
        with torch.device("meta"):
            return build_scale_rae(config.model, dit.in_channels, dit.num_tokens, self.vocabulary)

    @property
    def foreign_decoder(self) -> ViTDecoderConfig | None:
        """The decoder that a format's own settings describe, whether or not it has a name here."""
        read = DECODER_CONFIGS.get(self.source.naming)
        return read(self.source.facts.foreign) if read is not None and self.source.facts.foreign else None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        name = EMBEDDING_NAMES.get(self.source.naming, EMBEDDING)
        if name in self.source.forms["weight"]:
            return self.source.forms["weight"][name].shape[0]
        raise CheckpointError(f"{self.source.what} has no {name}: it holds no language model")
