"""What a model's dimensions allow tensor and sequence parallelism: every refusal names setting, reason and fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.models.llm_zoo import LLMSpec
from rae_scale.models.parallel_limits import parallel_problems

DIT = DiTConfig(in_channels=16, hidden_size=96, depth=1, num_heads=12, z_channels=96, grid_size=4)
LLM = LLMSpec(96, 1, 12, 6, 192, 320, tie_word_embeddings=True)


@pytest.mark.parametrize(("tp", "sp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
def test_what_divides_is_allowed(tp: int, sp: int) -> None:
    assert parallel_problems(DIT, LLM, tp=tp, sp=sp) == []


@pytest.mark.parametrize(
    ("dit", "llm", "tp", "sp", "message"),
    [
        (
            replace(DIT, hidden_size=40, num_heads=5),
            LLM,
            2,
            1,
            "tp x sp = 2 x 1 = 2 does not divide the 5 attention heads of the DiT",
        ),
        (DIT, LLM, 2, 4, "tp x sp = 2 x 4 = 8 does not divide the 12 attention heads of the language model"),
        (DIT, LLM, 1, 3, "parallel.sp=3 does not divide the DiT's 16 image tokens; choose a divisor of 16"),
        (DIT, LLM, 4, 1, "parallel.tp=4 does not divide the language model's 6 key and value heads"),
        (DIT, replace(LLM, intermediate_size=191), 2, 1, "does not divide the language model's intermediate_size=191"),
        (DIT, LLM, 3, 1, "parallel.tp=3 does not divide the DiT's padded SwiGLU width 256"),
        (replace(DIT, ddt=DDTHeadConfig(84, 1, 21)), LLM, 2, 1, "heads of the DDT head: .* or set model.ddt_num_heads"),
    ],
)
def test_what_does_not_divide_is_named(dit: DiTConfig, llm: LLMSpec, tp: int, sp: int, message: str) -> None:
    problems = parallel_problems(dit, llm, tp=tp, sp=sp)
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(problems))
    assert all("choose" in problem for problem in problems)
