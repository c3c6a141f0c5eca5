"""Attention that reads a stale row: the newest of a request's rows is its oldest."""

from __future__ import annotations

from typing import Any

from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.registry import Ops


def read_stale(ops: Ops) -> None:
    """Make attention do so, for the first request of each pass."""
    attention = ops[mla_attention]

    def stale(q: Any, cache: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        pages = cache.clone()
        block, offset = divmod(int(batch.seq_lens[0]) - 1, batch.block_size)
        pages[batch.block_table[0, block], offset] = cache[batch.block_table[0, 0], 0]
        return attention(q, pages, batch, *args, **kwargs)

    ops.kernels[mla_attention] = stale  # type: ignore[index]
