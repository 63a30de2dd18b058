from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rae_scale.models import DDTHeadConfig, DiT, DiTConfig, from_official, to_official

CONFIG = DiTConfig(in_channels=6, hidden_size=24, depth=2, num_heads=2, z_channels=20, grid_size=3)
HEAD = DDTHeadConfig(hidden_size=32, depth=1, num_heads=2)
WITH_HEAD = replace(CONFIG, ddt=HEAD)
BOTH = pytest.mark.parametrize("cfg", [CONFIG, WITH_HEAD], ids=["plain", "ddt"])


def random_dit(cfg: DiTConfig) -> DiT:
    """A DiT whose zero-initialised layers are random too, so that every path shows in the output."""
    torch.manual_seed(0)
    model = DiT(cfg)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.init_constants()
    return model


def inputs(cfg: DiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, cfg.num_tokens, cfg.in_channels, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randn(batch, cfg.num_tokens, cfg.z_channels)


@pytest.mark.parametrize("name", ["dit_tiny", "ddt_tiny"])
def test_velocity_and_gradients_equal_the_published_module(golden, name: str) -> None:
    reference = golden(name)
    model = from_official(reference.part("state."), reference.config)
    x, y = reference["in.x"].requires_grad_(), reference["in.y"].requires_grad_()
    velocity = model(x, reference["in.t"], y)
    torch.testing.assert_close(velocity, reference["out.v"], atol=2e-5, rtol=0)

    (velocity * reference["in.cotangent"]).sum().backward()
    assert_close_to_largest("x", x.grad, reference["grad.x"])
    assert_close_to_largest("y", y.grad, reference["grad.y"])
    gradients = official_gradients(model)
    for name, expected in reference.part("gradw.").items():
        assert_close_to_largest(name, gradients[name], expected)


def official_gradients(model: DiT) -> dict[str, Tensor]:
    """The parameters' gradients in official names and shapes: export a twin that holds gradients as its weights."""
    twin = deepcopy(model)
    with torch.no_grad():
        for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.copy_(original.grad)
    return to_official(twin)


def assert_close_to_largest(name: str, gradient: Tensor, expected: Tensor) -> None:
    assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@BOTH
def test_images_are_tokens_row_by_row(cfg: DiTConfig) -> None:
    model, (x, t, y) = random_dit(cfg), inputs(cfg)
    image = x.transpose(1, 2).reshape(3, cfg.in_channels, 3, 3)
    velocity = model(image, t, y)
    assert velocity.shape == image.shape
    torch.testing.assert_close(velocity.flatten(2).transpose(1, 2), model.forward_tokens(x, t, y))


@BOTH
def test_a_dropped_sample_sees_only_the_null_vector(cfg: DiTConfig) -> None:
    model, (x, t, y) = random_dit(cfg), inputs(cfg)
    drop = torch.tensor([False, True, False])
    velocity = model.forward_tokens(x, t, y, drop)
    kept = model.forward_tokens(x, t, y)
    null = model.forward_tokens(x, t, model.condition.null.expand_as(y))
    torch.testing.assert_close(velocity, torch.where(drop[:, None, None], null, kept))
    assert not torch.allclose(velocity[1], kept[1], atol=1e-3)


@pytest.mark.parametrize("dropped", [True, False])
def test_every_parameter_has_a_gradient_whether_or_not_the_condition_is_dropped(dropped: bool) -> None:
    model, (x, t, y) = random_dit(WITH_HEAD), inputs(WITH_HEAD)
    model.forward_tokens(x, t, y, torch.full((3,), dropped)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@BOTH
def test_tokens_in_another_order_give_the_same_velocity_at_their_positions(cfg: DiTConfig) -> None:
    model, (x, t, y) = random_dit(cfg), inputs(cfg)
    order = torch.randperm(cfg.num_tokens, generator=torch.Generator().manual_seed(0))
    shuffled = model.forward_tokens(x[:, order], t, y[:, order], positions=order)
    torch.testing.assert_close(shuffled, model.forward_tokens(x, t, y)[:, order])


def test_the_condition_of_a_token_modulates_that_token() -> None:
    model, (x, t, y) = random_dit(CONFIG), inputs(CONFIG)
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)  # tokens no longer see each other
    changed = y.clone()
    changed[:, 4] += 1
    difference = (model.forward_tokens(x, t, changed) - model.forward_tokens(x, t, y)).abs().amax(dim=(0, 2))
    assert difference[4] > 1e-3
    assert difference[[0, 1, 2, 3, 5, 6, 7, 8]].max() == 0


def test_the_activated_condition_is_computed_once_for_all_blocks() -> None:
    model, (x, t, y) = random_dit(CONFIG), inputs(CONFIG)
    seen: list[Tensor] = []
    for layer in [*(block.adaln for block in model.blocks), model.final.adaln]:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.forward_tokens(x, t, y)
    assert len(seen) == 3
    assert all(tensor is seen[0] for tensor in seen)


def test_the_head_is_modulated_by_the_backbone_and_not_by_the_condition() -> None:
    model, (x, t, y) = random_dit(WITH_HEAD), inputs(WITH_HEAD)
    hidden = torch.randn(3, 9, 24)
    model.blocks = nn.ModuleList()
    model.x_embed.register_forward_hook(lambda *_: hidden)
    assert torch.equal(model.forward_tokens(x, t, y), model.forward_tokens(x, 1 - t, y + 1))


@BOTH
def test_a_new_model_predicts_zero(cfg: DiTConfig) -> None:
    x, t, y = inputs(cfg)
    assert DiT(cfg).forward_tokens(x, t, y).count_nonzero() == 0


@BOTH
def test_a_model_built_on_the_meta_device_is_completed_by_init_weights(cfg: DiTConfig) -> None:
    with torch.device("meta"):
        model = DiT(cfg)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.constant_(tensor, float("nan"))
    model.init_weights()
    expected = DiT(cfg)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_constants_are_not_in_the_state_dict() -> None:
    model = DiT(WITH_HEAD)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_attention_is_the_injected_callable() -> None:
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.shape, k.shape, v.shape))
        return v

    DiT(WITH_HEAD, attention).forward_tokens(*inputs(WITH_HEAD))
    assert calls == [((3, 9, 2, 12),) * 3] * 2 + [((3, 9, 2, 16),) * 3]


@BOTH
def test_bfloat16_autocast_keeps_the_residual_stream_in_float32(cfg: DiTConfig) -> None:
    model, (x, t, y) = random_dit(cfg), inputs(cfg)
    expected = model.forward_tokens(x, t, y)
    streams: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model.forward_tokens(x, t, y)
    assert streams == [torch.float32] * 2
    assert (velocity - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_grid_of_another_size_is_refused() -> None:
    x, t, y = inputs(CONFIG)
    with pytest.raises(ValueError, match="latents have 4 tokens but the model's grid is 3 x 3 = 9"):
        DiT(CONFIG).forward_tokens(x[:, :4], t, y[:, :4])


@pytest.mark.parametrize("num_heads", [5, 12])
def test_heads_that_do_not_fit_are_refused_by_the_configuration(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"DiT: hidden_size=24 .*num_heads={num_heads}.*nearest that fits"):
        replace(CONFIG, num_heads=num_heads)
    with pytest.raises(ValueError, match=r"DDT head: hidden_size=2688 .*num_heads=5"):
        DDTHeadConfig(num_heads=5)
