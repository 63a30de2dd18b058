"""PyTorch's launcher, started once on every machine."""

from __future__ import annotations

from collections.abc import Mapping

from rae_scale.launch.command import Command, Launch, NodeCommand
from rae_scale.launch.hosts import threads_per_process
from rae_scale.launch.place import Place

# Its own list and SIGUSR1, which batch systems send: without it torchrun dies of that and leaves its processes behind.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def launch(place: Place, environ: Mapping[str, str]) -> Launch:
    """One command per machine; this one starts its own. It restarts nothing: `supervise` does, with a fresh store."""
    commands = tuple(NodeCommand(place.title(node), node_command(place, node, environ)) for node in range(place.nodes))
    return Launch(commands, () if place.node_rank is None else (place.node_rank,))


def node_command(place: Place, node: int, environ: Mapping[str, str]) -> Command:
    where = ["--nnodes", str(place.nodes), "--nproc-per-node", str(place.slots(node))]
    if place.rendezvous == "c10d":
        # Else each agent compares the endpoint with its own names, and where none fits nobody opens the store.
        host = f"is_host={int(node == 0)}"
        endpoint = f"{place.master_addr}:{place.master_port}"
        where += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "rae-scale", "--rdzv-conf", host]
    else:
        first = ["--master-addr", place.master_addr, "--master-port", str(place.master_port)]
        where += ["--node-rank", str(node), *first]
    argv = [place.python, "-m", "torch.distributed.run", *where, "--signals-to-handle", SIGNALS]
    environment = {
        "OMP_NUM_THREADS": threads_per_process(place.slots(node), environ),
        # By itself it kills what has not ended 30 s after a signal, which may be in the middle of a save.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(place.subject.grace_s)),
    }
    return Command((*argv, "-m", "rae_scale", *place.subject.command), {**environment, **place.environment})
