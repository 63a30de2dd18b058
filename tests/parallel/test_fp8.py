"""8-bit products: which layers have them, that they do round, and that training follows bfloat16 all the same."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from rae_scale.bench.fp8_parity import Denoiser, compare
from rae_scale.config.schema import EngineConfig, GroupConfig, OptimConfig
from rae_scale.engines import Engine, build_engine
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.zoo import DIT_ZOO
from rae_scale.parallel import Mesh, compile_blocks
from rae_scale.parallel.fp8 import FP8_LAYERS, convert_to_fp8

CPU = torch.device("cpu")
CFG = DiTConfig(16, hidden_size=48, depth=2, num_heads=4, z_channels=32, grid_size=4, ddt=DDTHeadConfig(64, 1, 4))
BLOCKS = ("dit.blocks.0", "dit.blocks.1", "dit.head.blocks.0")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def build() -> DiT:
    torch.manual_seed(0)
    return DiT(DiTConfig(8, hidden_size=96, depth=2, num_heads=4, z_channels=96, grid_size=4))


def denoiser(cfg: DiTConfig = CFG) -> Denoiser:
    torch.manual_seed(0)
    module = Denoiser(DiT(cfg))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        module.dit.init_constants()
    return module


def velocity(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 16, 16, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        return module(x, torch.rand(2, generator=generator), y).float()


def without_gradient(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return velocity(module)


def in_8_bits(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if type(layer).__name__ == "Float8Linear"]


@needs_torchao
def test_the_large_layers_of_blocks_and_no_others() -> None:
    module = denoiser()
    converted = convert_to_fp8(module, CPU)
    assert sorted(converted) == sorted(f"{block}.{layer}" for block in BLOCKS for layer in FP8_LAYERS)
    assert sorted(converted) == sorted(in_8_bits(module))


@needs_torchao
@pytest.mark.parametrize("name", sorted(DIT_ZOO))
def test_all_of_them_in_every_named_dit(name: str) -> None:
    with torch.device("meta"):
        module = DiT(DIT_ZOO[name])
    blocks = len(module.blocks) + len(module.head_blocks)
    assert len(convert_to_fp8(module, CPU)) == blocks * len(FP8_LAYERS)


@needs_torchao
def test_a_layer_whose_sizes_do_not_divide_by_16_stays() -> None:
    cfg = DiTConfig(16, hidden_size=48, depth=1, num_heads=4, z_channels=40, grid_size=4)
    module = denoiser(cfg)
    convert_to_fp8(module, CPU)
    assert "dit.blocks.0.adaln" not in in_8_bits(module)  # 40 to 288
    assert "dit.blocks.0.attn.qkv" in in_8_bits(module)


@needs_torchao
def test_parameters_are_the_same_objects_by_the_same_names() -> None:
    module = denoiser()
    before = dict(module.named_parameters())
    convert_to_fp8(module, CPU)
    after = dict(module.named_parameters())
    assert before.keys() == after.keys() and list(module.state_dict()) == list(denoiser().state_dict())
    assert all(after[name] is parameter and parameter.dtype == torch.float32 for name, parameter in before.items())


@needs_torchao
def test_products_do_round_to_8_bits() -> None:
    module = denoiser()
    convert_to_fp8(module, CPU)
    ours, bf16 = without_gradient(module), without_gradient(denoiser())
    error = float((ours - bf16).norm() / bf16.norm())
    assert 3e-3 < error < 0.1, error  # e4m3 has 3 bits behind the leading one, bfloat16 has 7


@needs_torchao
def test_losses_follow_those_of_bfloat16() -> None:
    result = compare(build, steps=50, batch=16, device=CPU)
    assert result["losses"]["fp8"] != result["losses"]["bf16"]
    assert result["last"]["bf16"] < 0.9 * result["losses"]["bf16"][0], "it must learn something"
    assert abs(result["fp8_against_bf16"]) < 0.02, result


def engine_of(name: str, module: nn.Module, checkpointing: str = "none") -> Engine:
    optim = OptimConfig(groups={"dit": GroupConfig(lr=1e-3)})
    cfg = EngineConfig(name=name, fp8=True, activation_checkpointing=checkpointing)
    return build_engine(cfg, optim, module, lambda name: "dit", Mesh(CPU))


def gradient_norm(engine: Engine) -> float:
    engine.backward(velocity(engine.module).square().mean(), last=True)
    return engine.step({"dit": 1e-3}).grad_norm


@needs_torchao
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_runs_the_same_products_again(checkpointing: str) -> None:
    norms = [gradient_norm(engine_of("eager", denoiser(), mode)) for mode in ("none", checkpointing)]
    assert norms[0] == norms[1]


@needs_torchao
def test_fsdp2_shards_the_converted_layers() -> None:
    engine = engine_of("fsdp2", denoiser())
    expected = gradient_norm(engine_of("eager", denoiser()))
    assert gradient_norm(engine) == pytest.approx(expected, rel=0.05)  # it rounds weights to bfloat16 first
    assert {piece.tensor.dtype for piece in engine.pieces()} == {torch.float32}
    engine.close()


@needs_torchao
@pytest.mark.long
def test_compiled_blocks_take_8_bit_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(
        "rae_scale.engines.build.compile_blocks", functools.partial(compile_blocks, backend="aot_eager")
    )
    optim = OptimConfig(groups={"dit": GroupConfig(lr=1e-3)})
    norms = []
    for mode in ("none", "blocks"):
        cfg = EngineConfig(fp8=True, compile=mode)
        norms.append(gradient_norm(build_engine(cfg, optim, denoiser(), lambda name: "dit", Mesh(CPU))))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engine\.fp8=true needs torchao.*pip install.*or set engine\.fp8=false"):
        convert_to_fp8(denoiser(), CPU)


@needs_torchao
def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"engine\.fp8=true on sm_80 \(A100\).*need sm_90"):
        convert_to_fp8(denoiser(), torch.device("cuda"))


@needs_torchao
def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.fp8=true: Linear has no linear layer in a DiT block"):
        convert_to_fp8(nn.Linear(16, 16), CPU)


@pytest.mark.gpu
@needs_torchao
def test_losses_follow_those_of_bfloat16_on_a_gpu() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90 or newer")
    result = compare(build, steps=100, batch=16, device=torch.device("cuda"))
    assert abs(result["fp8_against_bf16"]) < 0.02, result
