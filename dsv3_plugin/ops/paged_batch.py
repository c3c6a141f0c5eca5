"""What attention asks of a batch over a paged cache, before anything is launched.

Page numbers and lengths stand on the device. Reading them waits for it, so they are read once for all layers: the
tensors checked last are remembered, and the same ones, unchanged, are not read again. While a CUDA graph is captured
nothing can be read; what a replay finds in them is for the engine to keep right.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from dsv3_plugin.ops.checks import require


class Sizes(NamedTuple):
    """What the numbers of a batch have to fit."""

    tokens: int
    num_blocks: int
    block_size: int


class _Checked:
    """A batch's tensors, as they were when they were read."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], sizes: Sizes) -> None:
        self.tensors = [weakref.ref(x) for x in tensors]
        self.state = self._state(tensors, sizes)

    def covers(self, tensors: tuple[torch.Tensor, ...], sizes: Sizes) -> bool:
        """Whether these are the same tensors and nothing was written to them since."""
        same = all(ref() is x for ref, x in zip(self.tensors, tensors, strict=True))
        return same and self.state == self._state(tensors, sizes)

    @staticmethod
    def _state(tensors: tuple[torch.Tensor, ...], sizes: Sizes) -> tuple[object, ...]:
        # Tensors made in inference mode do not count what is written to them.
        return sizes, *(None if x.is_inference() else x._version for x in tensors)


_last: _Checked | None = None


def require_paged_batch(
    op: str,
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
) -> None:
    """Raise `InputError`, which names `op` and the value, unless the arguments of `mla_attention` fit each other."""
    global _last
    require(q.dim() == 3, op, f"q has shape {tuple(q.shape)}, expected [tokens, heads, dim]")
    require(
        latent_cache.dim() == 3 and latent_cache.shape[2] == q.shape[2],
        op,
        f"latent_cache has shape {tuple(latent_cache.shape)}, q has dim {q.shape[2]}",
    )
    require(latent_cache.dtype == q.dtype, op, f"latent_cache is {latent_cache.dtype}, q is {q.dtype}")
    require(scale > 0, op, f"scale is {scale}, expected a positive number")
    requests = len(seq_lens)
    require(
        block_table.dim() == 2 and len(block_table) == requests,
        op,
        f"block_table of shape {tuple(block_table.shape)} for {requests} seq_lens",
    )
    require(len(query_start_loc) == requests + 1, op, f"{requests} seq_lens, {len(query_start_loc)} query_start_loc")
    tensors = block_table, seq_lens, query_start_loc
    for name, x in zip(("block_table", "seq_lens", "query_start_loc"), tensors, strict=True):
        require(x.dtype in (torch.int32, torch.int64), op, f"{name} is {x.dtype}, expected int32 or int64")
        require(x.device == q.device, op, f"{name} is on {x.device}, q is on {q.device}")
    sizes = Sizes(len(q), *latent_cache.shape[:2])
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if _last is None or not _last.covers(tensors, sizes):
        if not _fits(*tensors, sizes):
            _explain(op, block_table.cpu(), seq_lens.cpu(), query_start_loc.cpu(), sizes)
        _last = _Checked(tensors, sizes)


def _fits(block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, sizes: Sizes) -> bool:
    """Whether all numbers do; the device is waited for once."""
    queries = query_start_loc.diff()
    blocks = ((seq_lens + sizes.block_size - 1) // sizes.block_size).where(queries > 0, 0)
    used = torch.arange(block_table.shape[1], device=blocks.device) < blocks[:, None]
    wrong = (
        (query_start_loc[0] != 0)
        | (query_start_loc[-1] != sizes.tokens)
        | (queries < 0).any()
        | ((seq_lens < queries) & (queries > 0)).any()
        | (blocks > block_table.shape[1]).any()
        | (((block_table < 0) | (block_table >= sizes.num_blocks)) & used).any()
    )
    return not wrong.item()


def _explain(
    op: str, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, sizes: Sizes
) -> None:
    """Raise for the first number that does not fit."""
    starts, room = query_start_loc.tolist(), block_table.shape[1]
    require(starts[-1] == sizes.tokens, op, f"query_start_loc ends at {starts[-1]}, q has {sizes.tokens} tokens")
    require(starts[0] == 0 and starts == sorted(starts), op, f"query_start_loc {starts} does not ascend from 0")
    for request, (length, queries) in enumerate(zip(seq_lens.tolist(), query_start_loc.diff().tolist(), strict=True)):
        if queries == 0:
            continue
        require(length >= queries, op, f"request {request} has seq_len {length} and {queries} queries")
        blocks = -(-length // sizes.block_size)
        told = f"request {request} of {length} tokens"
        require(blocks <= room, op, f"{told} needs {blocks} blocks of {sizes.block_size}, block_table has {room}")
        for number, block in enumerate(block_table[request, :blocks].tolist()):
            fits = 0 <= block < sizes.num_blocks
            require(fits, op, f"{told} has block {block} at {number}, latent_cache has {sizes.num_blocks}")
