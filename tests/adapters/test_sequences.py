"""A pass's sequences for Megatron's layers: built once, and without reading a device where each row is a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.megatron_backend.documents import with_prompt_lens
from dsv3_plugin.megatron_backend.sequences import Sequences, SequencesOfPass

CPU, META = torch.device("cpu"), torch.device("meta")


def test_rows_and_documents() -> None:
    def numbers(found: Sequences) -> list[object]:
        return [found.positions.tolist(), *(x.tolist() for x in found.batch.tensors), found.batch.sizes]

    of_pass = SequencesOfPass(longest=4)
    rows = [[0, 1, 2, 0, 1, 2], [[0, 1, 2], [3, 4, 5]], [3, 3], [0, 3, 6], (6, 6, 1)]
    assert numbers(of_pass.of(None, 2, 3, CPU)) == rows
    assert numbers(of_pass.of(torch.tensor([0, 3, 6]), 2, 3, CPU)) == rows
    documents = of_pass.of(torch.tensor([0, 2, 3, 6]), 2, 3, CPU)
    # A table's rows are filled up with the last token.
    table = [[0, 1, 2], [2, 3, 4], [3, 4, 5]]
    assert numbers(documents) == [[0, 1, 0, 0, 1, 2], table, [2, 1, 3], [0, 2, 3, 6], (6, 6, 1)]
    with pytest.raises(InputError, match="a sequence of 5 tokens exceeds max_position_embeddings=4"):
        of_pass.of(torch.tensor([0, 5, 6]), 2, 3, CPU)
    with pytest.raises(InputError, match="a sequence of 5 tokens exceeds max_position_embeddings=4"):
        of_pass.of(None, 1, 5, CPU)


@pytest.mark.parametrize(("bounds", "page_size"), [((0, 64, 192), 64), ((0, 96, 192), 32), ((0, 16, 192), 16)])
def test_pages_are_as_large_as_sequences_allow(bounds: tuple[int, ...], page_size: int) -> None:
    """Their tokens are those of pages of one token. Twin: one token more begins no page."""
    of_pass, starts = SequencesOfPass(longest=192), torch.tensor(bounds)
    batch = of_pass.of(starts, 1, 192, CPU).batch
    assert batch.sizes == (192, 192 // page_size, page_size)
    for row, first, length in zip(batch.block_table, bounds, batch.host_seq_lens or (), strict=False):
        tokens = (row[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        assert tokens.tolist() == list(range(first, first + length))
    of_pass.begin()
    assert of_pass.of(starts + torch.tensor([0, 1, 0]), 1, 192, CPU).batch.block_size == 1


def test_the_layers_of_a_pass_share_one_batch() -> None:
    of_pass, starts = SequencesOfPass(longest=8), torch.tensor([0, 2, 6])
    for given in (starts, None):
        of_pass.begin()
        first = of_pass.of(given, 2, 3, CPU)
        assert of_pass.of(given, 2, 3, CPU) is first
    # Of other starts, of another shape and in another pass they are others, also where a tensor was written to.
    assert of_pass.of(starts, 2, 3, CPU) is not first
    assert of_pass.of(None, 3, 2, CPU).batch.num_reqs == 3
    of_pass.of(starts, 2, 3, CPU)
    starts[1] = 4
    of_pass.begin()
    assert of_pass.of(starts, 2, 3, CPU).batch.host_seq_lens == (4, 2)


def test_tokens_are_of_prompts_unless_told_otherwise() -> None:
    of_pass, starts = SequencesOfPass(longest=8), torch.tensor([0, 2, 6])
    for untold in None, starts:
        batch = of_pass.of(untold, 2, 3, CPU).batch
        assert batch.prompt_counts == batch.host_seq_lens and batch.generated is None
    told = with_prompt_lens(starts.int(), [2, 1])
    assert told.dtype == torch.int64
    batch = of_pass.of(told, 2, 3, CPU).batch
    assert batch.prompt_counts == (2, 1) and batch.host_query_start_loc == (0, 2, 6)
    assert batch.prompts is not None and batch.prompts.rows.tolist() == [0, 1, 2]
    assert batch.generated is not None and batch.generated.rows.tolist() == [3, 4, 5]
    with pytest.raises(InputError, match=r"prompt_lens \[3, 1\] are longer than the sequences, of \[2, 4\] tokens"):
        of_pass.of(with_prompt_lens(starts, [3, 1]), 2, 3, CPU)


def test_lengths_of_prompts_are_whole_numbers() -> None:
    """In any list or integer tensor. Twins: what is none is refused by name, and nothing is rounded."""
    starts = torch.tensor([0, 2, 6])
    for lens in [2, 1], (2, 1), range(2, 0, -1), torch.tensor([2, 1]), torch.tensor([2, 1], dtype=torch.int32):
        assert with_prompt_lens(starts, lens).tolist() == [[0, 2, 6], [2, 1, 0]]
    wrong: list[Any] = [[2.0, 1], [2.5, 1], torch.tensor([2.0, 1.0]), [True, True], [[2], [1]], 2, [2, 1, 0], [2, -1]]
    for lens in wrong:
        with pytest.raises(InputError, match=r"^prompt_lens .* are not the lengths of 2 sequences' prompts"):
            with_prompt_lens(starts, lens)
    for lens in ["2", "1"], [2, None], {2: 1}, [2, 2**70]:
        with pytest.raises(InputError, match=r"^prompt_lens .* are no list of whole numbers: "):
            with_prompt_lens(starts, lens)


def test_rows_are_known_without_the_device() -> None:
    of_pass = SequencesOfPass(longest=8)
    found = of_pass.of(None, 2, 3, META)
    assert found.positions.shape == (6,) and found.batch.host_query_start_loc == (0, 3, 6)
    # The twin: starts are read, once a pass.
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        of_pass.of(torch.tensor([0, 3, 6]).to(META), 2, 3, META)
