"""Matrix products on a CPU whose rows do not depend on how many rows there are.

`F.linear` picks its blocking by the number of rows, so one row's bits change with the batch (bf16 from
K = 1024 on, fp32 always). Here every product runs on tiles of exactly `ROWS` rows, the last one padded
with zeros: the library then always sees one shape, and a row's bits depend neither on its place in the tile nor on
its neighbours. Nor may they depend on the number of threads, so a CPU profile runs on one
(fp32 products split K over threads). The tile size is part of the CPU arithmetic: another one gives other bits. So
is the number of columns: a slice of a weight may give other bits than the whole (`slices`).

64 rows, because the library repacks the weight at every call: at 64 x 2048 x 2048 in bf16 a tile of 16 costs 2.5
times the untiled product, 32 costs 1.4, 64 costs 1.0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv3_plugin.errors import InputError

ROWS = 64
# A bf16 product with fp32 output is computed on fp32 copies of the weight, this many output columns at a time: few
# enough that the allocator gives the copies the same memory again (at K = 1024, 8192 columns take twice the time).
COLUMNS = 2048


def pin_one_thread() -> None:
    """Run this process's matrix products on one thread, as the CPU arithmetic requires.

    `torch._C` is called because an engine may have replaced `torch.set_num_threads` by a no-op (vLLM's CPU worker
    does).
    """
    if torch.get_num_threads() != 1:
        torch._C.set_num_threads(1)


def check_one_thread() -> None:
    """Raise `InputError` where matrix products would run on several threads or in reduced precision."""
    if torch.get_num_threads() != 1:
        raise InputError(
            f"torch runs on {torch.get_num_threads()} threads, and fp32 sums depend on that;"
            " set OMP_NUM_THREADS=1 or call torch.set_num_threads(1)"
        )
    if torch.get_float32_matmul_precision() != "highest":
        raise InputError(
            f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()!r};"
            " the CPU arithmetic needs 'highest'"
        )


def tiled_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed, in tiles of `ROWS` rows; both of one dtype, which the result has."""
    check_one_thread()
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(0, weight.shape[0])
    padding = -rows % ROWS
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    tiles = [F.linear(tile, weight) for tile in x.contiguous().split(ROWS)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]


def tiled_linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Like `tiled_linear`, with fp32 sums that are not rounded: operands of any float dtype, fp32 result [M, N]."""
    x = x.float()
    if weight.dtype == torch.float32:
        return tiled_linear(x, weight)
    return torch.cat([tiled_linear(x, columns.float()) for columns in weight.split(COLUMNS)], dim=1)
