"""What ranks compare of their settings and their code."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_scale.config import Config
from rae_scale.config.schema import RunConfig
from rae_scale.parallel import same
from rae_scale.parallel.same import changed, check_same, code_files, differences, hash_of, odd_ones, settings_of


def test_every_setting_has_its_dotted_name() -> None:
    settings = settings_of(Config())
    assert settings["run.max_steps"] == "30000"
    assert settings["optim.groups.dit.betas"] == "[0.9, 0.95]"
    assert hash_of(settings) == hash_of(settings_of(Config()))
    assert hash_of(settings) != hash_of(settings_of(Config(run=RunConfig(seed=1))))


def test_all_our_source_files_count() -> None:
    files = code_files()
    assert "rae_scale/parallel/same.py" in files
    assert any(name.startswith("rae_kernels/") for name in files)
    assert not any("__pycache__" in name for name in files)


def test_a_changed_file_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_package").mkdir()
    source = tmp_path / "toy_package/__init__.py"
    source.write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(same, "PACKAGES", ("toy_package",))
    before = code_files()
    source.write_text("x = 2\n")
    assert changed(code_files(), before) == "toy_package/__init__.py"


def test_the_minority_is_odd_and_the_first_one_decides_a_tie() -> None:
    assert odd_ones(["a", "b", "a", "c", "b", "a"]) == {"b": [1, 4], "c": [3]}
    assert odd_ones(["a", "b"]) == {"b": [1]}
    assert odd_ones(["a", "a"]) == {}


def test_differences_are_named_up_to_a_few() -> None:
    assert (
        differences({"a": "1", "c": "3"}, {"a": "2", "b": "5", "c": "3"}) == "a=1 (elsewhere 2), b=absent (elsewhere 5)"
    )
    many = {f"s{i}": "1" for i in range(9)}
    assert differences(many, {}).endswith("and 4 more")


def ranks_with(monkeypatch: pytest.MonkeyPatch, others: list[Config], codes: list[str]) -> None:
    """As if `check_same` ran with these ranks, the first of which is this process."""
    settings = [settings_of(config) for config in others]
    files = [{"rae_scale/train/loop.py": code} for code in codes]
    hashes = [(f"node{rank}", hash_of(a), hash_of(b)) for rank, (a, b) in enumerate(zip(settings, files, strict=True))]
    answers = [hashes, list(zip(settings, files, strict=True))]
    monkeypatch.setattr(same.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(same, "gather", lambda _: answers.pop(0))


SEEDS = [Config(run=RunConfig(seed=seed)) for seed in (0, 1)]


def test_equal_ranks_train(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_with(monkeypatch, [Config()] * 3, ["a"] * 3)
    check_same(Config())


def test_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_with(monkeypatch, [SEEDS[0], SEEDS[1], SEEDS[0]], ["a"] * 3)
    with pytest.raises(ValueError, match=r"^rank 1 \(node1\) has other settings than rank 0 \(node0\): run.seed=1 "):
        check_same(Config())


def test_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_with(monkeypatch, [Config()] * 3, ["b", "a", "a"])
    with pytest.raises(ValueError, match=r"^rank 0 \(node0\) has other code than rank 1 \(node1\): rae_scale"):
        check_same(Config())


def test_one_process_asks_nobody() -> None:
    check_same(Config())
