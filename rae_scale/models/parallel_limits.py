"""Which tensor and sequence parallel sizes a model allows: known from its dimensions, before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rae_scale.models.dit import DiTConfig

if TYPE_CHECKING:
    from transformers import Qwen2Config

    from rae_scale.models.llm_zoo import LLMSpec


def parallel_problems(dit: DiTConfig, llm: LLMSpec | Qwen2Config, *, tp: int, sp: int) -> list[str]:
    """Why the model cannot be split `tp` x `sp`, a line per reason: setting, value, why, fix. Empty: it can."""
    problems = [
        *_heads("the DiT", dit.num_heads, tp, sp),
        *(_heads("the DDT head", dit.ddt.num_heads, tp, sp, "or set model.ddt_num_heads") if dit.ddt else ()),
        *_heads("the language model", llm.num_attention_heads, tp, sp),
    ]
    if llm.num_key_value_heads % tp:
        problems.append(
            f"parallel.tp={tp} does not divide the language model's {llm.num_key_value_heads} key and value heads; "
            f"choose a divisor of {llm.num_key_value_heads} and use parallel.sp or dp_shard for the rest"
        )
    if llm.intermediate_size % tp:
        problems.append(
            f"parallel.tp={tp} does not divide the language model's intermediate_size={llm.intermediate_size}; choose "
            "a divisor"
        )
    for what, channels in _dit_widths(dit):
        if channels % tp:
            problems.append(f"parallel.tp={tp} does not divide the {what} {channels}; choose a divisor of {channels}")
    if dit.num_tokens % sp:
        problems.append(
            f"parallel.sp={sp} does not divide the DiT's {dit.num_tokens} image tokens; choose a divisor of "
            f"{dit.num_tokens}"
        )
    return problems


def _heads(what: str, num_heads: int, tp: int, sp: int, fix: str = "") -> list[str]:
    """Attention needs whole heads, as many on each rank."""
    if num_heads % (tp * sp) == 0:
        return []
    return [
        f"parallel.tp x sp = {tp} x {sp} = {tp * sp} does not divide the {num_heads} attention heads of {what}: every "
        f"rank needs as many whole heads as the others; choose sizes whose product divides {num_heads}"
        + (f", {fix}" if fix else "")
    ]


def _dit_widths(dit: DiTConfig) -> list[tuple[str, int]]:
    widths = [("DiT's hidden size", dit.hidden_size), ("DiT's padded SwiGLU width", dit.padded_inner_size)]
    if dit.ddt is not None:
        widths.append(("DDT head's hidden size", dit.ddt.hidden_size))
        widths.append(("DDT head's padded SwiGLU width", dit.ddt.padded_inner_size))
    return widths
