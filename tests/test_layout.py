"""The frame: import order, configs that parse, pins that agree, launchers that are valid shell."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rae_scale.config import load_config, parse_config
from rae_scale.config.load import merge, read_tree, read_yaml
from rae_scale.config.schema import Config
from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.zoo import DECODER_ZOO, DIT_ZOO

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = sorted((ROOT / "configs/run").glob("*.yaml"))
LAUNCHERS = sorted(path for path in (ROOT / "launchers").iterdir() if path.suffix in (".sh", ".sbatch"))
PARTS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "run")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LATENTS = {  # encoder -> channels, tokens, pixels
    "siglip2-so400m": (1152, 256, 224),
    "webssl-l": (1024, 256, 224),
    "flux-vae": (64, 256, 256),
    "siglip-demo": (64, 16, 64),
}
PUBLISHED_SIZES = ("0.5b", "2.4b", "3.1b", "5.5b", "9.8b")


def run_tool(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lower_layers_import_no_higher_ones() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run_tool("-c", f"import sys; sys.path[:0] = ['.', 'kernels']; {command}", "--no-cache")


def test_models_flow_and_ops_are_single_process_code() -> None:
    run_tool("-m", "ruff", "check", "--no-cache", "--select", "TID251", "rae_scale", "kernels")


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_is_a_valid_config(path: Path) -> None:
    config = load_config(path)
    assert config.data.sources, "a run file names its data"
    assert config.run.dir != Config().run.dir, "a run file names its folder"


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_part_is_valid_in_a_run(path: Path) -> None:
    """Also the parts that no run file includes."""
    tree = read_tree(ROOT / "configs/run/pretrain-2.4b.yaml")
    if path.stem == "eager":
        tree["parallel"] = {}
    if path.parent.name == "stage":
        tree.pop("optim")
    merge(tree, read_yaml(path))
    parse_config(tree, origin=str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_names_models_that_fit_together(path: Path) -> None:
    model = Config.model_validate(read_yaml(path)).model
    channels, num_tokens, image_size = LATENTS[model.encoder.name]
    dit = DIT_ZOO[model.name]
    assert (dit.in_channels, dit.grid_size**2) == (channels, num_tokens)
    assert model.llm.name in LLM_ZOO
    if model.encoder.name != "flux-vae":
        decoder = DECODER_ZOO[model.decoder.name]
        assert (decoder.num_tokens, decoder.image_size) == (num_tokens, image_size)


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_published_runs_follow_the_papers_hyperparameters(size: str) -> None:
    """Paper tables 8 and 9."""
    pretrain = load_config(ROOT / f"configs/run/pretrain-{size}.yaml")
    assert (pretrain.data.global_batch_size, pretrain.data.max_seq_len, pretrain.run.max_steps) == (2048, 512, 30_000)
    assert {name: group.lr for name, group in pretrain.optim.groups.items()} == {"llm": 5e-5, "dit": 5e-4}
    assert pretrain.optim.warmup_ratio == 0.0134

    finetune = load_config(ROOT / f"configs/run/finetune-{size}.yaml")
    assert (finetune.data.global_batch_size, finetune.data.max_seq_len) == (1024, 1024)
    assert finetune.run.max_steps == 64 * 60_000 // 1024
    assert {name: group.lr for name, group in finetune.optim.groups.items()} == {"llm": 5.66e-5, "dit": 5.66e-4}
    assert finetune.optim.warmup_ratio == 0.03
    assert finetune.run.init_from == pretrain.run.dir

    for config in (pretrain, finetune):
        assert config.model.name == f"dit-{size}"
        assert config.optim.groups["llm"].betas == (0.9, 0.999)
        assert config.optim.groups["dit"].betas == (0.9, 0.95)
        assert config.optim.schedule == "cosine"
        assert config.optim.max_grad_norm == 1.0
        assert config.flow.flow_weight == 2.0
        assert config.model.class_dropout_prob == 0.1


def test_every_pin_is_inside_the_projects_ranges() -> None:
    asked = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    ranges = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, asked)}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, pin = line.partition("==")
            assert pin, f"{line} is not an exact pin"
            assert pin in ranges.get(name, SpecifierSet()), f"{line} is outside the range in pyproject.toml"


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_are_valid_shell(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if path.name != "common.sh":
        assert path.stat().st_mode & 0o111, "not executable"
        assert "set -euo pipefail" in path.read_text()


def test_comments_in_run_files_start_the_run_that_they_are_in() -> None:
    for path in RUN_FILES:
        for named in re.findall(r"configs/run/[\w.-]+\.yaml", path.read_text()):
            assert ROOT / named == path
