"""A damaged checkpoint is set aside for the one before it, and nothing starts from scratch in silence."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import (
    CheckpointError,
    intact_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from rae_scale.state import recover as recover_module

FAULTS: dict[str, Callable[[Path], None]] = {
    "flipped byte": lambda path: path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1])),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "missing": lambda path: path.unlink(),
}
FILES = ["rank-00000.safetensors", "index.json", "state.json", "manifest.json"]


@pytest.fixture
def root(engine: Engine, mesh: Mesh, tmp_path: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, engine, mesh, {}, keep_last=9)
    return tmp_path / "checkpoints"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", FILES)
def test_the_one_before_is_taken(
    file: str, fault: str, root: Path, mesh: Mesh, build: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    FAULTS[fault](root / "step-00000003" / file)
    found = intact_checkpoint(root.parent, mesh)
    assert found == root / "step-00000002"
    assert names(root) == ["damaged-step-00000003", "latest", "step-00000001", "step-00000002"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert str(root / "step-00000003" / file) in warning
    assert ("missing" in warning or "not exist" in warning) if fault == "missing" else "damaged" in warning
    assert "set aside as damaged-step-00000003" in warning
    # Whoever looks next finds the good one, without a word.
    caplog.clear()
    assert latest_checkpoint(root.parent) == intact_checkpoint(root.parent, mesh) == found
    assert (root / "latest").read_text() == "step-00000002"
    assert not caplog.records
    assert load_checkpoint(found, build(), mesh, verified=True)["step"] == 2


@pytest.mark.parametrize("content", [b"[]", b"3", b"\xff\xfe", b""])
def test_a_manifest_that_is_none(content: bytes, root: Path, mesh: Mesh) -> None:
    (root / "step-00000003" / "manifest.json").write_bytes(content)
    assert intact_checkpoint(root.parent, mesh) == root / "step-00000002"


def test_an_intact_one_is_read_once_and_not_touched(root: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(root)
    looked_at = []
    original = recover_module.damaged_files

    def counting(folder: Path, part: int, parts: int) -> list[str]:
        looked_at.append(folder.name)
        return original(folder, part, parts)

    monkeypatch.setattr(recover_module, "damaged_files", counting)
    assert intact_checkpoint(root.parent, mesh) == root / "step-00000003"
    assert looked_at == ["step-00000003"]
    assert names(root) == before


def test_when_all_are_damaged_each_is_listed_and_no_start_forgets_it(root: Path, mesh: Mesh) -> None:
    for step in (1, 2, 3):
        FAULTS["flipped byte"](root / f"step-0000000{step}" / FILES[0])
    listed = r"no checkpoint in .*\n.*3/rank.*\n.*2/rank.*\n.*1/rank.*set aside as damaged-step-00000001.*\n.*run.dir"
    with pytest.raises(CheckpointError, match=listed):
        intact_checkpoint(root.parent, mesh)
    assert names(root) == [*(f"damaged-step-0000000{step}" for step in (1, 2, 3)), "latest"]
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"damaged-step-00000001 was set aside as damaged earlier"):
            intact_checkpoint(root.parent, mesh)
    # Put back, it counts again.
    shutil.rmtree(root / "damaged-step-00000001")
    (root / "damaged-step-00000002").rename(root / "step-00000002")
    FAULTS["flipped byte"](root / "step-00000002" / FILES[0])
    assert intact_checkpoint(root.parent, mesh) == root / "step-00000002"


def test_those_of_later_steps_can_be_passed_over(root: Path, mesh: Mesh) -> None:
    (root / "step-00000002" / "index.json").unlink()
    assert intact_checkpoint(root.parent, mesh, up_to=2) == root / "step-00000001"
    assert latest_checkpoint(root.parent) == root / "step-00000001"
    assert names(root) == ["damaged-step-00000002", "latest", "step-00000001", "step-00000003"]
    # Damaged or not there: for who asks for an old one that is the same.
    (root / "step-00000001" / "index.json").unlink()
    assert intact_checkpoint(root.parent, mesh, up_to=2) is None
    assert intact_checkpoint(root.parent, mesh, up_to=2) is None


def test_no_checkpoint_is_none(tmp_path: Path, mesh: Mesh) -> None:
    assert intact_checkpoint(tmp_path, mesh) is None
    (tmp_path / "checkpoints").mkdir()
    assert intact_checkpoint(tmp_path, mesh) is None


def test_a_step_that_is_damaged_twice_gets_a_number(root: Path, engine: Engine, mesh: Mesh) -> None:
    for expected in (["damaged-step-00000003"], ["damaged-step-00000003", "damaged-step-00000003-2"]):
        save_checkpoint(root.parent, 3, engine, mesh, {}, keep_last=9)
        FAULTS["truncated"](root / "step-00000003" / "index.json")
        intact_checkpoint(root.parent, mesh)
        assert [name for name in names(root) if name.startswith("damaged")] == expected


def test_what_is_set_aside_is_not_pruned_and_not_counted(root: Path, engine: Engine, mesh: Mesh) -> None:
    FAULTS["missing"](root / "step-00000003" / "state.json")
    intact_checkpoint(root.parent, mesh)
    save_checkpoint(root.parent, 3, engine, mesh, {}, keep_last=2)
    assert names(root) == ["damaged-step-00000003", "latest", "step-00000002", "step-00000003"]


def test_a_pointer_that_is_damaged_points_to_the_newest(root: Path, mesh: Mesh) -> None:
    for content in (b"step-0000", b"", b"\x00\xff", b"../../.."):
        (root / "latest").write_bytes(content)
        assert latest_checkpoint(root.parent) == root / "step-00000003"
        assert intact_checkpoint(root.parent, mesh) == root / "step-00000003"
        assert (root / "latest").read_text() == "step-00000003"


def test_one_that_was_being_replaced_gets_its_name_back(root: Path, mesh: Mesh) -> None:
    old = root / ".step-00000003.old"
    shutil.copytree(root / "step-00000003", old)
    FAULTS["flipped byte"](root / "step-00000003" / FILES[0])
    found = intact_checkpoint(root.parent, mesh)
    assert found == root / "step-00000003"
    assert read_state(found)["step"] == 3
    assert not old.exists()
    assert "damaged-step-00000003" in names(root)


def test_a_disk_that_cannot_be_read_says_nothing_about_the_checkpoint(
    root: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("rae_scale.state.format.file_hash", unreadable)
    with pytest.raises(CheckpointError, match="Input/output error"):
        intact_checkpoint(root.parent, mesh)
    assert "step-00000003" in names(root)
