"""Finding a CTA's rows: experts' or requests' rows lie one after the other, and each takes whole tiles."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_group(counts, tile, GROUPS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr):
    """The group that owns tile number `tile` when each takes ceil(count / TILE) tiles; counts are integers [GROUPS].

    Returns (group, its first row, its rows, the tile's number in it); group is GROUPS for a tile behind the last.
    """
    index = tl.arange(0, PADDED)
    count = tl.load(counts + index, mask=index < GROUPS, other=0).to(tl.int32)
    tiles = (count + TILE - 1) // TILE
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = index < group
    first_row = tl.sum(tl.where(before, count, 0), 0)
    rows = tl.sum(tl.where(index == group, count, 0), 0)
    return tl.minimum(group, GROUPS), first_row, rows, tile - tl.sum(tl.where(before, tiles, 0), 0)
