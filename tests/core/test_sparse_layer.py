"""A layer with sparse attention needs no engine's help: it runs over the reference's pages, unchanged, with the bits of
one pass over each whole sequence.
"""

from __future__ import annotations

import pytest
import torch
from conftest import TinyCheckpoint
from sparse_layer import LENGTHS, STEPS, Toy, joined, spans, toy

from dsv3_plugin.conformance.testees.reference import Batch, PagedCache
from dsv3_plugin.layers.attend import Attend, Select, WholeSequences, select_all
from dsv3_plugin.ops.paged_batch import PagedBatch

PAGE, WIDTH = 16, 6
# Each sequence's pages, of 20.
BLOCKS = [[7, 2, 19, 0, 11, 5], [3, 17, 1], [9]]


def in_pages(own: Toy) -> list[torch.Tensor]:
    """Each sequence's outputs, by the steps of the reference testee's cache."""
    cache = PagedCache(own.ops, own.config, 1, 20, PAGE)
    table = torch.tensor([blocks + [0] * (WIDTH - len(blocks)) for blocks in BLOCKS])
    outputs = []
    for step in range(len(STEPS) - 1):
        queries = [last - first for first, last in spans(step)]
        positions = torch.cat([torch.arange(*span) for span in spans(step)])
        requests = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(queries))
        slots = table[requests, positions // PAGE] * PAGE + positions % PAGE
        starts = torch.tensor([0, *queries]).cumsum(0)
        paged = PagedBatch(table, torch.tensor(STEPS[step + 1]), starts, len(positions), 20, PAGE)
        cache.batch = Batch(torch.zeros(0), positions, slots, paged)
        outputs.append(own.run(spans(step), cache))
    return joined(outputs)


def dense(attend: Attend) -> Attend:
    """An engine that does not hand the selection on."""

    def forgetful(layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all) -> torch.Tensor:
        return attend(layer_idx, q, cached)

    return forgetful


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pages_and_chunks_change_no_bit_of_a_sparse_layer(dtype: str, tiny_checkpoint: TinyCheckpoint) -> None:
    own = toy(tiny_checkpoint(dtype))
    itself = WholeSequences(own.ops, own.config)

    def alone(i: int, attend: Attend) -> torch.Tensor:
        x = own.x[i]
        return own.layer(x, *own.rotary(torch.arange(len(x))), attend)

    for i, found in enumerate(in_pages(own)):
        assert torch.equal(found, alone(i, itself))
        # The twin: all keys are others from the second token on, which mostly sees one that is not flagged.
        assert not torch.equal(found, alone(i, dense(itself)))
