"""The choice of an fp8 kernel by shape, on a machine without a GPU."""

from __future__ import annotations

import math

import pytest

from dsv3_plugin.kernels import selection
from dsv3_plugin.kernels.cuda.fp8_gemm import TileConfig, dense_configs
from dsv3_plugin.kernels.selection import Row

OWN = ("cuda", "gluon", "triton")
ROWS = selection.table().rows
_SHARED_BYTES = 232_448


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.groups} x {row.rows} x {row.columns} x {row.depth}")
def test_the_fastest_serves_what_was_measured(row):
    fastest = min(OWN, key=lambda backend: row.microseconds.get(backend, math.inf))
    choice = selection.choose(row.groups, row.columns, row.depth, row.rows, OWN)
    assert choice == (fastest, row.config() if fastest == "cuda" else None)


@pytest.mark.parametrize("row", [row for row in ROWS if row.tile_config], ids=lambda row: str(row.tile_config))
def test_measured_tile_configurations_are_whole(row):
    """Stages fill the depth, rings have two stages and fit into shared memory."""
    config = row.config()
    assert row.depth % (128 * config.k_blocks) == 0
    assert config.stages >= 2
    assert config.shared_bytes(config.stages) <= _SHARED_BYTES < config.shared_bytes(config.stages + 1)


def test_more_tokens_than_measured_rows_take_the_next_row():
    few = selection.choose(0, 24576, 1536, 65, OWN)
    assert few == selection.choose(0, 24576, 1536, 128, OWN)
    assert few != selection.choose(0, 24576, 1536, 64, OWN)
    config = few.config
    assert config is not None and config.tokens * (config.cluster if config.share_weight else 1) == 128


def test_a_product_that_was_not_measured_takes_the_nearest_row():
    measured = selection.choose(256, 4096, 7168, 32, OWN)
    assert measured.backend == "cuda" and measured.config is not None
    for columns, depth in ((4224, 7168), (4096, 7296)):
        assert selection.choose(256, columns, depth, 32, OWN) == measured
    fewer = selection.choose(128, 4096, 7168, 32, OWN)
    assert fewer == ("cuda", measured.config._replace(groups=128, stages=0).filled())
    assert selection.choose(0, 3584, 16384, 32, OWN) == selection.choose(0, 7168, 16384, 32, OWN)


def test_the_document_is_that_of_the_table():
    """Twin: a row more is another document."""
    table = selection.table()
    assert selection.TABLE.with_name("SELECTION.md").read_text() == table.markdown()
    assert table.model_copy(update={"rows": (*table.rows, table.rows[0])}).markdown() != table.markdown()


def test_a_table_is_read_as_it_was_written(tmp_path):
    selection.table().write(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == selection.TABLE.read_text()
    assert selection.read(tmp_path / "table.json") == selection.table()


def test_experts_of_another_number_do_not_change_the_choice(monkeypatch):
    other = ROWS[-1].model_copy(update={"groups": 16, "rows": 4096})
    monkeypatch.setattr(selection, "table", lambda: selection.Table(card="", rows=(*ROWS, other)))
    choose = selection.choose.__wrapped__
    last = ROWS[-1]
    assert choose(last.groups, last.columns, last.depth, 4096, OWN).config == last.config()
    assert choose(16, last.columns, last.depth, 1, OWN).config == other.config()


def test_an_absent_backend_is_not_chosen():
    assert selection.choose(0, 7168, 16384, 4096, OWN).backend == "cuda"
    assert selection.choose(0, 7168, 16384, 4096, ("gluon", "triton")).backend == "gluon"
    assert selection.choose(256, 4096, 7168, 4, ("gluon", "triton")).backend == "triton"


def test_a_table_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="extra"):
        Row(groups=0, columns=1, depth=1, rows=1, microseconds={}, tile_config={}, colour="red")


@pytest.mark.parametrize("columns", [576, 2112, 7168, 24576, 36864])
def test_tiles_that_are_tried_fit_the_instruction_and_the_memory(columns):
    for rows in (1, 32, 64, 128, 4096):
        for config in dense_configs(columns, rows, 132):
            first = 64 * config.row_blocks * config.row_groups
            assert 16 <= config.tile_rows <= (256 if config.tokens_first else first) and config.tile_rows % 8 == 0
            assert not config.tokens_first or config.tokens == first
            assert config.filled().stages >= 2


def test_a_tile_of_several_copies_has_one_k_block():
    """Twin: the kernel refuses to compile otherwise, so that no table may hold it."""
    for row in ROWS:
        if row.tile_config:
            config = row.config()
            assert config.k_blocks == 1 or config.box == config.tokens
    assert TileConfig(128, 64, 2, token_box=32).box != 64
