"""The shared folder: it draws what the run draws, stands alone, and comes back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rae_scale import RaeScale
from rae_scale.cli.sample import sample
from rae_scale.convert.convert import convert
from rae_scale.convert.decoder_files import to_rae_config
from rae_scale.infer.published import published_config, with_model_path
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.official import to_official
from rae_scale.models.zoo import DECODER_ZOO
from rae_scale.state import latest_checkpoint, read_weights
from tests.infer.trained import Trained

PROMPT = "a red picture"


@pytest.fixture(scope="module")
def shared(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(trained.run, tmp_path_factory.mktemp("hf") / "tiny-model", "hf", verify=True, license="mit").out


def draw(path: Path, **options: object) -> np.ndarray:
    image = RaeScale.from_pretrained(path, device="cpu", **options).generate(PROMPT, seed=5)
    return np.asarray(image)


def test_it_draws_what_the_run_draws_wherever_it_is(shared: Path, trained: Trained, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shared, tmp_path / "elsewhere"))
    for path in moved.rglob("*"):
        assert not path.is_file() or str(trained.run.parent).encode() not in path.read_bytes(), path
    assert np.array_equal(draw(moved), draw(trained.run))
    sample(moved, tmp_path / "one.png", [PROMPT], seed=5, device="cpu")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), draw(trained.run))


def test_it_has_what_the_hub_and_its_reader_look_for(shared: Path) -> None:
    names = {path.relative_to(shared).as_posix() for path in shared.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "manifest.json",
        "README.md",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer/tokenizer.json",
        "decoder/model.safetensors",
        "encoder/model.safetensors",
        "encoder/config.json",
    } <= names
    assert json.loads((shared / "manifest.json").read_text()).keys() == names - {"manifest.json", "README.md"}
    content = json.loads((shared / "config.json").read_text())
    assert content["model_type"] == "rae_scale"
    assert content["weights"]["kind"] == "ema"
    assert content["weights"]["step"] == 1
    assert content["weights"]["xxh3_128"].keys() == {"model-00001-of-00001.safetensors"}
    card = (shared / "README.md").read_text()
    assert "license: mit" in card
    command = "rae-scale convert run/checkpoints/step-00000001 tiny-model --to hf --weights ema --license mit"
    assert command in card


@pytest.mark.parametrize("weights", ["ema", "weight"])
def test_it_comes_back_bit_for_bit(weights: str, trained: Trained, tmp_path: Path) -> None:
    out = convert(trained.run, tmp_path / "hf", "hf", weights=weights).out
    checkpoint = latest_checkpoint(trained.run)
    assert checkpoint is not None
    expected = read_weights(checkpoint, weights)
    for found in (read_weights(out, weights), read_weights(convert(out, tmp_path / "back", "native").out, weights)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_several_files_are_one_model(
    shared: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rae_scale.convert.sinks.shards.__defaults__", (100_000,))
    out = convert(trained.run, tmp_path / "hf", "hf", verify=True).out
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert np.array_equal(draw(out), draw(shared))


def test_settings_come_back_but_for_places(shared: Path, trained: Trained) -> None:
    config = published_config(shared)
    original = RaeScale.from_pretrained(trained.run, device="cpu").pipeline.config
    assert (config.flow, config.sampler, config.optim) == (original.flow, original.sampler, original.optim)
    assert config.model.llm.tokenizer == str(shared / "tokenizer")
    assert config.data.sources[0].path == "data"
    assert config.run.dir == "run"


def test_another_kind_of_weights_is_not_there(shared: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the moving average .*you ask for the raw weights"):
        RaeScale.from_pretrained(shared, weights="raw", device="cpu")


def test_damage_is_found(shared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shared, tmp_path / "copy"))
    path = copy / "decoder" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"decoder/model.safetensors is damaged"):
        RaeScale.from_pretrained(copy, device="cpu")
    shutil.rmtree(copy / "decoder")
    shutil.copytree(shared / "decoder", copy / "decoder")
    (copy / "README.md").write_text("my own words")
    RaeScale.from_pretrained(copy, device="cpu")


def test_half_precision_throughout(trained: Trained, tmp_path: Path) -> None:
    out = convert(trained.run, tmp_path / "half", "hf", dtype="bfloat16", verify=True).out
    for folder in (out, out / "decoder"):
        assert {tensor.dtype for tensor in read_weights(folder).values()} == {torch.bfloat16}
    assert np.abs(draw(out).astype(int) - draw(trained.run)).mean() < 8
    assert np.abs(draw(out, dtype="bfloat16").astype(int) - draw(trained.run)).mean() < 16


def test_a_decoder_of_another_format_is_given(shared: Path, trained: Trained, tmp_path: Path) -> None:
    decoder = convert(trained.decoder, tmp_path / "official", "official-decoder").out
    out = convert(trained.run, tmp_path / "hf", "hf", decoder=decoder).out
    assert np.array_equal(draw(out), draw(shared))


def test_a_decoder_that_does_not_fit_is_refused_before_anything_is_written(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a ScaleRAE, no decoder; give --decoder"):
        convert(trained.run, tmp_path / "hf", "hf", decoder=trained.run)
    with pytest.raises(ValueError, match="of stage decoder, and a shared folder holds a text-to-image model"):
        convert(trained.decoder, tmp_path / "hf", "hf")
    other = tmp_path / "decoder"
    other.mkdir()
    cfg = DECODER_ZOO["vit-tiny"]
    save_file(to_official(ViTDecoder(cfg)), other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(to_rae_config(cfg)))
    with pytest.raises(ValueError, match=r"takes 16 tokens of 64 channels, the model makes 16 of 16"):
        convert(trained.run, tmp_path / "hf", "hf", decoder=other)
    assert list(tmp_path.iterdir()) == [other]


def test_without_a_decoder_one_is_given_on_loading(trained: Trained, shared: Path, tmp_path: Path) -> None:
    pipeline = RaeScale.from_pretrained(trained.run, device="cpu").pipeline
    config = with_model_path(pipeline.config, "decoder", "path", None)
    report = convert(trained.run, tmp_path / "hf", "hf", config=config)
    assert any("no decoder is in the folder" in remark for remark in report.remarks)
    assert not (report.out / "decoder").exists()
    assert 'decoder="DECODER-FOLDER"' in (report.out / "README.md").read_text()
    with pytest.raises(ValueError, match="latents cannot become pictures; give a folder of decoder weights"):
        RaeScale.from_pretrained(report.out, device="cpu")
    assert np.array_equal(draw(report.out, decoder=trained.decoder), draw(shared))


def test_interrupted_while_the_decoder_is_written_it_goes_on(
    trained: Trained, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("rae_scale.convert.convert.verify_written", "rae_scale.convert.sinks.hf.write_manifest"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(name, interrupt)
            convert(trained.run, tmp_path / "hf", "hf", verify=True)
        assert not (tmp_path / "hf").exists()
    report = convert(trained.run, tmp_path / "hf", "hf", verify=True)
    assert "continuing an interrupted conversion" in report.remarks[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert not [path for path in report.out.rglob(".*")]
    assert (report.out / "config.json").read_text() == (shared / "config.json").read_text()
    assert np.array_equal(draw(report.out), draw(shared))
