"""What a model needs beside its weights in a folder that is to stand alone: tokenizer, and perhaps encoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rae_scale.config import Config
from rae_scale.data.tokenizer import PADDING, TURN_END
from rae_scale.models.encoders import build_encoder
from rae_scale.models.encoders.flux_vae import FluxVAEEncoder
from rae_scale.models.encoders.siglip_demo import SiglipDemoEncoder
from rae_scale.state.format import CheckpointError
from rae_scale.train.parts import load_stage_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY, MERGES = "vocab.json", "merges.txt"


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model, its added tokens included."""

    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, config: Config) -> Tokenizer:
        """That of `model.llm`, whose paths must be resolved. ValueError if it cannot be read."""
        return cls(load_stage_tokenizer(config))

    def check_rows(self, rows: int) -> None:
        """Raise CheckpointError unless the embedding has a row for each token, as whoever loads the folder assumes."""
        if len(self.tokenizer) != rows:
            raise CheckpointError(
                f"the model's embedding has {rows} rows and its tokenizer {len(self.tokenizer)} tokens; give the "
                "tokenizer that it was trained with (model.llm.tokenizer, --config)"
            )

    def special_ids(self) -> dict[str, int]:
        """As in a language model's config.json."""
        names = {"bos_token_id": PADDING, "pad_token_id": PADDING, "eos_token_id": TURN_END}
        return {name: int(self.tokenizer.convert_tokens_to_ids(token)) for name, token in names.items()}

    def write(self, folder: Path) -> None:
        """In the new format (tokenizer.json) and the old (vocab.json, merges.txt): the official code reads that."""
        self.tokenizer.save_pretrained(folder)
        bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (folder / VOCABULARY).write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
        (folder / MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def encoder_to_write(config: Config) -> SiglipDemoEncoder | FluxVAEEncoder | None:
    """The encoder, if decoding needs its weights or sizes and a path on this machine is all that tells them.

    Published ones are known by name, and those on the hub by id. Paths in `config` must be resolved.
    """
    cfg = config.model.encoder
    on_disk = cfg.path is not None and Path(cfg.path).is_dir()
    if cfg.name == "siglip-demo" or (cfg.name == "flux-vae" and on_disk):
        encoder = build_encoder(cfg)
        assert isinstance(encoder, SiglipDemoEncoder | FluxVAEEncoder)
        return encoder
    return None


def write_encoder(encoder: SiglipDemoEncoder | FluxVAEEncoder, folder: Path) -> None:
    """As `model.encoder.path` is read."""
    (encoder if isinstance(encoder, SiglipDemoEncoder) else encoder.model).save_pretrained(folder)
