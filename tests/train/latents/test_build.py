"""How the cache comes to be: once, whole, of the settings that were asked for, and again where something is missing."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exact import absent, exact
from tiny_world import SAMPLES, TinyWorld, make_sample, write_shards

from rae_scale.cli.data_latents import latents
from rae_scale.config import Config, dump_config
from rae_scale.data.latents import LatentCache
from rae_scale.data.latents import cache as cache_module
from rae_scale.train import dry_run, train
from rae_scale.train.latents import build, missing
from rae_scale.train.latents.ahead import make_latents

UNITS = SAMPLES // 8


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "UNIT_SAMPLES", 8)
    exact(monkeypatch, bf16=False)


@pytest.fixture
def config(world: TinyWorld, tmp_path: Path) -> Callable[..., Config]:
    def make(dir: str = "cache", dtype: str = "bf16", **changes: Any) -> Config:
        cache = {"dir": str(tmp_path / dir), "dtype": dtype, "batch_size": 3}
        return world.config(tmp_path / "run", run__max_steps=1, data__latent_cache=cache, **changes)

    return make


def units(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def inodes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*.safetensors")}


def test_what_is_made_ahead_is_what_training_takes(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of an encoder with random weights, which come out of the run's seed.
    random = config(model__encoder__path=None, model__name="dit-demo", run__seed=3)
    cache = make_latents(random)
    assert sum(unit.samples for unit in cache.units.values()) == SAMPLES
    assert sum(unit.images for unit in cache.units.values()) == SAMPLES * 9 // 10
    absent(monkeypatch)
    train(random)


def test_what_a_killed_build_has_made_is_not_made_again(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_latents(config("whole"))
    write = build.write_unit

    def killed(path: Path, *args: Any) -> Any:
        if path.name == "00003.safetensors":
            raise KeyboardInterrupt
        return write(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(build, "write_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            make_latents(config())
    before = inodes(tmp_path / "cache")
    assert len(before) == 3
    with pytest.raises(ValueError, match="cannot be read"):
        LatentCache(tmp_path / "cache")
    make_latents(config())
    assert before.items() <= inodes(tmp_path / "cache").items()
    assert units(tmp_path / "cache") == units(tmp_path / "whole")


def test_a_signal_ends_the_build_between_units(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = build.write_unit

    def signalled(path: Path, *args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return write(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(build, "write_unit", signalled)
        train(config())
    assert len(units(tmp_path / "cache")) == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()
    train(config())
    assert len(units(tmp_path / "cache")) == UNITS and (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_gone_or_cut_is_made_anew(
    config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    make_latents(config())
    whole, before = units(tmp_path / "cache"), inodes(tmp_path / "cache")
    path = tmp_path / "cache/source-0/00002.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        make_latents(config())
    assert units(tmp_path / "cache") == whole
    assert before.items() - inodes(tmp_path / "cache").items() <= {
        ("source-0/00002.safetensors", before[f"source-0/{path.name}"])
    }
    assert "1 files are gone or cut" in caplog.text and "8 of 40 samples are to be encoded" in caplog.text


def test_an_index_does_not_outlive_its_units(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made anew may differ in last bits, by another GPU: half of it, and the old hashes would refuse it."""

    def full(path: Path, *args: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    make_latents(config())
    (tmp_path / "cache/source-0/00002.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(build, "write_unit", full)
        with pytest.raises(ValueError, match=r"No space left on device.*source-0/00002.safetensors"):
            make_latents(config())
    assert not (tmp_path / "cache/index.json").exists()
    make_latents(config())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"engine__precision": "bf16"}, "engine.precision was 'fp32', is 'bf16'"),
        ({"dtype": "int8"}, "data.latent_cache.dtype was 'bf16', is 'int8'"),
        ({"data__crop": "center"}, "data.crop was 'square', is 'center'"),
        ({"data__max_pixels": 1000}, "data.max_pixels was 89478485, is 1000"),
    ],
    ids=["precision", "dtype", "crop", "max_pixels"],
)
def test_a_cache_of_other_settings_is_refused(
    config: Callable[..., Config], changes: dict[str, Any], named: str
) -> None:
    make_latents(config())
    with pytest.raises(ValueError, match="holds the latents of other settings") as caught:
        make_latents(config(**changes))
    assert str(caught.value).count("was") == 1 and named in str(caught.value)


def test_a_cache_of_another_encoder_or_of_other_data_is_refused(
    config: Callable[..., Config], world: TinyWorld, tmp_path: Path
) -> None:
    make_latents(config())
    with pytest.raises(
        ValueError, match=r"weights of the encoder was .*(\n.*)*shape of the latents was \[16, 16\], is"
    ):
        make_latents(config(model__encoder__path=None))
    write_shards(tmp_path / "other", [make_sample(number) for number in range(3)])
    sources = [{"path": world.data}, {"path": str(tmp_path / "other")}]
    with pytest.raises(ValueError, match=r"index of data.sources\[1\] was None, is '\w+'"):
        make_latents(config(data__sources=sources))
    # How the sources are mixed is not part of it, nor what is trained.
    make_latents(config(data__sources=[{"path": world.data, "weight": 5}], stage="finetune", data__global_batch_size=4))


def test_without_room_nothing_is_begun(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing, "free_bytes", lambda folder: 12_000)
    with pytest.raises(ValueError, match=r"latents take about 1.79e-05 GB, and 1.2e-05 GB are free.*dtype=int8"):
        make_latents(config())
    assert not (tmp_path / "cache/settings.json").exists()
    make_latents(config(dtype="int8"))  # 320 bytes per image, not 512; 32 samples are looked at


def test_two_do_not_make_it_at_once(config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with missing.locked(tmp_path / "cache"), pytest.raises(ValueError, match="another run is making these latents"):
        make_latents(config())
    make_latents(config())
    with missing.locked(tmp_path / "cache"):
        make_latents(config())  # all there: nothing to lock for


def test_a_folder_that_not_all_machines_share_is_refused(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = build.write_unit

    def elsewhere(path: Path, *args: Any) -> Any:
        entry = write(path, *args)
        if path.name == "00001.safetensors":
            path.unlink()
        return entry

    monkeypatch.setattr(build, "write_unit", elsewhere)
    with pytest.raises(ValueError, match=r"1 files .* not there, source-0/00001.safetensors first.* machines share"):
        make_latents(config())


def test_the_command_says_what_it_has_made(
    config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(config()))
    latents(tmp_path / "run.yaml", [f"data.latent_cache.dir={tmp_path / 'other'}"])
    assert f"{tmp_path / 'other'}: latents of 36 images of 40 samples, 0 unusable, 0.000 GB" in capsys.readouterr().out


def test_a_dry_run_says_what_it_takes(config: Callable[..., Config], tmp_path: Path) -> None:
    online = dry_run(config().model_copy(update={"data": config().data.model_copy(update={"latent_cache": None})}))
    text = dry_run(config())
    assert f"latent cache {tmp_path / 'cache'} (bf16): 512 bytes per image, about 1.79e-05 GB, not complete" in text
    assert not (tmp_path / "cache").exists()
    make_latents(config())
    assert "1.79e-05 GB, complete; no step runs the encoder" in dry_run(config())
    flops = [next(line for line in said.splitlines() if line.startswith("FLOPs per step")) for said in (online, text)]
    assert flops[0] != flops[1]


def test_no_cache_no_latents(config: Callable[..., Config]) -> None:
    bare = config()
    with pytest.raises(ValueError, match=r"data\.latent_cache is not set"):
        make_latents(bare.model_copy(update={"data": bare.data.model_copy(update={"latent_cache": None})}))


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from rae_scale.config import parse_config
from rae_scale.data.latents import cache
from rae_scale.data.latents import unit
cache.UNIT_SAMPLES = 8
from rae_scale.train.latents.ahead import make_latents
from rae_scale.train.latents import build
done, at = [0], {at}
def kill(*args):  # at a system call of the second unit: before or after its bytes, or its name
    done[0] += 1
    if done[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(lambda event, args: kill() if event in ("open", "os.rename") and "source-0" in str(args[0]) else None)
make_latents(parse_config({tree!r}))
"""


@pytest.mark.long
@pytest.mark.parametrize("at", [1, 3, 4, 5, 8])
def test_sigkill(world: TinyWorld, config: Callable[..., Config], tmp_path: Path, at: int) -> None:
    make_latents(config("whole"))
    cache = {"dir": str(tmp_path / "cache"), "batch_size": 3}
    tree = world.tree(tmp_path / "run", data__latent_cache=cache)
    program = KILLED.format(path=sys.path, at=at, tree=tree)
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    make_latents(config())
    whole, found = LatentCache(tmp_path / "whole"), LatentCache(tmp_path / "cache")
    assert found.form == whole.form and found.units.keys() == whole.units.keys()
    assert all(found.latents(0, index).values.shape == (16, 16) for index in range(SAMPLES))
    found.close()
    assert not list((tmp_path / "cache").rglob(".*.tmp"))
