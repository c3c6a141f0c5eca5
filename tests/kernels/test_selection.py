"""The choice of an fp8 kernel by shape, on a machine without a GPU."""

from __future__ import annotations

import pytest

from dsv3_plugin.kernels import selection
from dsv3_plugin.kernels.cuda.fp8_gemm import Shape, dense_shapes
from dsv3_plugin.kernels.selection import Row

OWN = ("stream", "gluon", "triton")
ROWS = selection.table().rows
_SHARED_BYTES = 232_448


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.groups} x {row.rows} x {row.columns} x {row.depth}")
def test_the_fastest_serves_what_was_measured(row):
    fastest = min(row.microseconds, key=lambda maker: row.microseconds[maker])
    assert selection.choose(row.groups, row.columns, row.depth, row.rows, ("deep-gemm", *OWN)).maker == fastest


@pytest.mark.parametrize("row", [row for row in ROWS if row.stream], ids=lambda row: str(row.stream))
def test_measured_cuts_are_whole(row):
    """Stages fill the depth, rings have two stages and fit into shared memory."""
    shape = row.shape()
    assert row.depth % (128 * shape.slices) == 0
    assert shape.stages >= 2
    assert shape.shared_bytes(shape.stages) <= _SHARED_BYTES < shape.shared_bytes(shape.stages + 1)


def test_more_tokens_than_measured_rows_take_the_next_row():
    few = selection.choose(0, 24576, 1536, 65, OWN)
    assert few == selection.choose(0, 24576, 1536, 128, OWN)
    assert few != selection.choose(0, 24576, 1536, 64, OWN)
    shape = few.shape
    assert shape is not None and shape.tokens * (shape.cluster if shape.share_weight else 1) == 128


def test_the_stream_kernel_serves_measured_products_only():
    assert selection.choose(256, 4096, 7168, 32, OWN).maker == "stream"
    for groups, columns, depth in ((255, 4096, 7168), (256, 4224, 7168), (256, 4096, 7296), (0, 2104, 7168)):
        choice = selection.choose(groups, columns, depth, 32, OWN)
        assert choice.maker != "stream" and choice.shape is None


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
    assert choose(last.groups, last.columns, last.depth, 4096, OWN).shape == last.shape()
    assert choose(16, last.columns, last.depth, 1, OWN).shape == other.shape()


def test_an_absent_maker_is_not_chosen():
    assert selection.choose(0, 7168, 16384, 4096, ("deep-gemm", *OWN)).maker == "deep-gemm"
    assert selection.choose(0, 7168, 16384, 4096, OWN).maker == "stream"
    assert selection.choose(256, 4096, 7168, 4, ("gluon", "triton")).maker == "triton"


def test_a_table_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="extra"):
        Row(groups=0, columns=1, depth=1, rows=1, microseconds={}, stream={}, colour="red")


@pytest.mark.parametrize("columns", [576, 2112, 7168, 24576, 36864])
def test_tiles_that_are_tried_fit_the_instruction_and_the_memory(columns):
    for rows in (1, 32, 64, 128, 4096):
        for shape in dense_shapes(columns, rows, 132):
            first = 64 * shape.row_blocks * shape.row_groups
            assert 16 <= shape.tile_rows <= (256 if shape.tokens_first else first) and shape.tile_rows % 8 == 0
            assert not shape.tokens_first or shape.tokens == first
            assert shape.filled().stages >= 2


def test_a_tile_of_several_copies_has_one_slice():
    """Twin: the kernel refuses to compile otherwise, so that no table may hold it."""
    for row in ROWS:
        if row.stream:
            shape = row.shape()
            assert shape.slices == 1 or shape.box == shape.tokens
    assert Shape(128, 64, 2, token_box=32).box != 64
