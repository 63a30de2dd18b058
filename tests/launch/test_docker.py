"""`docker run` and compose: what a container needs of the machine."""

from __future__ import annotations

import os
import shlex

import yaml

from rae_scale.launch.docker import Containers, compose, launch
from rae_scale.launch.entry import Entry

CONTAINERS = Containers("rae-scale:1", 4, ("/data:/app/data",), ("/dev/infiniband",), "32g")


def entry(node: int, nodes: int = 2) -> Entry:
    return Entry(("train", "x.yaml"), str(nodes), 4, str(node), "node-0", "29500", restarts=2)


def test_docker_run() -> None:
    (each,) = launch(CONTAINERS, entry(1), {"NCCL_DEBUG": "INFO"}, ["HF_TOKEN"]).commands
    argv = list(each.command.argv)
    options, inner = argv[: argv.index("rae-scale:1")], argv[argv.index("rae-scale:1") + 1 :]
    text = shlex.join(options)
    assert text.startswith("docker run --rm --init --network host --gpus 4 --shm-size 32g")
    for part in (
        "--ulimit memlock=-1 --ulimit stack=67108864",
        "--device /dev/infiniband --cap-add IPC_LOCK",
        f"--user {os.getuid()}:{os.getgid()}",
        "--volume /data:/app/data",
        "--env NCCL_DEBUG=INFO",
        # Docker takes the value from this shell.
        "--env HF_TOKEN",
    ):
        assert part in text
    assert inner[:3] == ["launch", "--with", "torchrun"]
    assert inner[-3:] == ["--", "train", "x.yaml"]


def test_docker_without_gpus() -> None:
    (each,) = launch(Containers("image"), entry(0, 1), {}, []).commands
    assert "--gpus" not in each.command.argv
    assert "--cap-add" not in each.command.argv


def test_compose_is_one_service_per_node() -> None:
    what = compose(CONTAINERS, [entry(0), entry(1)], {"ODD": "$HOME"}, ["HF_TOKEN"], 90)
    assert what.argv[:2] == ("docker", "compose")
    services = yaml.safe_load(what.text)["services"]
    assert list(services) == ["node-0", "node-1"]
    for node, service in enumerate(services.values()):
        assert service["hostname"] == f"node-{node}"
        command = service["command"]
        assert command[command.index("--node-rank") + 1] == str(node)
        assert command[command.index("--master-addr") + 1] == "node-0"
        assert service["environment"] == {"ODD": "$$HOME", "HF_TOKEN": None}
        assert service["stop_grace_period"] == "90s"
        assert service["shm_size"] == "32g"
        assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
        (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert devices["device_ids"] == [str(node * 4 + gpu) for gpu in range(4)]


def test_compose_without_gpus() -> None:
    services = yaml.safe_load(compose(Containers("image"), [entry(0), entry(1)], {}, [], 90).text)["services"]
    assert all("deploy" not in service for service in services.values())
