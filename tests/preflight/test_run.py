"""The whole of it: two gloo ranks in good order, two that differ, and one that waits for the other in vain."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import free_port, run_ranks

from rae_scale.config import Config, load_config
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import Sample
from rae_scale.parallel import same
from rae_scale.preflight import actions, facts, run
from rae_scale.preflight.finding import CHECKS
from rae_scale.preflight.place import own_place
from rae_scale.preflight.run import Options, Outcome, preflight
from rae_scale.train import train

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = ROOT / "configs/run/demo-encoder.yaml"
PLANNED = ["plan", "gpu-memory", "host-memory", "shm", "disk"]
"""Checks for which the run is planned, which takes the longest."""


def config_of(folder: Path, *overrides: str, world_size: int = 2) -> Config:
    return load_config(
        RUN_FILE,
        [
            f"run.dir={folder / 'run'}",
            "run.device=cpu",
            f"data.sources=[{{path: {folder / 'shards'}}}]",
            "model.llm.tokenizer=asset:demo/tokenizer",
            "engine.name=fsdp2",
            f"parallel.dp_shard={world_size}",
            *overrides,
        ],
    )


def look(config: Config, options: Options, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    shown: list[Outcome] = []
    success = preflight(config, options, shown.append, clock)
    return {"success": success, "report": shown[0].to_json() if shown else None}


def look_on_a_rank(folder: str) -> dict[str, Any]:
    """All in one go, on a port each: starting processes takes longer than all of it."""
    config = config_of(Path(folder))
    # A container for tests may have next to no shared memory.
    usual = look(config, Options(seconds=60, skip=["shm"]))
    next_port()
    pairs = look(config, Options(seconds=60, only=["pairs"]))
    next_port()
    odd = look_on_an_odd_rank(Path(folder))
    next_port()
    return {"usual": usual, "pairs": pairs, "odd": odd, "training": train_on_an_odd_rank(Path(folder))}


def next_port() -> None:
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def look_on_an_odd_rank(folder: Path) -> dict[str, Any]:
    """Rank 1 has other settings, other code, a disk of its own and a wrong clock, and is another machine, as far as
    anyone can tell."""
    rank = int(os.environ["RANK"])
    actions.FRESH_SECONDS = 0.5
    if rank == 1:
        changed = same.code_files() | {"rae_scale/train/loop.py": "00"}
        facts.code_files = actions.code_files = lambda: changed
        run.own_place = own_place_elsewhere
    config = config_of(folder, f"run.seed={rank}", f"run.dir={folder}/run-{rank}")
    return look(config, Options(seconds=60, skip=PLANNED), lambda: time.time() + 30 * rank)


def train_on_an_odd_rank(folder: Path) -> str:
    try:
        train(config_of(folder, f"run.seed={os.environ['RANK']}", f"run.dir={folder}/trained"))
    except ValueError as error:
        return str(error)
    return "not refused"


def own_place_elsewhere(*arguments: Any) -> Any:
    return replace(own_place(*arguments), machine="elsewhere", local_rank=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "shards").mkdir()
    writer = MDSWriter(folder / "shards")
    writer.write(Sample("one", b"no picture, but nobody looks", ("a circle",)))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(look_on_a_rank, 2, tmp_path_factory.mktemp("ranks"), args=(str(folder),), timeout=150)


@pytest.mark.dist
def test_two_ranks_in_good_order(folder: Path, ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    found = {finding["check"]: finding for finding in first["usual"]["report"]["findings"]}
    assert first["usual"]["success"], found
    # A rank has only a CPU, and nobody is slow.
    assert set(found) == set(CHECKS) - {"gpu-memory", "gpu-health", "gpu-model", "pairs", "shm"}
    assert all(finding["ranks"] == [0, 1] for name, finding in found.items() if name not in ("plan", "compute"))
    assert second["usual"] == {"success": True, "report": None}, "rank 0 speaks for all"
    assert "GB/s" in found["bandwidth"]["value"]
    checks = [finding["check"] for finding in first["pairs"]["report"]["findings"]]
    assert checks == ["ranks", "pairs"]
    assert list((folder / "run").iterdir()) == [], "nothing is left behind"


@pytest.mark.dist
def test_a_rank_that_differs_is_named(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["odd"] for rank in ranks)
    assert not first["success"]
    assert not second["success"]
    failed = {each["check"]: each for each in first["report"]["findings"] if each["status"] == "fail"}
    assert {check: each["ranks"] for check, each in failed.items() if check != "dns"} == {
        "config": [1],
        "code": [1],
        "shared-dir": [1],
        "clock": [1],
    }
    assert "run.seed=1 (elsewhere 0)" in failed["config"]["value"]
    assert failed["code"]["value"] == "rae_scale/train/loop.py"
    assert "s ahead of the others" in failed["clock"]["value"]
    group = next(each for each in first["report"]["findings"] if each["check"] == "group")
    assert "first mend code, config" in group["why"]


@pytest.mark.dist
def test_training_refuses_what_preflight_would_have_found(ranks: list[dict[str, Any]]) -> None:
    messages = {rank["training"] for rank in ranks}
    assert len(messages) == 1, "all ranks say the same"
    message = messages.pop()
    assert message.startswith("rank 1 (")
    assert "has other settings than rank 0" in message
    assert "run.seed=1 (elsewhere 0)" in message


def set_launcher(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    for name, value in (told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, str(value))


def test_one_rank_never_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, 0, 2)
    started = time.monotonic()
    found = look(config_of(folder), Options(seconds=1))
    assert time.monotonic() - started < 20
    assert not found["success"]
    assert [finding["value"] for finding in found["report"]["findings"]] == [
        "rank 1 of 2 did not come within 1 s (" + found["report"]["machines"][0]["host"] + " runs other ranks)"
    ]


def test_rank_0_never_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, 1, 2)
    found = look(config_of(folder), Options(seconds=1))
    assert not found["success"]
    assert "rank 1 did not find rank 0 within 1 s" in found["report"]["findings"][0]["value"]


def test_alone_it_looks_at_its_own_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    found = look(config_of(folder), Options(skip=["compute", *PLANNED]))
    assert found["success"], found
    ranks = found["report"]["findings"][0]
    assert ranks["value"] == "without a launcher: 1 of 2 looks at its machine only"


def test_a_single_process_that_a_launcher_started_for_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, 0, 1)
    found = look(config_of(folder), Options())
    assert [finding["status"] for finding in found["report"]["findings"]] == ["fail"]


def test_what_the_planner_refuses_is_a_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.preflight.lead.needs_of", refuse)
    found = look(config_of(folder, world_size=1), Options(only=["plan", "disk"]))
    assert [(each["check"], each["value"]) for each in found["report"]["findings"] if each["status"] == "fail"] == [
        ("plan", "21 heads do not divide by 2")
    ]


def refuse(_: Config) -> None:
    raise ValueError("21 heads do not divide by 2")


def test_a_stuck_file_server_does_not_stop_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.preflight.facts.PROBE_SECONDS", 1.0)
    release = threading.Event()
    monkeypatch.setattr("rae_scale.preflight.facts.probe_run_dir", lambda _: release.wait(60))
    found = look(config_of(folder, world_size=1), Options(only=["run-dir", "limits"]))
    release.set()
    status = {finding["check"]: finding["status"] for finding in found["report"]["findings"]}
    assert status["run-dir"] == "fail"
    assert status["limits"] != "fail"


def test_unknown_names_are_refused_before_anything_is_waited_for(folder: Path) -> None:
    with pytest.raises(ValueError, match="--only='dsk'"):
        look(config_of(folder), Options(only=["dsk"]))
    with pytest.raises(ValueError, match="no network that the planner knows"):
        look(config_of(folder), Options(network="carrier-pigeons"))
