"""The Ray engine: its dealings with Ray on one that is made up, and the real one where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rae_scale.data.build import BuildOptions, build
from rae_scale.data.build.ray_engine import run_ray
from rae_scale.data.build.units import Unit
from rae_scale.data.record import BadSample
from tests.data.build.conftest import SHARD_BYTES, contents

OPTIONS = BuildOptions(shard_bytes=SHARD_BYTES)
UNITS = [Unit(number, f"unit-{number}", Path(f"in-{number}.tar")) for number in range(5)]


class WorkerCrashed(Exception):
    pass


@dataclass(frozen=True, eq=False)
class Reference:
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class MadeUpRay:
    """Runs a task when its result is asked for, the newest first. Tasks in `lost` lose their worker."""

    exceptions = SimpleNamespace(RayError=WorkerCrashed)

    def __init__(self, begun: bool = False, lost: str = "") -> None:
        self.begun, self.lost = begun, lost
        self.calls: list[str] = []
        self.most_at_once = 0

    def is_initialized(self) -> bool:
        return self.begun

    def init(self, **settings: Any) -> None:
        self.calls.append("init")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def put(self, value: Any) -> Any:
        self.calls.append("put")
        return value

    def remote(self, **settings: Any) -> Any:
        assert settings == {"num_cpus": 1, "max_retries": 2}
        return lambda function: SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda *arguments: Reference(name, function, arguments))
        )

    def wait(self, references: list[Reference], num_returns: int) -> tuple[list[Reference], list[Reference]]:
        self.most_at_once = max(self.most_at_once, len(references))
        return references[-1:], references[:-1]

    def get(self, reference: Reference) -> Any:
        if reference.name == self.lost:
            raise WorkerCrashed("the node died")
        return reference.function(*reference.arguments)

    def cancel(self, reference: Reference, force: bool) -> None:
        self.calls.append(f"cancel {reference.name}")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> MadeUpRay:
    made_up = MadeUpRay()
    monkeypatch.setitem(sys.modules, "ray", made_up)
    return made_up


def name_of(unit: Unit) -> str:
    return unit.name


def refuse(unit: Unit) -> str:
    raise BadSample("not", "picklable")


def test_every_unit_is_done_once_and_few_at_a_time(ray: MadeUpRay) -> None:
    found: list[tuple[Unit, str]] = []
    run_ray(name_of, UNITS, 2, lambda unit, result: found.append((unit, result)))
    assert sorted(found, key=lambda pair: pair[0].number) == [(unit, unit.name) for unit in UNITS]
    assert ray.most_at_once == 2
    assert ray.calls == ["init", "put", "shutdown"]


def test_a_cluster_that_is_in_use_stays_up(ray: MadeUpRay) -> None:
    ray.begun = True
    run_ray(name_of, UNITS, 2, lambda unit, result: None)
    assert ray.calls == ["put"]


def test_a_lost_unit_is_named_and_the_others_are_cancelled(ray: MadeUpRay) -> None:
    ray.lost = "unit-1"
    with pytest.raises(ValueError, match=r"unit-1 \(in-1\.tar\): its worker was lost 3 times.*the node died"):
        run_ray(name_of, UNITS, 2, lambda unit, result: None)
    assert ray.calls == ["init", "put", "cancel unit-0", "cancel unit-1", "shutdown"]


def test_an_error_on_the_cluster_arrives_with_its_unit(ray: MadeUpRay) -> None:
    with pytest.raises(ValueError, match="unit-1: not: picklable"):
        run_ray(refuse, UNITS, 2, lambda unit, result: None)


def test_it_writes_the_same_bytes(ray: MadeUpRay, corpus, tmp_path: Path) -> None:
    inputs = corpus(3)
    build(inputs, tmp_path / "straight", OPTIONS)
    build(inputs, tmp_path / "out", OPTIONS, engine="ray", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, corpus, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'rae-scale\[ray\]'"):
        build(corpus(1), tmp_path / "out", engine="ray")


@pytest.mark.long
def test_a_real_cluster_on_this_machine(corpus, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'rae-scale[ray]'")
    inputs = corpus(3)
    build(inputs, tmp_path / "straight", OPTIONS)
    build(inputs, tmp_path / "out", OPTIONS, engine="ray", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
