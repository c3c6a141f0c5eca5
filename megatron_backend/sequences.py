"""The sequences of a forward pass as attention takes them: derived once for all layers.

Megatron hands each layer the starts of the sequences, with the lengths of their prompts if it was told them, or nothing
where each row is one. Without starts all numbers are known from the shape. Starts are read from the device once a pass;
`--recompute-granularity full` computes a layer again with a copy of them, and reads that.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.layers.attend import FAST_PAGE_SIZE
from dsv3_plugin.megatron_backend.documents import require_prompts_fit, row_starts
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.prompt_batch import PromptBatch, with_prompts

PAGE_SIZES = FAST_PAGE_SIZE, 32, 16, 1
"""Tokens of a page, the fastest first."""


class Sequences(NamedTuple):
    """Whole sequences, one after the other."""

    positions: torch.Tensor
    """int64 [T], of each token in its sequence."""
    batch: PromptBatch
    """All tokens are queries. A page is as many of them as begin every sequence at a page, of the sizes below."""


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

        Below the starts may be the lengths of prompts, [2, n + 1] (`with_prompt_lens`). Without them all tokens are of
        prompts, as text that nobody generated is.

        Raises `InputError` where one has more than `longest` tokens, or fewer than its prompt.
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
    told: list[list[int]] = []
    if starts is None:
        bounds = [row * s for row in range(b + 1)]
        starts = row_starts(b, s, device)
    else:
        rows = torch.atleast_2d(starts)
        bounds, *told = rows.tolist()
        starts = rows[0]
    lengths = [end - start for start, end in pairwise(bounds)]
    if max(lengths) > longest:
        raise InputError(f"a sequence of {max(lengths)} tokens exceeds max_position_embeddings={longest}")
    prompt_lens = told[0][:-1] if told else lengths
    require_prompts_fit(prompt_lens, lengths)
    count = bounds[-1]
    tokens = torch.arange(count, device=device)
    counts = starts.diff()
    page_size = next(size for size in PAGE_SIZES if all(bound % size == 0 for bound in bounds))
    pages = torch.arange(-(-max(lengths) // page_size), device=device)
    batch = PagedBatch(
        block_table=(starts[:-1, None] // page_size + pages).clamp_max(max(count // page_size - 1, 0)),
        seq_lens=counts,
        query_start_loc=starts,
        num_tokens=count,
        num_blocks=count // page_size,
        block_size=page_size,
        host_seq_lens=tuple(lengths),
        host_query_start_loc=tuple(bounds),
    )
    positions = tokens - torch.repeat_interleave(starts[:-1], counts, output_size=count)
    return Sequences(positions, with_prompts(batch, prompt_lens))
