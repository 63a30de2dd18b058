"""Every launcher starts the same training on two nodes: bitwise what two processes on one node give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from jobs import Job, Reference, from_the_first, on_each, train
from nodes import Node
from outcome import differences, outcome

pytestmark = pytest.mark.cluster

# Whether one command on the first node starts all of it, and its options.
WAYS = {
    "torchrun": (False, ["--rendezvous", "static"]),
    "torchrun-c10d": (False, ["--rendezvous", "c10d"]),
    "torchrun-ssh": (True, ["--ssh", "openssh"]),
    "deepspeed-no-ssh": (False, ["--with", "deepspeed", "--no-ssh"]),
    "deepspeed-pdsh": (True, ["--with", "deepspeed", "--ssh", "pdsh"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_nodes_give_what_one_gives(
    way: str, nodes: list[Node], configs: Mapping[str, Path], references: Mapping[str, Reference], tmp_path: Path
) -> None:
    engine = "zero" if way.startswith("deepspeed") else "fsdp2"
    run_dir = tmp_path / "run"
    command = train(configs[engine], run_dir)
    from_one, options = WAYS[way]
    commands = from_the_first(nodes, command, tmp_path, *options) if from_one else on_each(nodes, command, *options)
    Job(tmp_path / "output", commands).succeed()
    assert differences(outcome(run_dir), references[engine].outcome) == []
    assert [node.files() for node in nodes] == [[], []]
