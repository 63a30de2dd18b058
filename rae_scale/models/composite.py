"""The trained model: conditioner, connector and DiT in one module (paper figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae_scale.config.schema import LLMConfig, ModelConfig
from rae_scale.models.conditioner import Conditioner
from rae_scale.models.dit import DiT
from rae_scale.models.llm_zoo import build_llm
from rae_scale.models.official import OfficialTensor, load_official, official_tensors
from rae_scale.models.packing import TextLayout
from rae_scale.models.tokens import AllTokens, Tokens
from rae_scale.models.zoo import build_dit

GROUP_OF_PART = {"conditioner": "llm", "connector": "dit", "dit": "dit"}

OFFICIAL_DIT = "diff_head.model."
# Official prefix -> ours. The first that matches counts.
OFFICIAL_PREFIXES = (
    ("diff_head_projector.", "connector."),
    ("model.mm_projector.", "conditioner.mm_projector."),
    ("model.latent_queries", "conditioner.latent_queries"),
    ("model.", "conditioner.llm.model."),
    ("lm_head.", "conditioner.llm.lm_head."),
)
EMBEDDING = "conditioner.llm.model.embed_tokens.weight"
OUTPUT_LAYER = "conditioner.llm.lm_head.weight"


class ScaleRAEOutput(NamedTuple):
    velocity: Tensor
    """[B, P, C] at P consecutive ones of the T image tokens, those computed here: all, without sequence parallelism.
    Of no meaning in samples without an answer image."""
    first_token: int
    """The first of these tokens."""
    text_loss_sum: Tensor
    """float32 scalar: cross-entropy summed over the labelled positions that were computed here."""


class ScaleRAE(nn.Module):
    """Text and user image -> query states -> connector -> per-token condition of the DiT's velocity.

    B samples, L text positions, T image tokens of C channels, z the DiT's conditioning width. Sequence parallelism
    replaces `tokens`, here and in the conditioner.
    """

    def __init__(self, conditioner: Conditioner, connector: nn.Module, dit: DiT) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.connector = connector
        self.dit = dit
        self.tokens: Tokens = AllTokens()

    def forward(
        self,
        *,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        answer_start: Tensor,
        user_start: Tensor,
        user_features: Tensor,
        x_t: Tensor,
        t: Tensor,
        drop: Tensor,
        layout: TextLayout | None = None,
    ) -> ScaleRAEOutput:
        """Velocity at the noisy latents, and the text loss, of one batch.

        input_ids, labels, attention_mask: int64 [B, L], right padded; labels -100 where ignored.
        answer_start, user_start: int64 [B], first slot of the generated and of the given image, -1 for none.
        user_features: [B, T, C] clean encoder tokens of the given images, anything finite where there is none.
        x_t: [B, T, C] and t: [B], noisy latents and their times, anything finite where no image is generated.
        drop: bool [B], samples whose condition becomes the null vector.
        layout: what the host knows of the texts; None makes it wait for the device.
        """
        states, text_loss_sum = self.conditioner(
            input_ids, attention_mask, answer_start, user_start, user_features, labels, layout
        )
        positions = self.tokens.positions(x_t.shape[1], x_t.device)
        velocity = self.dit.forward_tokens(x_t[:, positions], t, self.connector(states), drop, positions)
        return ScaleRAEOutput(velocity, self.tokens.first(x_t.shape[1]), text_loss_sum)

    def condition(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_start: Tensor,
        user_start: Tensor,
        user_features: Tensor,
    ) -> Tensor:
        """The DiT's condition [B, T, z] for sampling (the share of `tokens`); arguments as in `forward`."""
        states, _ = self.conditioner(input_ids, attention_mask, answer_start, user_start, user_features)
        return self.connector(states)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """For sampling: velocity [B, T, C] of all tokens `x` [B, T, C] at times t [B], given `condition`'s result."""
        positions = self.tokens.positions(x.shape[1], x.device)
        return self.tokens.collect(self.dit.forward_tokens(x[:, positions], t, condition, drop, positions))


def group_of(parameter_name: str) -> str:
    """Optimizer group of a ScaleRAE parameter: "llm" (LLM, queries, user projector) or "dit" (connector, DiT)."""
    part = parameter_name.partition(".")[0]
    if part not in GROUP_OF_PART:
        raise ValueError(f"parameter {parameter_name!r} belongs to no part of ScaleRAE ({', '.join(GROUP_OF_PART)})")
    return GROUP_OF_PART[part]


def build_scale_rae(
    cfg: ModelConfig,
    encoder_channels: int,
    num_tokens: int,
    tokenizer_vocab: int | None,
    language_model: Callable[[LLMConfig, int | None], Any] = build_llm,
) -> ScaleRAE:
    """Build the model that `cfg` names, its random weights a function of torch's seed.

    encoder_channels, num_tokens: C and T of the encoder's latents. tokenizer_vocab: length of the tokenizer, which
    becomes the number of embedding rows; None keeps the language model's own. language_model: what builds that.
    With `cfg.llm.train` off, the language model and the user projector are frozen; queries, connector and DiT train
    (the release's DiT-only finetuning). Works under `torch.device("meta")`.

    Raises:
        ValueError: the DiT does not take this encoder's latents, or a name or path is wrong.
    """
    dit = build_dit(cfg)
    check_latents(cfg, dit, encoder_channels, num_tokens)
    llm = language_model(cfg.llm, tokenizer_vocab)
    conditioner = Conditioner(llm, num_queries=num_tokens, user_channels=encoder_channels, mask=cfg.llm.mask)
    if not cfg.llm.train:
        conditioner.llm.requires_grad_(False)
        conditioner.mm_projector.requires_grad_(False)
    connector = build_connector(cfg.llm.connector, llm.config.hidden_size, dit.cfg.z_channels)
    return ScaleRAE(conditioner, connector, dit)


def check_latents(cfg: ModelConfig, dit: DiT, encoder_channels: int, num_tokens: int) -> None:
    """Raise ValueError unless the DiT generates latents of the encoder's shape."""
    wanted = (dit.cfg.num_tokens, dit.cfg.in_channels)
    if wanted != (num_tokens, encoder_channels):
        raise ValueError(
            f"model.name={cfg.name!r} generates {wanted[0]} tokens of {wanted[1]} channels, but "
            f"model.encoder.name={cfg.encoder.name!r} gives {num_tokens} of {encoder_channels}; choose the DiT made "
            "for this encoder (`rae-scale model list`)"
        )


def build_connector(kind: str, hidden_size: int, z_channels: int) -> nn.Module:
    """A single Linear, as in the paper's appendix B and every release, or the two layers of its main text."""
    if kind == "linear":
        return nn.Linear(hidden_size, z_channels)
    return nn.Sequential(nn.Linear(hidden_size, z_channels), nn.GELU(), nn.Linear(z_channels, z_channels))


@torch.no_grad()
def load_official_t2i(model: ScaleRAE, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of an official text-to-image checkpoint into `model`, in place.

    Nothing is copied if anything does not fit; the ValueError lists every missing, unknown or differently shaped
    tensor.
    """
    official_dit = {
        name.removeprefix(OFFICIAL_DIT): tensor for name, tensor in state_dict.items() if name.startswith(OFFICIAL_DIT)
    }
    renamed = {our_name(name): tensor for name, tensor in state_dict.items() if not name.startswith(OFFICIAL_DIT)}
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("dit.")}
    if model.conditioner.llm.config.tie_word_embeddings and EMBEDDING in renamed:
        check_tied(renamed)
        renamed[OUTPUT_LAYER] = renamed[EMBEDDING]
    problems = [f"{name} {list(tensor.shape)} is missing" for name, tensor in own.items() if name not in renamed]
    for name, tensor in renamed.items():
        if name not in own:
            problems.append(f"{name} {list(tensor.shape)} is not part of this model")
        elif tensor.shape != own[name].shape:
            problems.append(f"{name} is {list(tensor.shape)} in the checkpoint, {list(own[name].shape)} in the model")
    if problems:
        raise ValueError(
            "the official checkpoint does not fit this model:\n  "
            + "\n  ".join(problems)
            + "\nbuild the model with the sizes, connector and vocabulary that the checkpoint was trained with"
        )
    load_official(model.dit, official_dit)
    for name, tensor in own.items():
        tensor.copy_(renamed[name])


def our_name(official_name: str) -> str:
    """The name of an official tensor in ScaleRAE; unknown names come back unchanged."""
    for theirs, ours in OFFICIAL_PREFIXES:
        if official_name.startswith(theirs):
            return ours + official_name.removeprefix(theirs)
    return official_name


def official_t2i_tensors(model: ScaleRAE) -> Iterator[OfficialTensor]:
    """Every tensor of an official text-to-image checkpoint, as a view of the model's parameter or constant. A tied
    output layer is spelled out, as the release does."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith("dit."):
            yield OfficialTensor(official_name(name), parameter, tuple(parameter.shape))
    for entry in official_tensors(model.dit):
        yield entry._replace(name=OFFICIAL_DIT + entry.name)


def official_name(our_name: str) -> str:
    """The inverse of `our_name`, for every part but the DiT."""
    theirs, ours = next(pair for pair in OFFICIAL_PREFIXES if our_name.startswith(pair[1]))
    return theirs + our_name.removeprefix(ours)


def check_tied(state: Mapping[str, Tensor]) -> None:
    """A checkpoint may spell out a tied output layer; ValueError if it is another matrix than the embedding."""
    if OUTPUT_LAYER in state and not torch.equal(state[OUTPUT_LAYER], state[EMBEDDING]):
        raise ValueError(
            "the checkpoint's lm_head.weight differs from its model.embed_tokens.weight, but this language model ties "
            "the two; build it with tie_word_embeddings=False"
        )
