"""The sequences of a forward pass as attention takes them: derived once for all layers.

Megatron hands each layer the starts of the sequences, or nothing where each row is one. Without starts all numbers are
known from the shape. Starts are read from the device once a pass; `--recompute-granularity full` computes a layer again
with a copy of them, and reads that.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.ops.paged_batch import PagedBatch


class Sequences(NamedTuple):
    """Whole sequences, one after the other."""

    positions: torch.Tensor
    """int64 [T], of each token in its sequence."""
    batch: PagedBatch
    """All tokens are queries; a block of the cache is one token."""


class SequencesOfPass:
    """Holds those of the pass that runs."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.key: tuple[torch.Tensor | None, int, int, torch.device] | None = None
        self.sequences: Sequences | None = None

    def begin(self) -> None:
        """A new pass, which may have written other starts to the same tensor."""
        self.key = self.sequences = None

    def of(self, starts: torch.Tensor | None, b: int, s: int, device: torch.device) -> Sequences:
        """Of a batch [b, s] on `device`, with integers `starts` [n + 1] of its flattened tokens, or a sequence a row.

        Raises `InputError` where one has more than `longest` tokens.
        """
        key = starts, b, s, device
        if self.sequences is None or self.key is None or not _same(self.key, key):
            self.sequences = whole_sequences(starts, b, s, device, self.longest)
            self.key = key
        return self.sequences


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """The same tensor, and equal sizes."""
    return one[0] is other[0] and one[1:] == other[1:]


def whole_sequences(starts: torch.Tensor | None, b: int, s: int, device: torch.device, longest: int) -> Sequences:
    """See `SequencesOfPass.of`."""
    if starts is None:
        bounds = [row * s for row in range(b + 1)]
        starts = torch.arange(b + 1, device=device) * s
    else:
        bounds = starts.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if max(lengths) > longest:
        raise InputError(f"a sequence of {max(lengths)} tokens exceeds max_position_embeddings={longest}")
    count = bounds[-1]
    tokens = torch.arange(count, device=device)
    counts = starts.diff()
    batch = PagedBatch(
        block_table=(starts[:-1, None] + torch.arange(max(lengths), device=device)).clamp_max(max(count - 1, 0)),
        seq_lens=counts,
        query_start_loc=starts,
        num_tokens=count,
        num_blocks=count,
        block_size=1,
        host_seq_lens=tuple(lengths),
        host_query_start_loc=tuple(bounds),
    )
    return Sequences(tokens - torch.repeat_interleave(starts[:-1], counts, output_size=count), batch)
