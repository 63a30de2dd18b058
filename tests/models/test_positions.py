from __future__ import annotations

import torch

from rae_scale import ops
from rae_scale.models.positions import rope_2d_tables, sincos_2d


def test_position_table_holds_the_column_in_its_first_half_and_the_row_in_its_second() -> None:
    column, row = sincos_2d(16, grid_size=4).view(4, 4, 16).chunk(2, dim=-1)
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert not torch.equal(column[:, 0], column[:, 1])
    assert not torch.equal(row[0], row[1])


def test_position_table_is_sines_then_cosines() -> None:
    column = sincos_2d(8, grid_size=2)[1, :4]
    angles = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(column, torch.cat([angles.sin(), angles.cos()]))


def test_rotary_scores_depend_only_on_the_offset_between_tokens() -> None:
    grid = 5
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(24, generator=generator).expand(1, grid**2, 24)
    q, k, _ = (x.view(grid, grid, 8) for x in ops.qk_norm_rope(qkv, *rope_2d_tables(8, grid), head_dim=8))
    torch.testing.assert_close(q[0, 0] @ k[1, 2], q[3, 1] @ k[4, 3])
    assert not torch.isclose(q[0, 0] @ k[1, 2], q[0, 0] @ k[2, 1])


def test_rotary_tables_turn_the_first_half_by_row_and_the_second_by_column() -> None:
    _, sin = rope_2d_tables(8, grid_size=3)
    row, column = sin.view(3, 3, 8).chunk(2, dim=-1)
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert torch.equal(column, column[:1].expand_as(column))


def test_tables_are_real_while_a_model_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        tables = [sincos_2d(8, 2), *rope_2d_tables(8, 2)]
    assert {table.device.type for table in tables} == {"cpu"}
