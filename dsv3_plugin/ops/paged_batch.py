"""One step's requests over a paged cache, as attention takes them: checked once, and the same value for every layer.

The numbers lie where the kernels read them: on the device, in a CUDA graph in buffers that stay. Reading them back
would wait for the device, so that is done on a CPU only. Elsewhere what can be seen without it is checked: shapes,
dtypes, and the copies that an engine holds in host memory anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_plugin.ops.checks import require

_NAME = "PagedBatch"


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """The queries of some requests, one request after the other, and the pages of their keys.

    Raises `InputError`, which names the value, where the numbers do not fit each other as far as they can be seen.
    """

    block_table: torch.Tensor
    """int32 or int64 [num_reqs, max_blocks], the blocks of each request in order."""
    seq_lens: torch.Tensor
    """int32 or int64 [num_reqs], tokens of each request, its queries included."""
    query_start_loc: torch.Tensor
    """int32 or int64 [num_reqs + 1], where each request's queries start; from 0."""
    num_tokens: int
    """Rows of queries. In a CUDA graph rows of padding, which belong to no request, may come last."""
    num_blocks: int
    """Of the cache."""
    block_size: int
    """Keys of a block."""
    host_seq_lens: tuple[int, ...] | None = None
    """The same numbers as `seq_lens`, if the engine has them; on a CPU they are read."""
    host_query_start_loc: tuple[int, ...] | None = None
    """The same numbers as `query_start_loc`, if the engine has them; on a CPU they are read."""

    def __post_init__(self) -> None:
        """Check what can be seen."""
        require_tensors(self)
        if self.is_on_cpu:
            object.__setattr__(self, "host_seq_lens", tuple(self.seq_lens.tolist()))
            object.__setattr__(self, "host_query_start_loc", tuple(self.query_start_loc.tolist()))
        require_host_copies(self)
        if self.is_on_cpu:
            require_blocks(self)

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> PagedBatch:
        """The batch of queries [T, ...] over pages [num_blocks, block_size, ...], whose sizes it has."""
        return cls(block_table, seq_lens, query_start_loc, len(q), *pages.shape[:2])

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """block_table, seq_lens, query_start_loc."""
        return self.block_table, self.seq_lens, self.query_start_loc

    @property
    def sizes(self) -> tuple[int, int, int]:
        """num_tokens, num_blocks, block_size."""
        return self.num_tokens, self.num_blocks, self.block_size

    @property
    def num_reqs(self) -> int:
        """Requests, those included that have no queries."""
        return len(self.seq_lens)

    @property
    def device(self) -> torch.device:
        """Where the numbers lie."""
        return self.seq_lens.device

    @property
    def is_on_cpu(self) -> bool:
        """Whether reading a number waits for nothing."""
        return self.device.type == "cpu"

    def read_seq_lens(self) -> tuple[int, ...]:
        """`seq_lens` in host memory; waits for the device if the engine gave no copy."""
        return tuple(self.seq_lens.tolist()) if self.host_seq_lens is None else self.host_seq_lens

    def read_query_start_loc(self) -> tuple[int, ...]:
        """`query_start_loc` in host memory; waits for the device if the engine gave no copy."""
        copy = self.host_query_start_loc
        return tuple(self.query_start_loc.tolist()) if copy is None else copy

    def __repr__(self) -> str:
        """Sizes, not numbers."""
        width = self.block_table.shape[1]
        return (
            f"{_NAME}({self.num_reqs} requests, {self.num_tokens} tokens, {width} columns,"
            f" {self.num_blocks} blocks of {self.block_size})"
        )


def whole_sequence(tokens: int, device: torch.device | None = None) -> PagedBatch:
    """One request without a past: all its `tokens` are queries, and one page holds them."""
    starts = torch.tensor([0, tokens], device=device)
    return PagedBatch(
        block_table=torch.zeros(1, 1, dtype=torch.int64, device=device),
        seq_lens=starts[1:],
        query_start_loc=starts,
        num_tokens=tokens,
        num_blocks=1,
        block_size=tokens,
        host_seq_lens=(tokens,),
        host_query_start_loc=(0, tokens),
    )


def require_tensors(batch: PagedBatch) -> None:
    """Require shapes, dtypes and devices that fit each other."""
    table, lengths, starts = batch.tensors
    require(
        lengths.dim() == 1 and table.dim() == 2 and len(table) == len(lengths),
        _NAME,
        f"block_table of shape {tuple(table.shape)} for seq_lens of shape {tuple(lengths.shape)}",
    )
    require(
        starts.shape == (len(lengths) + 1,),
        _NAME,
        f"{len(lengths)} seq_lens, query_start_loc of shape {tuple(starts.shape)}",
    )
    require(batch.block_size > 0, _NAME, f"block_size is {batch.block_size}, expected a positive number")
    for name, x in zip(("block_table", "seq_lens", "query_start_loc"), batch.tensors, strict=True):
        require(x.dtype in (torch.int32, torch.int64), _NAME, f"{name} is {x.dtype}, expected int32 or int64")
        require(x.device == batch.device, _NAME, f"{name} is on {x.device}, seq_lens on {batch.device}")


def require_host_copies(batch: PagedBatch) -> None:
    """Require starts and lengths that fit each other and the table, as far as there are copies of them."""
    starts, lengths = batch.host_query_start_loc, batch.host_seq_lens
    for name, copy, count in (("seq_lens", lengths, batch.num_reqs), ("query_start_loc", starts, batch.num_reqs + 1)):
        require(copy is None or len(copy) == count, _NAME, f"host_{name} is not of {batch.num_reqs} requests")
    if starts is None:
        return
    ends_well = starts[-1] == batch.num_tokens or (starts[-1] < batch.num_tokens and not batch.is_on_cpu)
    require(ends_well, _NAME, f"query_start_loc ends at {starts[-1]}, there are {batch.num_tokens} tokens")
    ascends = starts[0] == 0 and list(starts) == sorted(starts)
    require(ascends, _NAME, f"query_start_loc {list(starts)} does not ascend from 0")
    if lengths is None:
        return
    width = batch.block_table.shape[1]
    for request, length in enumerate(lengths):
        queries = starts[request + 1] - starts[request]
        if queries == 0:
            continue
        require(length >= queries, _NAME, f"request {request} has seq_len {length} and {queries} queries")
        blocks = -(-length // batch.block_size)
        told = f"request {request} of {length} tokens"
        require(blocks <= width, _NAME, f"{told} needs {blocks} blocks of {batch.block_size}, block_table has {width}")


def require_blocks(batch: PagedBatch) -> None:
    """Require that the cache has the blocks of all requests with queries; reads the tensors."""
    table = batch.block_table
    blocks = ((batch.seq_lens + batch.block_size - 1) // batch.block_size).where(batch.query_start_loc.diff() > 0, 0)
    used = torch.arange(table.shape[1], device=table.device) < blocks[:, None]
    wrong = ((table < 0) | (table >= batch.num_blocks)) & used
    if wrong.any():
        request, number = wrong.nonzero()[0].tolist()
        told = f"request {request} of {int(batch.seq_lens[request])} tokens"
        block = int(table[request, number])
        require(False, _NAME, f"{told} has block {block} at {number}, the cache has {batch.num_blocks}")
