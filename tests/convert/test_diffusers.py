"""AutoencoderRAE folders, loaded by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rae_scale.convert.convert import convert
from rae_scale.convert.decoder_files import to_rae_config
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.models.official import to_official
from tests.infer.trained import Trained

diffusers = pytest.importorskip("diffusers")

# The published grid, which is the only one that diffusers has right, and otherwise as small as it takes.
CONFIG = ViTDecoderConfig(
    64,
    hidden_size=32,
    depth=2,
    num_heads=2,
    intermediate_size=48,
    patch_size=2,
    image_size=32,
    image_mean=(0.4, 0.5, 0.6),
    image_std=(0.2, 0.3, 0.4),
)


@pytest.fixture(scope="module")
def decoder() -> ViTDecoder:
    torch.manual_seed(0)
    model = ViTDecoder(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def source(decoder: ViTDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    save_file(to_official(decoder), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_rae_config(CONFIG)))
    return folder


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_diffusers_decodes_to_the_same_pixels(
    dtype: str, atol: float, decoder: ViTDecoder, source: Path, tmp_path: Path
) -> None:
    report = convert(source, tmp_path / "out", "diffusers-decoder", dtype=dtype, verify=True)
    assert any("encode() gives NaN" in remark for remark in report.remarks)
    autoencoder, loading = diffusers.AutoencoderRAE.from_pretrained(report.out, output_loading_info=True)
    assert not any(loading.values())
    # diffusers keeps a file's dtype: in bfloat16 the pixel statistics are rounded as well.
    autoencoder.float()
    rounded = ViTDecoder(CONFIG)
    rounded.load_state_dict({name: value.to(getattr(torch, dtype)) for name, value in decoder.state_dict().items()})
    latents = torch.randn(2, 256, 64)
    with torch.no_grad():
        theirs = autoencoder.decode(latents.transpose(1, 2).unflatten(2, (16, 16))).sample.clamp(0, 1)
        ours = rounded.decode(latents)
        assert autoencoder.encode(torch.rand(1, 3, 32, 32)).latent.isnan().all()
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, atol=atol, rtol=0)


def test_it_comes_back_bit_for_bit(decoder: ViTDecoder, source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out", "diffusers-decoder").out
    back = convert(out, tmp_path / "back", "official-decoder", verify=True).out
    found, expected = torch.load(back / "model.pt", weights_only=True), to_official(decoder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((back / "config.json").read_text()) == to_rae_config(CONFIG)


def test_a_folder_that_diffusers_wrote_is_read(decoder: ViTDecoder, source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out", "diffusers-decoder").out
    diffusers.AutoencoderRAE.from_pretrained(out).save_pretrained(tmp_path / "theirs")
    back = convert(tmp_path / "theirs", tmp_path / "back", "official-decoder").out
    expected = to_official(decoder)
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in torch.load(back / "model.pt", weights_only=True).items()
    )


def test_the_demos_grid_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 x 4 tokens: diffusers .* wrong positions"):
        convert(trained.decoder, tmp_path / "out", "diffusers-decoder")
    assert not list(tmp_path.iterdir())
