"""What other machines are told of this shell: settings, and no secret."""

from __future__ import annotations

import pytest

from rae_scale.launch.environment import explicit, is_secret, to_other_machines

SHELL = {
    "PATH": "/opt/bin:/usr/bin",
    "PYTHONPATH": "/work",
    "NCCL_IB_HCA": "mlx5",
    "OMP_NUM_THREADS": "8",
    "HF_HOME": "/data/hf",
    "HF_TOKEN": "hf_canary",
    "RAE_KERNELS": "triton",
    "TRITON_CACHE_DIR": "/scratch/triton",
    "TOKENIZERS_PARALLELISM": "false",
    "AWS_SECRET_ACCESS_KEY": "canary",
    "WANDB_API_KEY": "canary",
    "RAE_PROXY": "http://me:canary@proxy:3128",
    "CUDA_VISIBLE_DEVICES": "2,3",
    "EDITOR": "vi",
}


def test_settings_and_paths_go() -> None:
    passed = to_other_machines(SHELL, {})
    assert set(passed.variables) == {
        "PATH",
        "PYTHONPATH",
        "NCCL_IB_HCA",
        "OMP_NUM_THREADS",
        "HF_HOME",
        "RAE_KERNELS",
        "TRITON_CACHE_DIR",
        "TOKENIZERS_PARALLELISM",
    }


def test_secrets_stay_and_are_named() -> None:
    passed = to_other_machines(SHELL, {})
    assert "canary" not in str(passed.variables)
    assert passed.held_back == ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAE_PROXY", "WANDB_API_KEY")


def test_a_secret_goes_when_asked_for() -> None:
    asked = explicit(["HF_TOKEN", "NCCL_IB_HCA=mlx5_1"], SHELL)
    passed = to_other_machines(SHELL, asked)
    assert passed.variables["HF_TOKEN"] == "hf_canary"
    assert passed.variables["NCCL_IB_HCA"] == "mlx5_1"
    assert "HF_TOKEN" not in passed.held_back


def test_paths_of_this_machine_mean_nothing_in_an_image() -> None:
    passed = to_other_machines(SHELL, {}, containers=True)
    assert set(passed.variables) == {"NCCL_IB_HCA", "OMP_NUM_THREADS", "RAE_KERNELS", "TOKENIZERS_PARALLELISM"}


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGINGFACE_TOKEN2", "OPENAI_APIKEY", "DB_PASSWORD", "GITHUB_PAT", "AUTH"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, "x")


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "PATH", "PYTHONPATH", "NCCL_DEBUG", "KEYBOARD", "RAE_TRACEBACK"]
)
def test_names_of_none(name: str) -> None:
    assert not is_secret(name, "/a:/b")


@pytest.mark.parametrize(
    ("setting", "message"),
    [("A-B=1", "write NAME=VALUE"), ("NOT_SET", "not set in this shell"), ("A=1\n2", "several lines")],
)
def test_what_cannot_be_passed(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explicit([setting], {})
