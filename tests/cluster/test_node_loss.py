"""A node is lost in the middle of training: the other stops in time and says whom it missed, and the same commands go
on from the newest checkpoint as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from jobs import LOST_AFTER, TIMEOUTS, Job, Reference, from_the_first, on_each, train
from nodes import Node
from outcome import differences, outcome

pytestmark = pytest.mark.cluster

MARGIN_S = 10.0


def lose_processes(node: Node) -> None:
    """The kernel kills everything, and tells the other node that its connections are closed."""
    node.kill_processes()


def lose_power(node: Node) -> None:
    """The other node hears nothing at all."""
    node.unplug()
    node.kill_processes()


@pytest.mark.parametrize(("lose", "lost"), [(lose_processes, 1), (lose_power, 1), (lose_power, 0)])
def test_a_lost_node_is_missed_and_the_job_goes_on(
    lose: Callable[[Node], None],
    lost: int,
    nodes: list[Node],
    configs: Mapping[str, Path],
    references: Mapping[str, Reference],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    commands = on_each(nodes, train(configs["fsdp2"], run_dir))
    job = Job(tmp_path / "first", commands)
    job.wait_for_step(LOST_AFTER, run_dir)
    lose(nodes[lost])
    (status,) = job.wait(TIMEOUTS["train_timeout_s"] + MARGIN_S, which=[1 - lost])
    assert status != 0
    assert nodes[1 - lost].processes() == []
    told = job.output(1 - lost)
    assert f"rank {lost} on {nodes[lost].name}" in told or nodes[lost].address in told, told

    nodes[lost].plug_in()
    Job(tmp_path / "second", commands).succeed()
    assert differences(outcome(run_dir), references["fsdp2"].outcome) == []


def test_nodes_that_lose_each_other_both_stop(
    nodes: list[Node], configs: Mapping[str, Path], references: Mapping[str, Reference], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    commands = on_each(nodes, train(configs["fsdp2"], run_dir))
    job = Job(tmp_path / "first", commands)
    job.wait_for_step(LOST_AFTER, run_dir)
    nodes[1].unplug()
    assert all(job.wait(TIMEOUTS["train_timeout_s"] + MARGIN_S))
    assert [node.processes() for node in nodes] == [[], []]

    nodes[1].plug_in()
    Job(tmp_path / "second", commands).succeed()
    assert differences(outcome(run_dir), references["fsdp2"].outcome) == []


def test_the_launcher_brings_a_node_back(
    nodes: list[Node], configs: Mapping[str, Path], references: Mapping[str, Reference], tmp_path: Path
) -> None:
    """As after a reboot: everything on it died, and its sshd answers again. Nobody starts anything."""
    run_dir = tmp_path / "run"
    commands = from_the_first(nodes, train(configs["fsdp2"], run_dir), tmp_path, "--restarts", "3")
    job = Job(tmp_path / "output", commands)
    job.wait_for_step(LOST_AFTER, run_dir)
    nodes[1].kill_processes()
    nodes[1].start_sshd()
    job.succeed()
    assert differences(outcome(run_dir), references["fsdp2"].outcome) == []
    assert "starting again" in job.output()
