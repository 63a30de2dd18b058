from __future__ import annotations

import pytest
import torch

from rae_scale.models import DDTHeadConfig, DiT, DiTConfig, ViTDecoder, from_official, to_official
from rae_scale.models.official import load_official

NAMES = ["dit_tiny", "ddt_tiny", "decoder_tiny"]


@pytest.mark.parametrize(("name", "kind", "head"), [(NAMES[0], DiT, False), (NAMES[1], DiT, True)])
def test_a_dit_is_told_from_one_with_the_wide_head(golden, name: str, kind: type, head: bool) -> None:
    reference = golden(name)
    model = from_official(reference.part("state."), reference.config)
    assert isinstance(model, kind)
    assert (len(model.head_blocks) == 2) == head
    assert len(model.blocks) == 2


def test_a_decoder_is_told_from_a_dit(golden) -> None:
    reference = golden("decoder_tiny")
    assert isinstance(from_official(reference.part("state."), reference.config), ViTDecoder)


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_back_the_official_state_dict(golden, name: str) -> None:
    reference = golden(name)
    state = reference.part("state.")
    exported = to_official(from_official(state, reference.config))
    assert exported.keys() == state.keys()
    for key, tensor in exported.items():
        # Constant tables are computed here, weights are copied.
        torch.testing.assert_close(tensor, state[key], atol=1e-6 if is_constant(key) else 0, rtol=0)
        assert tensor.is_contiguous()


def is_constant(key: str) -> bool:
    return "pos_embed" in key or "rope" in key


@pytest.mark.parametrize(
    ("name", "prefix", "section"), [("flow_tiny", "", None), ("composite_tiny", "diff_head.model.", "dit")]
)
def test_the_grid_is_read_off_the_position_table_when_the_config_does_not_say(golden, name, prefix, section) -> None:
    reference = golden(name)
    config = reference.config[section] if section else reference.config
    model = from_official(reference.part(f"state.{prefix}"), config)
    assert model.cfg.grid_size == 4


def test_export_and_load_are_inverse_with_padding_and_qk_norm() -> None:
    torch.manual_seed(0)
    head = DDTHeadConfig(hidden_size=16, depth=1, num_heads=2)
    cfg = DiTConfig(8, hidden_size=20, depth=1, num_heads=1, z_channels=12, grid_size=2, qk_norm=True, ddt=head)
    model = DiT(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.init_constants()
    state = to_official(model)
    assert state["dit_blocks.0.mlp.w12.weight"].shape == (2 * 53, 20)
    assert state["dit_blocks.0.attn.q_norm.weight"].shape == (20,)
    config = {"in_channels": 8, "hidden_size": [20, 16], "depth": [1, 1], "num_heads": [1, 2], "z_channels": 12}
    loaded = from_official(state, config)
    assert loaded.cfg == cfg
    for (name, parameter), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_export_is_a_copy() -> None:
    model = DiT(DiTConfig(4, hidden_size=8, depth=1, num_heads=1, z_channels=4, grid_size=2))
    to_official(model)["final_layer.linear.bias"].add_(1)
    assert model.final.linear.bias.count_nonzero() == 0


def test_half_precision_weights_load_into_float32(golden) -> None:
    reference = golden("dit_tiny")
    state = {key: tensor.bfloat16() for key, tensor in reference.part("state.").items()}
    model = from_official(state, reference.config)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.pos_embed[None], reference["state.pos_embed"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dit_tiny", "dit_blocks.1.mlp.w3.weight"),
        ("ddt_tiny", "s_projector.bias"),
        ("decoder_tiny", "decoder_layers.0.attention.attention.key.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_shapes(golden, name: str, key: str) -> None:
    reference = golden(name)
    state = reference.part("state.")
    shape = list(state[key].shape)

    def failure(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(ValueError, match="does not fit its config") as caught:
            from_official(changed, reference.config)
        return str(caught.value)

    missing = failure({other: tensor for other, tensor in state.items() if other != key})
    assert f"{key} {shape} is missing" in missing
    assert "stray [7] is not part of this model" in failure(state | {"stray": torch.zeros(7)})
    reshaped = failure(state | {key: torch.zeros(5, 5)})
    assert f"{key} is [5, 5] in the checkpoint, {shape} in the model" in reshaped


def test_a_refused_state_dict_changes_nothing(golden) -> None:
    reference = golden("dit_tiny")
    state = reference.part("state.")
    model = from_official(state, reference.config)
    changed = {key: tensor + 1 if not is_constant(key) else tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match="stray"):
        load_official(model, changed | {"stray": torch.zeros(1)})
    assert torch.equal(to_official(model)["final_layer.linear.bias"], state["final_layer.linear.bias"])


def test_another_position_table_is_refused(golden) -> None:
    reference = golden("dit_tiny")
    state = reference.part("state.")
    with pytest.raises(ValueError, match="pos_embed differs from the fixed table"):
        from_official(state | {"pos_embed": state["pos_embed"] + 0.1}, reference.config)


@pytest.mark.parametrize(("name", "key"), [("dit_tiny", "z_channels"), ("decoder_tiny", "patch_size")])
def test_a_missing_setting_is_named(golden, name: str, key: str) -> None:
    reference = golden(name)
    config = {other: value for other, value in reference.config.items() if other != key}
    with pytest.raises(ValueError, match=f"has no '{key}'"):
        from_official(reference.part("state."), config)


def test_a_pair_beside_single_values_is_refused(golden) -> None:
    reference = golden("ddt_tiny")
    with pytest.raises(ValueError, match=r"mixes pairs .*'depth': 2"):
        from_official(reference.part("state."), reference.config | {"depth": 2})


def test_a_forgotten_prefix_lists_the_first_keys_only(golden) -> None:
    reference = golden("dit_tiny")
    with pytest.raises(ValueError, match="strip any prefix") as caught:
        from_official(reference.part("") | reference.part("state."), reference.config)
    assert len(str(caught.value).splitlines()) == 23


def test_another_activation_is_refused(golden) -> None:
    reference = golden("decoder_tiny")
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        from_official(reference.part("state."), reference.config | {"hidden_act": "relu"})
