"""Which rows of a step are of prompts: the one rule by which the `two_form` profile chooses a row's form of attention.

A row is a prompt's if its position is below the length of its request's prompt. So its form is the request's affair,
not the schedule's: whether a row comes in a whole prompt, in a chunk, behind others, again after the request was
preempted, or as a draft that is verified, it has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from dsv3_plugin.errors import InputError
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
    """A `PagedBatch` that knows the requests' prompts. Rows of padding are in neither part.

    What is a prompt's decides which kernels are called, so it is told in host memory.
    """

    prompt_lens: tuple[int, ...] = field(kw_only=True)
    """Tokens of each request's prompt."""
    first_positions: tuple[int, ...] = field(kw_only=True)
    """Of each request's first query. Of a request that is beyond its prompt any position that is beyond it, too."""

    def __post_init__(self) -> None:
        """Check what can be seen."""
        super().__post_init__()
        for name, numbers in (("prompt_lens", self.prompt_lens), ("first_positions", self.first_positions)):
            told = f"{name} has {len(numbers)} numbers, there are {self.num_reqs} requests"
            require(len(numbers) == self.num_reqs, _NAME, told)
            require(min(numbers, default=0) >= 0, _NAME, f"{name} {numbers} has a negative number")
        if self.is_on_cpu:
            firsts = (self.seq_lens - self.query_start_loc.diff()).tolist()
            requests = enumerate(zip(self.prompt_counts, firsts, self.first_positions, strict=True))
            for request, (count, first, found) in requests:
                told = f"request {request} begins at position {first}, first_positions has {found}"
                require(not count or first == found, _NAME, told)

    @cached_property
    def prompt_counts(self) -> tuple[int, ...]:
        """How many of each request's queries are of its prompt; they are the first ones."""
        requests = zip(pairwise(self.read_query_start_loc()), self.first_positions, self.prompt_lens, strict=True)
        return tuple(min(max(prompt - first, 0), end - start) for (start, end), first, prompt in requests)

    @property
    def has_prompts(self) -> bool:
        """Whether rows are of prompts: without any the absorbed profile's layer has all bits of `two_form`'s."""
        return any(self.prompt_counts)

    @cached_property
    def prompts(self) -> PromptRows | None:
        """The rows of prompts; None without any."""
        rows, keys = [], []
        starts = self.read_query_start_loc()
        for request, count in enumerate(self.prompt_counts):
            if count:
                rows.append(range(starts[request], starts[request] + count))
                keys.append(self._keys_of(request, self.first_positions[request] + count))
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
            tuple(accumulate(map(len, rows), initial=0)),
        )
        return GeneratedRows(self._joined(rows), batch)

    def _keys_of(self, request: int, count: int) -> torch.Tensor:
        """Where the first `count` keys of a request lie, int64."""
        blocks = self.block_table[request, : -(-count // self.block_size)].long()
        places = torch.arange(self.block_size, device=self.device)
        return (blocks[:, None] * self.block_size + places).flatten()[:count]

    def _joined(self, rows: list[range]) -> torch.Tensor:
        return torch.cat([torch.arange(each.start, each.stop) for each in rows]).to(self.device)

    def _starts(self, counts: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32, device=self.device)


def with_prompts(
    batch: PagedBatch, prompt_lens: Iterable[int], first_positions: Iterable[int] | None = None
) -> PromptBatch:
    """A batch, and its requests' prompts; without `first_positions` its lengths are read, which waits for the device
    unless it has a copy of them. Raises `InputError` where they do not fit each other.
    """
    own = {each.name: getattr(batch, each.name) for each in fields(PagedBatch)}
    if first_positions is None:
        queries = (end - start for start, end in pairwise(batch.read_query_start_loc()))
        first_positions = (length - count for length, count in zip(batch.read_seq_lens(), queries, strict=True))
    return PromptBatch(**own, prompt_lens=tuple(prompt_lens), first_positions=tuple(first_positions))


def of_prompts(batch: PagedBatch) -> PromptBatch:
    """The batch. Raises `InputError` where it does not say which rows are of prompts."""
    if not isinstance(batch, PromptBatch):
        raise InputError(f"{batch}: the two_form profile needs the lengths of the prompts, a PromptBatch")
    return batch


def no_requests(device: torch.device) -> PromptBatch:
    """Of a pass that is nobody's."""
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    batch = PagedBatch(nothing[:0, None], nothing[:0], nothing, 0, 1, 1, (), (0,))
    return with_prompts(batch, ())
