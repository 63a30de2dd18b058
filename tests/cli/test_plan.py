"""`rae-scale plan`: it prints a plan, a ranking or JSON, writes files, and says what is wrong."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs/run"
SMALL = CONFIGS / "pretrain-0.5b.yaml"
Rae = Callable[..., str]


def test_a_plan_and_its_files(rae: Rae, tmp_path: Path) -> None:
    printed = rae("plan", SMALL, "--micro-batch", 8, "--text-tokens", 400, "--out", tmp_path)
    assert "x 8 samples of 400 tokens" in printed and "images/s" in printed and "to spare" in printed
    assert (tmp_path / "plan.txt").read_text() == printed
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["config"]["data"]["micro_batch_size"] == 8 and data["samples"]["tokens"] == 400
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert gc.isenabled()


def test_json_and_other_hardware(rae: Rae) -> None:
    options = ("--gpu", "a100-40g", "--network", "ethernet-100", "--gpus-per-node", 4, "--json")
    data = json.loads(rae("plan", SMALL, "--micro-batch", 8, *options))
    cluster = data["cluster"]
    assert (cluster["gpu"]["name"], cluster["network"]["name"]) == ("a100-40g", "ethernet-100")
    assert (cluster["gpus"], cluster["gpus_per_node"]) == (8, 4)


def test_loading_and_storage(rae: Rae) -> None:
    plain = json.loads(rae("plan", SMALL, "--micro-batch", 8, "--json"))
    slow = json.loads(rae("plan", SMALL, "--micro-batch", 8, "--loader-rate", 10, "--storage", 1, "--json"))
    assert slow["step"]["images_per_s"] == pytest.approx(10)
    assert slow["duration"]["write"] == pytest.approx(10 * plain["duration"]["write"])


def test_search(rae: Rae, tmp_path: Path) -> None:
    printed = rae("plan", SMALL, "--gpus", 2, "--search", "--top", 2, "--out", tmp_path)
    assert "layouts for pretrain of dit-0.5b on 2 x" in printed and "the first of them: " in printed
    data = json.loads((tmp_path / "search.json").read_text())
    assert len(data["fits"]) == 2
    # What is offered can be pasted.
    best = rae("plan", SMALL, *data["fits"][0]["overrides"], "--gpus", 2, "--json")
    assert json.loads(best)["step"]["images_per_s"] == pytest.approx(data["fits"][0]["images_per_s"])


def test_a_calibration_takes_the_place_of_the_defaults(rae: Rae, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    assert f"written to {file}" in rae("plan", "--calibrate", file, "--small")
    data = json.loads(rae("plan", SMALL, "--micro-batch", 8, "--calibration", file, "--json"))
    assert data["rates"]["source"] == str(file) and data["cluster"]["gpu"]["name"] == "measured"
    named = json.loads(rae("plan", SMALL, "--micro-batch", 8, "--calibration", file, "--gpu", "h200", "--json"))
    assert named["cluster"]["gpu"]["name"] == "h200" and named["rates"] == data["rates"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to plan: give a CONFIG"),
        ((SMALL, "--gpu", "h1000"), "'h1000' is no GPU that the planner knows; choose one of a100-40g, "),
        ((SMALL, "--network", "token-ring"), "'token-ring' is no network that the planner knows; choose one of ib-"),
        ((SMALL, "--gpus", 64), "makes 8 ranks; give parallel.* sizes whose product is 64, or let --search choose"),
        ((SMALL, "--micro-batch", 7), "data.micro_batch_size=7 does not divide the 256 samples of each rank"),
        ((SMALL, "--gpus-per-node", 3), "8 GPUs do not fill nodes of 3"),
        ((SMALL, "--calibration", SMALL), "holds no calibration"),
    ],
)
def test_what_is_wrong(rae: Rae, arguments: tuple[object, ...], said: str) -> None:
    assert said in rae("plan", *arguments, status=2)
