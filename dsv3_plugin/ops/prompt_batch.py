"""Which rows of a step are of prompts: the one rule by which the `two_form` profile chooses a row's form of attention.

A row is a prompt's if its position is below the length of its request's prompt. So its form is the request's affair,
not the schedule's: whether a row comes in a whole prompt, in a chunk, behind others, again after the request was
preempted, or as a draft that is verified, it has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.paged_batch import PagedBatch

_NAME = "PromptBatch"


class PromptRows(NamedTuple):
    """The rows of prompts, and the keys that they may see, one sequence after the other."""

    rows: torch.Tensor
    """int64 [T], which of the batch's rows."""
    query_starts: torch.Tensor
    """int32 [sequences + 1]."""
    keys: torch.Tensor
    """int64 [K], where each key lies in the cache: block * block_size + place."""
    key_starts: torch.Tensor
    """int32 [sequences + 1]."""


class GeneratedRows(NamedTuple):
    """The other rows, and the batch that they are."""

    rows: torch.Tensor
    """int64 [T], which of the batch's rows."""
    batch: PagedBatch


@dataclass(frozen=True, eq=False)
class PromptBatch(PagedBatch):
    """A `PagedBatch` that knows the requests' prompts. Rows of padding are in neither part."""

    prompt_lens: torch.Tensor = field(kw_only=True)
    """int32 or int64 [num_reqs], tokens of each request's prompt."""
    host_prompt_lens: tuple[int, ...] | None = field(default=None, kw_only=True)
    """The same numbers as `prompt_lens`, if the engine has them; on a CPU they are read."""

    def __post_init__(self) -> None:
        """Check what can be seen."""
        super().__post_init__()
        lengths = self.prompt_lens
        is_right = lengths.shape == self.seq_lens.shape and lengths.dtype in (torch.int32, torch.int64)
        told = f"prompt_lens are {lengths.dtype} of shape {tuple(lengths.shape)}, expected an integer of each request"
        require(is_right, _NAME, told)
        require(lengths.device == self.device, _NAME, f"prompt_lens is on {lengths.device}, seq_lens on {self.device}")
        if self.is_on_cpu:
            object.__setattr__(self, "host_prompt_lens", tuple(lengths.tolist()))
        copy = self.host_prompt_lens
        require(
            copy is None or len(copy) == self.num_reqs, _NAME, f"host_prompt_lens is not of {self.num_reqs} requests"
        )
        require(copy is None or min(copy, default=0) >= 0, _NAME, f"prompt_lens {copy} has a negative number")

    def read_prompt_lens(self) -> tuple[int, ...]:
        """`prompt_lens` in host memory; waits for the device if the engine gave no copy."""
        return tuple(self.prompt_lens.tolist()) if self.host_prompt_lens is None else self.host_prompt_lens

    @cached_property
    def prompt_counts(self) -> tuple[int, ...]:
        """How many of each request's queries are of its prompt; they are the first ones."""
        found = []
        starts, lengths = pairwise(self.read_query_start_loc()), self.read_seq_lens()
        for (start, end), length, prompt in zip(starts, lengths, self.read_prompt_lens(), strict=True):
            first_position = length - (end - start)
            found.append(min(max(prompt - first_position, 0), end - start))
        return tuple(found)

    @cached_property
    def prompts(self) -> PromptRows | None:
        """The rows of prompts; None without any."""
        rows, keys = [], []
        starts, lengths = self.read_query_start_loc(), self.read_seq_lens()
        for request, count in enumerate(self.prompt_counts):
            if count:
                start, end = starts[request : request + 2]
                rows.append(range(start, start + count))
                keys.append(self._keys_of(request, lengths[request] - (end - start) + count))
        if not rows:
            return None
        counts = self._starts(map(len, rows)), self._starts(map(len, keys))
        return PromptRows(self._joined(rows), counts[0], torch.cat(keys), counts[1])

    @cached_property
    def generated(self) -> GeneratedRows | None:
        """The rows of no prompt; None without any."""
        starts = self.read_query_start_loc()
        rows = [range(a + count, b) for (a, b), count in zip(pairwise(starts), self.prompt_counts, strict=True)]
        total = sum(map(len, rows))
        if not total:
            return None
        batch = PagedBatch(
            self.block_table,
            self.seq_lens,
            self._starts(map(len, rows)),
            total,
            self.num_blocks,
            self.block_size,
            self.host_seq_lens,
            tuple(self._starts(map(len, rows), "cpu").tolist()),
        )
        return GeneratedRows(self._joined(rows), batch)

    def _keys_of(self, request: int, count: int) -> torch.Tensor:
        """Where the first `count` keys of a request lie, int64."""
        blocks = self.block_table[request, : -(-count // self.block_size)].long()
        places = torch.arange(self.block_size, device=self.device)
        return (blocks[:, None] * self.block_size + places).flatten()[:count]

    def _joined(self, rows: list[range]) -> torch.Tensor:
        return torch.cat([torch.arange(each.start, each.stop) for each in rows]).to(self.device)

    def _starts(self, counts: Iterable[int], device: torch.device | str | None = None) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0).to(device or self.device, torch.int32)


def with_prompts(
    batch: PagedBatch, prompt_lens: torch.Tensor, host_prompt_lens: tuple[int, ...] | None = None
) -> PromptBatch:
    """A batch, and its requests' prompts. Raises `InputError` where they do not fit each other."""
    own = {each.name: getattr(batch, each.name) for each in fields(PagedBatch)}
    return PromptBatch(**own, prompt_lens=prompt_lens, host_prompt_lens=host_prompt_lens)
