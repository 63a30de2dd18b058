"""Judgement on what ranks have in common, on made-up facts."""

from __future__ import annotations

from rae_scale.preflight.checks_same import check_same, judge_shared, odd_ranks
from tests.preflight.made_up import ROSTER, VERSIONS, bad, cluster, facts, only


def test_a_cluster_in_order() -> None:
    assert odd_ranks(cluster()) == []
    assert not bad(check_same(cluster(), {}))


def test_settings_that_differ_are_named() -> None:
    every = cluster(facts(2, config="config-b"), facts(3, config="config-b"))
    # Two against two: the first rank decides.
    assert odd_ranks(every) == [0, 2]
    details = {0: ({"run.seed": "0"}, {}), 2: ({"run.seed": "1"}, {})}
    finding = only(check_same(every, details))
    assert (finding.check, finding.status, finding.ranks) == ("config", "fail", (2, 3))
    assert finding.value == "run.seed=1 (elsewhere 0)"


def test_code_that_differs_is_named() -> None:
    every = cluster(facts(0, code="code-b"))
    assert odd_ranks(every) == [1, 0]
    details = {1: ({}, {"rae_scale/a.py": "1"}), 0: ({}, {"rae_scale/a.py": "2"})}
    finding = only(check_same(every, details))
    assert (finding.check, finding.status, finding.ranks) == ("code", "fail", (0,))
    assert finding.value == "rae_scale/a.py"


def test_without_details_hashes_have_to_do() -> None:
    finding = only(check_same(cluster(facts(3, code="code-b")), {}))
    assert finding.value == "code-b, others code-a"


def test_versions() -> None:
    torch = only(check_same(cluster(facts(1, versions=VERSIONS | {"torch": "2.14.0"})), {}))
    assert (torch.check, torch.status, torch.ranks) == ("versions", "fail", (1,))
    assert torch.value == "torch 2.14.0, others 2.15.0"
    python = only(check_same(cluster(facts(1, versions=VERSIONS | {"python": "3.12.1"})), {}))
    assert python.status == "warn"
    missing = only(check_same(cluster(facts(1, versions={"torch": "2.15.0", "python": "3.11.7"})), {}))
    assert missing.value == "nccl none, others 2.30.7"


def test_run_dir_is_shared_by_all_machines() -> None:
    assert not bad(judge_shared({0: "", 2: ""}, "/run", ROSTER.machines))
    finding = only(judge_shared({0: "", 2: "a file that rank 0 wrote is not there"}, "/run", ROSTER.machines))
    assert (finding.check, finding.status, finding.ranks) == ("shared-dir", "fail", (2, 3))
    assert only(judge_shared({0: ""}, "/run", ROSTER.machines)).ranks == (2, 3)
