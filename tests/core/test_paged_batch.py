"""A batch's page numbers and lengths are read once for all layers, and again when anything about them has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.ops import paged_batch
from dsv3_plugin.ops.paged_batch import require_paged_batch

Q, CACHE = torch.zeros(3, 2, 40), torch.zeros(4, 16, 40)


class Batch:
    """Two requests of 20 and 5 tokens, two queries and one, in pages of 16."""

    def __init__(self) -> None:
        self.block_table = torch.tensor([[2, 0], [3, 99]])
        self.seq_lens = torch.tensor([20, 5])
        self.query_start_loc = torch.tensor([0, 2, 3])

    def check(self, q: torch.Tensor = Q, cache: torch.Tensor = CACHE) -> None:
        require_paged_batch("attend", q, cache, self.block_table, self.seq_lens, self.query_start_loc, 1.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that the numbers are read."""
    seen: list[None] = []
    fits: Callable[..., bool] = paged_batch._fits

    def counted(*args: object) -> bool:
        seen.append(None)
        return fits(*args)

    monkeypatch.setattr(paged_batch, "_fits", counted)
    return seen


def test_the_layers_of_a_step_read_once(reads: list[None]) -> None:
    batch = Batch()
    for _ in range(3):
        batch.check()
    assert len(reads) == 1
    Batch().check()
    assert len(reads) == 2


WRONG: dict[str, tuple[Callable[[Batch], object], str]] = {
    "page": (lambda b: b.block_table[0].fill_(4), "request 0 of 20 tokens has block 4 at 0, latent_cache has 4"),
    "negative page": (lambda b: b.block_table[0, 1].fill_(-1), "request 0 of 20 tokens has block -1 at 1"),
    "length": (lambda b: b.seq_lens[1].fill_(33), "request 1 of 33 tokens needs 3 blocks of 16, block_table has 2"),
    "more queries": (lambda b: b.seq_lens[0].fill_(1), "request 0 has seq_len 1 and 2 queries"),
    "starts": (lambda b: b.query_start_loc[1].fill_(4), r"query_start_loc \[0, 4, 3\] does not ascend"),
    "first start": (lambda b: b.query_start_loc[0].fill_(1), r"query_start_loc \[1, 2, 3\] does not ascend"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_changes_after_it_was_read_is_caught(name: str) -> None:
    batch = Batch()
    batch.check()
    spoil, message = WRONG[name]
    spoil(batch)
    with pytest.raises(InputError, match=f"^attend: {message}"):
        batch.check()
    with pytest.raises(InputError, match=f"^attend: {message}"):  # what was refused is not remembered
        batch.check()


def test_other_sizes_are_read_again() -> None:
    batch = Batch()
    batch.check()
    with pytest.raises(InputError, match="query_start_loc ends at 3, q has 2"):
        batch.check(q=Q[:2])
    with pytest.raises(InputError, match="has block 3 at 0, latent_cache has 3"):
        batch.check(cache=CACHE[:3])


def test_a_request_without_queries_may_have_any_pages() -> None:
    batch = Batch()
    batch.query_start_loc = torch.tensor([0, 3, 3])
    batch.block_table[1] = 99
    batch.check()
    batch.query_start_loc = torch.tensor([0, 2, 3])
    with pytest.raises(InputError, match="request 1 of 5 tokens has block 99 at 0"):
        batch.check()


def test_tensors_of_inference_mode_are_read_once() -> None:
    with torch.inference_mode():
        batch = Batch()
        batch.check()
        batch.check()
        batch.block_table = torch.full((2, 2), 4)
        with pytest.raises(InputError, match="has block 4 at 0"):
            batch.check()


@pytest.mark.parametrize("name", ["block_table", "seq_lens", "query_start_loc"])
def test_numbers_are_integers(name: str) -> None:
    batch = Batch()
    setattr(batch, name, getattr(batch, name).float())
    with pytest.raises(InputError, match=f"attend: {name} is torch.float32, expected int32 or int64"):
        batch.check()


def test_numbers_are_where_q_is() -> None:
    with pytest.raises(InputError, match="block_table is on cpu, q is on meta"):
        Batch().check(q=Q.to("meta"))
