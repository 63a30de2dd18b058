"""Judgement on machines, on made-up facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rae_scale.preflight.checks_host import check_hosts, judge_stuck
from rae_scale.preflight.facts import Names
from rae_scale.preflight.files import Cache, Input
from rae_scale.preflight.finding import Finding
from tests.preflight.made_up import GIB, HOST, NEEDS, ROSTER, RUN_DIR, bad, cluster, facts, only

MIB = 1 << 20


def broken(**changes: Any) -> Finding:
    """What is found where something of the second machine is changed."""
    return only(check_hosts(cluster(facts(2, **changes)), ROSTER.machines, NEEDS))


def test_a_cluster_in_order() -> None:
    assert not bad(check_hosts(cluster(), ROSTER.machines, NEEDS))


@pytest.mark.parametrize(
    ("changes", "check", "status", "word"),
    [
        ({"memory_free": 20 * 10**9}, "host-memory", "fail", "2 ranks need 32.0 GB"),
        ({"shm_free": 64 * MIB, "shm_total": 64 * MIB}, "shm", "fail", "0.06 of 0.06 GiB"),
        ({"shm_free": GIB}, "shm", "warn", "1.00 of 500.00 GiB"),
        ({"shm_free": 10 * GIB, "temporary_free": GIB}, "shm", "fail", "1.00 GiB in the folder for temporary"),
        ({"open_files": 256}, "limits", "fail", "256 open files"),
        ({"open_files": 1024}, "limits", "warn", "1024 open files"),
        ({"locked_memory": 8 * MIB}, "limits", "fail", "8 MiB of locked memory"),
    ],
)
def test_a_machine_has_too_little(changes: dict[str, Any], check: str, status: str, word: str) -> None:
    finding = broken(host=replace(HOST, **changes))
    assert (finding.check, finding.status, finding.ranks) == (check, status, (2, 3))
    assert word in finding.value


def test_locked_memory_matters_to_rdma_only() -> None:
    without = facts(2, host=replace(HOST, locked_memory=8 * MIB, infiniband=()))
    assert not bad(check_hosts(cluster(without), ROSTER.machines, NEEDS))


def test_rank_0_needs_files_for_all_ranks() -> None:
    host = replace(HOST, open_files=4096, shm_free=1024 * GIB)
    machines = [list(range(512)), list(range(512, 1024))]
    every = [facts(rank, host=host if rank in (0, 512) else None, run_dir=None) for rank in range(1024)]
    needs = replace(NEEDS, handed_over=0, host=0)
    finding = only(check_hosts(every, machines, needs))
    assert (finding.check, finding.status, finding.ranks[0]) == ("limits", "fail", 0)


@pytest.mark.parametrize(
    ("changes", "check", "word"),
    [
        ({"problem": "Read-only file system (/shared/run)"}, "run-dir", "Read-only"),
        ({"file_system": "tmpfs"}, "run-dir", "memory of this machine"),
        ({"free": 100 * 10**9}, "disk", "3 checkpoints more need 120.0 GB"),
    ],
)
def test_the_run_cannot_be_saved(changes: dict[str, Any], check: str, word: str) -> None:
    finding = broken(run_dir=replace(RUN_DIR, **changes))
    assert (finding.check, finding.status) == (check, "fail")
    assert word in finding.value


def test_checkpoints_that_are_there_have_their_room() -> None:
    resumed = facts(2, run_dir=replace(RUN_DIR, free=50 * 10**9, checkpoints=2))
    assert not bad(check_hosts(cluster(resumed), ROSTER.machines, NEEDS))


def test_checkpoints_for_ever_fill_the_disk() -> None:
    needs = replace(NEEDS, forever=30)
    finding = bad(check_hosts(cluster(), ROSTER.machines, needs))[0]
    assert (finding.check, finding.status) == ("disk", "warn")


def test_what_cannot_be_read() -> None:
    data = broken(inputs=(Input("data.sources[0].path", "/data", problem="no such file"),))
    assert (data.check, data.status, data.ranks) == ("data", "fail", (2, 3))
    weights = broken(inputs=(Input("model.encoder.path", "/weights", problem="Permission denied"),))
    assert (weights.check, weights.status) == ("weights", "fail")
    assert "model.encoder.path='/weights': Permission denied" in weights.value


def test_caches() -> None:
    shared = broken(caches=(Cache("Triton's cache", "/home/me/.triton", "nfs4"),))
    assert (shared.check, shared.status) == ("cache", "warn")
    assert "is on nfs4" in shared.value
    assert broken(caches=(Cache("Triton's cache", "/root/.triton", "ext4", "it cannot be written"),)).status == "fail"


def test_names() -> None:
    loopback = broken(names=Names({}, loopback=True))
    assert (loopback.check, loopback.status) == ("dns", "fail")
    assert "GLOO_SOCKET_IFNAME" in loopback.fix
    told = facts(2, names=Names({}, loopback=True, interface="eth0"))
    assert not bad(check_hosts(cluster(told), ROSTER.machines, NEEDS))
    unknown = broken(names=Names({"node0": "Name or service not known"}, loopback=False))
    assert unknown.status == "warn"
    assert "node0" in unknown.value


def test_one_machine_may_know_itself_as_loopback_and_save_to_memory() -> None:
    alone = facts(0, names=Names({}, loopback=True), run_dir=replace(RUN_DIR, file_system="tmpfs"))
    assert not bad(check_hosts([alone, facts(1)], [[0, 1]], NEEDS))


def test_a_dead_file_server_is_named() -> None:
    finding = only(judge_stuck(cluster(facts(2, stuck={"run-dir": "run-dir did not end within 30 s"}))))
    assert (finding.check, finding.status, finding.ranks) == ("run-dir", "fail", (2,))
