"""The table between names, against golden files in the official layout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

import awkward

from rae_scale.convert.names import Target, boxes_of_view, padding_boxes, patches_by_name, read_target, table, without
from rae_scale.convert.ours import OurNames
from rae_scale.convert.source import Naming
from rae_scale.models.blocks import SwiGLU
from rae_scale.models.composite import ScaleRAE, load_official_t2i
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.models.official import from_official, to_official
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import CheckpointError
from tests.convert.made import MemorySource, filled
from tests.models.test_composite import Golden, golden, official_model

__all__ = ["golden"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DECODER = ViTDecoderConfig(
    in_channels=6, hidden_size=16, depth=2, num_heads=2, intermediate_size=24, patch_size=2, image_size=6
)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def on_meta(golden: Golden, tied: bool = False) -> ScaleRAE:
    with torch.device("meta"):
        return official_model(golden, tied)


def test_official_names_and_shapes_are_those_of_the_release(golden: Golden) -> None:
    targets = table("official", on_meta(golden))
    assert {target.name: target.shape for target in targets} == {n: tuple(t.shape) for n, t in golden.state.items()}


def test_official_tensors_arrive_where_the_loader_puts_them(golden: Golden) -> None:
    model = official_model(golden)
    load_official_t2i(model, golden.state)
    ours = OurNames(MemorySource("official", golden.state), on_meta(golden))
    expected = parameters(model)
    assert ours.forms["weight"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours.read("weight", name, whole(tensor.shape)), tensor), name


def test_ours_read_as_official_give_the_release_back(golden: Golden) -> None:
    model = official_model(golden)
    load_official_t2i(model, golden.state)
    ours = MemorySource("native", parameters(model))
    for target in table("official", on_meta(golden)):
        found, wanted = read_target(ours, "weight", target, whole(target.shape)), golden.state[target.name]
        exact = target.constant is None
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0 if exact else 1e-6, msg=target.name)


@pytest.mark.parametrize("naming", ["official-decoder", "diffusers-decoder"])
def test_decoders_keep_query_key_and_value_apart(naming: Naming) -> None:
    decoder = filled(ViTDecoder(DECODER))
    assert isinstance(decoder, ViTDecoder)
    ours = MemorySource("native", parameters(decoder))
    theirs = {
        target.name: read_target(ours, "weight", target, whole(target.shape)) for target in table(naming, decoder)
    }
    if naming == "official-decoder":
        expected = to_official(decoder)
        assert theirs.keys() == expected.keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())
        assert from_official(theirs, official_config()).state_dict().keys() == decoder.state_dict().keys()
    assert torch.equal(
        theirs[f"{'decoder.' if naming != 'official-decoder' else ''}decoder_layers.1.{KEY[naming]}.weight"],
        decoder.blocks[1].attn.qkv.weight[16:32],
    )
    back = OurNames(MemorySource(naming, theirs), decoder)
    for name, tensor in parameters(decoder).items():
        assert torch.equal(back.read("weight", name, whole(tensor.shape)), tensor), name


KEY = {"official-decoder": "attention.attention.key", "diffusers-decoder": "attention.to_k"}


def official_config() -> dict[str, int]:
    return {
        "hidden_size": 6,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 24,
        "patch_size": 2,
        "image_size": 6,
    }


@pytest.mark.parametrize(("ddt", "tied"), [(True, True), (False, False)])
def test_each_element_has_one_place_or_is_padding(ddt: bool, tied: bool) -> None:
    model = awkward.scale_rae(ddt=ddt, tied=tied)
    targets = table("official", model)
    padding = padding_boxes(model, targets)
    places = patches_by_name(targets)
    for name, tensor in parameters(model).items():
        count = torch.zeros_like(tensor)
        for box in [*(patch.ours for _, patch in places[name]), *padding.get(name, [])]:
            count[box.slices] += 1
        assert (count == 1).all(), name
        assert all(not tensor[box.slices].any() for box in padding.get(name, []))
    found = sum(box.numel for boxes in padding.values() for box in boxes)
    assert found == sum(part.num_padding_parameters for part in model.modules() if isinstance(part, SwiGLU)) > 0


def test_any_box_of_any_tensor_can_be_read(golden: Golden) -> None:
    """Boxes that cut through gate and value, and through padding."""
    model = awkward.scale_rae()
    ours = MemorySource("native", parameters(model))
    generator = torch.Generator().manual_seed(0)
    theirs = {}
    for target in table("official", model):
        everything = read_target(ours, "weight", target, whole(target.shape))
        theirs[target.name] = everything
        box = random_box(target.shape, generator)
        assert torch.equal(read_target(ours, "weight", target, box), everything[box.slices]), target.name
    back = OurNames(MemorySource("official", theirs), model)
    for name, tensor in parameters(model).items():
        for _ in range(3):
            box = random_box(tuple(tensor.shape), generator)
            assert torch.equal(back.read("weight", name, box), tensor[box.slices]), name


def random_box(shape: tuple[int, ...], generator: torch.Generator) -> Box:
    ends = [sorted(torch.randint(0, length, (2,), generator=generator).tolist()) for length in shape]
    return Box(tuple(first for first, _ in ends), tuple(last + 1 for _, last in ends))


def test_a_tied_output_layer_may_be_left_out_or_spelled_out_but_not_differ(golden: Golden) -> None:
    tied = on_meta(golden, tied=True)
    state = dict(golden.state)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*--config"):
        OurNames(MemorySource("official", state), tied).check()
    for head in ({HEAD: state[EMBEDDING]}, {}):
        rest = {name: tensor for name, tensor in state.items() if name != HEAD}
        ours = OurNames(MemorySource("official", rest | head), tied)
        ours.check()
        assert ours.forms["weight"].keys() == dict(tied.named_parameters()).keys()
    (target,) = [target for target in table("official", tied) if target.name == HEAD]
    assert target.repeats


def test_what_does_not_fit_is_listed(golden: Golden) -> None:
    state = dict(golden.state)
    del state["diff_head.model.dit_blocks.0.mlp.w3.weight"]
    state["model.norm.weight"] = torch.ones(3)
    state["model.vision_tower.weight"] = torch.ones(3)
    state["diff_head.model.pos_embed"] = state["diff_head.model.pos_embed"] + 0.1
    with pytest.raises(CheckpointError) as error:
        OurNames(MemorySource("official", state), on_meta(golden))
    for line in (
        "diff_head.model.dit_blocks.0.mlp.w3.weight .* is missing",
        r"model\.norm\.weight is \[3\] there, .* in this model",
        r"model\.vision_tower\.weight \[3\] is not part of this model",
        r"diff_head\.model\.pos_embed differs from the fixed table",
        "--config",
    ):
        error.match(line)


def test_an_adapter_left_in_the_weights_is_named(golden: Golden) -> None:
    state = {**golden.state, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 3)}
    with pytest.raises(CheckpointError, match="merge the adapter into its weights: --lora"):
        OurNames(MemorySource("official", state), on_meta(golden))


def test_a_bare_language_model_is_a_part_of_ours(golden: Golden) -> None:
    model = official_model(golden)
    llm = {name: tensor.detach() for name, tensor in model.conditioner.llm.named_parameters()}
    ours = OurNames(MemorySource("llm", llm), on_meta(golden))
    assert ours.forms["weight"].keys() == {f"conditioner.llm.{name}" for name in llm}


def test_formats_say_what_they_hold() -> None:
    with pytest.raises(ValueError, match=r"holds a ViT decoder \(stage decoder\), and this is a Linear"):
        table("official-decoder", nn.Linear(2, 2))


def test_a_hole_leaves_the_rest() -> None:
    count = torch.zeros(4, 5, 6)
    for box in without(whole(count.shape), Box((1, 0, 2), (3, 4, 9))):
        count[box.slices] += 1
    hole = torch.zeros(4, 5, 6)
    hole[1:3, 0:4, 2:6] = 1
    assert torch.equal(count, 1 - hole)


def test_views_become_boxes() -> None:
    parameter = torch.empty(6, 4)
    assert boxes_of_view(parameter, parameter[1:3, 1:]) == [Box((1, 1), (3, 4))]
    halves = parameter.unflatten(0, (2, 3))[:, :2]
    assert boxes_of_view(parameter, halves) == [Box((0, 0), (2, 4)), Box((3, 0), (5, 4))]
    with pytest.raises(AssertionError):
        boxes_of_view(parameter, parameter.t())


def test_the_constants_need_no_model_in_memory(golden: Golden) -> None:
    model = on_meta(golden)
    constants: list[Target] = [target for target in table("official", model) if target.constant is not None]
    assert len(constants) == 3
    assert all(parameter.is_meta for parameter in model.parameters())
