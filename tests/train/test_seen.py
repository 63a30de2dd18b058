from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.data.looking.examine import preview_text
from rae_scale.data.looking.sheet import Tile
from rae_scale.data.mds_reader import MDSReader
from rae_scale.train.guard.skipped_data import FILE
from rae_scale.train.seen import tiles_of_step
from tests.train.tiny_world import IMAGE_SIZE, TinyWorld


def positions(tiles: list[Tile]) -> list[int]:
    return [int(tile.labels[0].split()[1].rstrip(",")) for tile in tiles]


def test_a_step_has_the_positions_and_captions_of_its_batch(world: TinyWorld, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run")
    size = config.data.global_batch_size
    tiles = list(tiles_of_step(config, 3, 3))
    assert positions(tiles) == [2 * size, 2 * size + 1, 2 * size + 2]
    reader = MDSReader(world.data)
    for tile in tiles:
        sample = reader[int(tile.labels[1].split(":")[1])]
        assert tile.text == preview_text(sample)
        assert tile.pixels is None or tile.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_data_that_the_run_left_out_moves_later_steps(world: TinyWorld, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run")
    size = config.data.global_batch_size
    (tmp_path / "run").mkdir()
    rollback = {"from_step": 4, "to_step": 2, "first_batch": 2, "end_batch": 4}
    (tmp_path / "run" / FILE).write_text(json.dumps({"rollbacks": [rollback]}))
    assert positions(list(tiles_of_step(config, 2, 1))) == [size]
    assert positions(list(tiles_of_step(config, 3, 1))) == [4 * size]


def test_what_the_stage_cannot_use_is_shown_as_quarantined(world: TinyWorld, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run", data__max_seq_len=12)
    with_problems = [tile for tile in tiles_of_step(config, 1, 1) if tile.problem]
    assert with_problems
    assert "too long" in (with_problems[0].problem or "")


def test_missing_data_are_named(world: TinyWorld, tmp_path: Path) -> None:
    config = world.config(tmp_path, data__sources=[{"path": str(tmp_path / "nothing")}])
    with pytest.raises(ValueError, match="nothing"):
        list(tiles_of_step(config, 1, 1))
