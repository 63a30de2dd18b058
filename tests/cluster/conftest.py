from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
# For the nodes, for `tiny_world`, and for how runs are compared.
sys.path[:0] = [str(HERE), str(HERE.parent / "train"), str(HERE.parent / "soak")]

from jobs import SAVE_EVERY, STEPS, TIMEOUTS, Job, Reference, on_one, train  # noqa: E402
from nodes import Cluster, Node, missing  # noqa: E402
from outcome import outcome  # noqa: E402
from tiny_world import make_world  # noqa: E402
from traced import final_samples  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Two nodes. The test fails if a job that has ended leaves a process on them."""
    with Cluster(tmp_path / "nodes") as nodes:
        yield nodes
        left = {node.name: node.processes() for node in nodes}
        assert not any(left.values()), f"left running: {left}"


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run file for two processes, by engine."""
    folder = tmp_path_factory.mktemp("configs")
    world = make_world(folder)
    paths = {}
    for engine in ("zero", "fsdp2"):
        tree = world.tree(folder / "unused", engine__name=engine, parallel__dp_shard=2)
        tree["run"] |= {"max_steps": STEPS, "save_every": SAVE_EVERY}
        tree["fault"] = TIMEOUTS
        tree["optim"]["ema_decay"] = 0.9
        paths[engine] = folder / f"{engine}.yaml"
        paths[engine].write_text(yaml.safe_dump(tree))
    return paths


class References(dict[str, Reference]):
    """By engine, each made when it is first asked for."""

    def __init__(self, configs: dict[str, Path], folder: Path) -> None:
        super().__init__()
        self.configs, self.folder = configs, folder

    def __missing__(self, engine: str) -> Reference:
        folder = self.folder / engine
        command = train(self.configs[engine], folder / "run")
        with Cluster(folder / "nodes") as nodes:
            Job(folder / "output", on_one(nodes[0], command, processes=2), folder / "traces").succeed()
        self[engine] = Reference(outcome(folder / "run"), final_samples(folder / "traces", 2))
        return self[engine]


@pytest.fixture(scope="session")
def references(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(configs, tmp_path_factory.mktemp("references"))
