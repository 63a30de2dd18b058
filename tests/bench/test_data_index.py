from __future__ import annotations

from pathlib import Path

from rae_scale.bench.data_index import measure_here, write_index


def test_a_simulated_index_is_opened_and_resumed_in(tmp_path: Path) -> None:
    write_index(tmp_path, 100_001, 1000)
    found = measure_here(tmp_path, 8)
    assert (found.samples, found.shards) == (100_001, 101)
    assert found.open_s > 0 and found.resume_s > 0 and found.order_s > 0 and found.imports_mb > 1
    assert found.index_mb * 1e6 == (tmp_path / "index.json").stat().st_size
