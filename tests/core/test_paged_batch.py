"""A step's batch is checked once, and without waiting for a device: what lies there is not read.

Tensors on torch's "meta" device stand for those on a card: whoever reads a number of them raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.mla_attention import require_inputs
from dsv3_plugin.ops.paged_batch import PagedBatch, whole_sequence

TABLE, LENGTHS, STARTS = [[2, 0], [3, 99]], [20, 5], [0, 2, 3]


def two_requests(**changes: Any) -> PagedBatch:
    """Two requests of 20 and 5 tokens, two queries and one, in pages of 16."""
    device = changes.pop("device", "cpu")
    table, lengths, starts = (
        torch.tensor(changes.pop(name, numbers)).to(device)
        for name, numbers in (("block_table", TABLE), ("seq_lens", LENGTHS), ("query_start_loc", STARTS))
    )
    return PagedBatch(table, lengths, starts, **{"num_tokens": 3, "num_blocks": 4, "block_size": 16} | changes)


def test_on_a_cpu_the_numbers_are_read_at_construction() -> None:
    batch = two_requests()
    assert (batch.host_seq_lens, batch.host_query_start_loc) == ((20, 5), (0, 2, 3))
    assert (batch.num_reqs, batch.sizes) == (2, (3, 4, 16))
    assert repr(batch) == "PagedBatch(2 requests, 3 tokens, 2 columns, 4 blocks of 16)"
    with pytest.raises(FrozenInstanceError):
        batch.num_tokens = 2  # type: ignore[misc]


WRONG_NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "page": ({"block_table": [[4, 0], [3, 99]]}, "request 0 of 20 tokens has block 4 at 0, the cache has 4"),
    "negative page": ({"block_table": [[2, -1], [3, 99]]}, "request 0 of 20 tokens has block -1 at 1"),
    "length": ({"seq_lens": [20, 33]}, "request 1 of 33 tokens needs 3 blocks of 16, block_table has 2"),
    "more queries": ({"seq_lens": [1, 5]}, "request 0 has seq_len 1 and 2 queries"),
    "starts": ({"query_start_loc": [0, 4, 3]}, "query_start_loc [0, 4, 3] does not ascend"),
    "first start": ({"query_start_loc": [1, 2, 3]}, "query_start_loc [1, 2, 3] does not ascend"),
    "last start": ({"query_start_loc": [0, 2, 4]}, "query_start_loc ends at 4, there are 3 tokens"),
    "no request's rows": ({"num_tokens": 4}, "query_start_loc ends at 3, there are 4 tokens"),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_a_wrong_number_is_named(name: str) -> None:
    changes, message = WRONG_NUMBERS[name]
    with pytest.raises(InputError, match=f"^PagedBatch: {re.escape(message)}"):
        two_requests(**changes)


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_on_a_device_none_of_them_is_read(name: str) -> None:
    """The twin of the test above: reading one would raise."""
    batch = two_requests(device="meta", **WRONG_NUMBERS[name][0])
    assert batch.host_seq_lens is None and batch.host_query_start_loc is None
    with pytest.raises(RuntimeError, match="meta"):
        batch.read_seq_lens()
    with pytest.raises(RuntimeError, match="meta"):
        batch.read_query_start_loc()


@pytest.mark.parametrize("name", [n for n in WRONG_NUMBERS if "page" not in n and n != "no request's rows"])
def test_what_the_engine_holds_on_the_host_is_checked(name: str) -> None:
    changes, message = WRONG_NUMBERS[name]
    right = {"seq_lens": LENGTHS, "query_start_loc": STARTS}
    copies = {f"host_{name}": tuple(changes.get(name, numbers)) for name, numbers in right.items()}
    with pytest.raises(InputError, match=f"^PagedBatch: {re.escape(message)}"):
        two_requests(device="meta", **copies)


def test_a_graph_s_rows_of_padding_belong_to_no_request() -> None:
    batch = two_requests(device="meta", num_tokens=8, host_query_start_loc=(0, 2, 3))
    assert batch.read_query_start_loc() == (0, 2, 3)


def test_a_request_without_queries_may_have_any_pages_and_any_length() -> None:
    changes: dict[str, Any] = {"block_table": [[2, 0], [99, 99]]}
    two_requests(query_start_loc=[0, 3, 3], **changes)
    two_requests(query_start_loc=[0, 3, 3], seq_lens=[20, 99], **changes)
    with pytest.raises(InputError, match="request 1 of 5 tokens has block 99 at 0"):
        two_requests(**changes)


WRONG_TENSORS: dict[str, tuple[Callable[[PagedBatch], dict[str, Any]], str]] = {
    "table": (lambda b: {"block_table": b.block_table[0]}, "block_table of shape (2,) for seq_lens of shape (2,)"),
    "lengths": (lambda b: {"seq_lens": b.seq_lens[:1]}, "block_table of shape (2, 2) for seq_lens of shape (1,)"),
    "starts": (lambda b: {"query_start_loc": b.query_start_loc[1:]}, "2 seq_lens, query_start_loc of shape (2,)"),
    "table's dtype": (lambda b: {"block_table": b.block_table.float()}, "block_table is torch.float32, expected int"),
    "lengths' dtype": (lambda b: {"seq_lens": b.seq_lens.float()}, "seq_lens is torch.float32, expected int"),
    "starts' dtype": (lambda b: {"query_start_loc": b.query_start_loc.short()}, "query_start_loc is torch.int16"),
    "device": (lambda b: {"block_table": torch.zeros(2, 2).long()}, "block_table is on cpu, seq_lens on meta"),
    "block_size": (lambda b: {"block_size": 0}, "block_size is 0, expected a positive number"),
    "host copy": (lambda b: {"host_query_start_loc": (0, 3)}, "host_query_start_loc is not of 2 requests"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_shapes_dtypes_and_devices_are_checked_everywhere(name: str) -> None:
    batch = two_requests(device="meta")
    change, message = WRONG_TENSORS[name]
    with pytest.raises(InputError, match=f"^PagedBatch: {re.escape(message)}"):
        replace(batch, **change(batch))


def test_a_layer_s_check_reads_nothing_of_a_device() -> None:
    """Of all that attention asks of its arguments, too."""
    batch = two_requests(device="meta")
    q, cache = torch.zeros(3, 2, 40, device="meta"), torch.zeros(4, 16, 40, device="meta")
    require_inputs(q, cache, batch, ALL_KEYS, 1.0)
    require_inputs(q, cache, batch, KeySelection(torch.zeros(3, 7, dtype=torch.int32, device="meta")), 1.0)


def test_a_whole_sequence_is_one_page() -> None:
    batch = whole_sequence(5)
    assert [x.tolist() for x in batch.tensors] == [[[0]], [5], [0, 5]]
    assert batch.sizes == (5, 1, 5)
