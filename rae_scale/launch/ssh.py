"""Plain ssh: one connection per machine, which runs `rae-scale launch` there for that machine's processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rae_scale.launch.command import Command, Launch, NodeCommand, StopBy, quote
from rae_scale.launch.environment import to_other_machines
from rae_scale.launch.place import Place

# No questions, for nobody answers; a connection that is dead for a minute ends.
OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")


def launch(place: Place, launcher: str, environ: Mapping[str, str]) -> Launch:
    """All machines' commands are started here. What runs there ends when its connection does."""
    assert place.hostfile is not None
    passed = to_other_machines(environ, place.environment).variables
    commands = []
    for node, host in enumerate(place.hosts):
        there = [
            *(place.python, "-m", "rae_scale", "launch", "--with", launcher, "--no-ssh", "--stop-with-stdin"),
            *("--hostfile", str(place.hostfile.resolve()), "--nodes", str(place.nodes), "--node-rank", str(node)),
            *("--master-addr", place.master_addr, "--master-port", str(place.master_port)),
            *(("--rendezvous", place.rendezvous) if place.rendezvous != "static" else ()),
            *("--processes", str(host.slots), "--", *place.subject.command),
        ]
        setting = [f"{name}={value}" for name, value in passed.items()]
        remote = f"cd {quote([os.fspath(Path.cwd())])} && exec {quote(['env', *setting, *there])}"
        commands.append(NodeCommand(place.title(node), Command(("ssh", *OPTIONS, host.name, remote), {}, StopBy.STDIN)))
    return Launch(tuple(commands), tuple(range(place.nodes)))
