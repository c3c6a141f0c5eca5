"""A row of every operation depends on nothing but itself: not on their number, order, place or neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from bits import FLOATS, SCALE_FORMATS, generator, normal, same_bits

from dsv3_plugin.ops import fp8_linear as fp8
from dsv3_plugin.ops import quantize
from dsv3_plugin.ops.linear import grouped_linear, head_linear, linear
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.router import router_linear
from dsv3_plugin.ops.silu_and_mul import silu_and_mul
from dsv3_plugin.ops.sliced_linear import sliced_linear
from dsv3_plugin.profile import ScaleFormat

Tensor = torch.Tensor


def row_operations(dtype: torch.dtype, columns: int, outputs: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every operation as a function of rows [M, columns] alone."""
    weight = normal(outputs, columns, seed=1, dtype=dtype)
    yield "linear", lambda x: linear(x, weight)
    yield "linear to fp32", lambda x: linear(x, weight, out_dtype=torch.float32)
    yield "sliced_linear", lambda x: sliced_linear(x, weight, 4)
    heads = normal(4, outputs, columns // 4, seed=2, dtype=dtype)
    yield "head_linear", lambda x: head_linear(x.view(len(x), 4, -1), heads).flatten(1)
    yield "grouped_linear", lambda x: grouped_linear(x, torch.tensor([0, len(x)]), torch.stack((weight + 1, weight)))
    norm = normal(columns, seed=3, dtype=dtype)
    yield "rms_norm", lambda x: rms_norm(x, norm, 1e-6)
    yield "silu_and_mul", silu_and_mul
    yield "router_linear", lambda x: router_linear(x, weight)
    for scale_format in SCALE_FORMATS:
        pair = quantize.quantize_weight(weight, scale_format)
        yield f"fp8_linear {scale_format}", partial(quantized_linear, scale_format, *pair)


def quantized_linear(scale_format: ScaleFormat, weight: Tensor, weight_scale: Tensor, x: Tensor) -> Tensor:
    """Both operations of an FP8 projection."""
    return fp8.fp8_linear(*quantize.quantize_fp8(x, scale_format), weight, weight_scale)


OPERATIONS = [name for name, _ in row_operations(torch.float32, 128, 8)]


@pytest.mark.parametrize("columns", [128, 1024, 2048])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_is_independent_of_the_others(name: str, dtype: torch.dtype, columns: int) -> None:
    run = dict(row_operations(dtype, columns, 48))[name]
    x = normal(130, columns, dtype=dtype)
    whole = run(x)
    assert whole.isfinite().all() and whole.std() > 0
    for rows in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129):
        assert same_bits(run(x[:rows]), whole[:rows]), f"the first {rows} rows"
    order = torch.randperm(len(x), generator=generator(4))
    assert same_bits(run(x[order]), whole[order]), "another order"
    assert same_bits(run(x[5:9]), whole[5:9]), "another place in the tile"
    neighbours = torch.full_like(x, torch.nan)
    neighbours[[0, 70]] = x[[0, 70]]
    assert same_bits(run(neighbours)[[0, 70]], whole[[0, 70]]), "NaN neighbours"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_of_rows_gives_the_same_linear(dtype: torch.dtype) -> None:
    for columns in (1024, 2048):
        x, weight = normal(130, columns, dtype=dtype), normal(128, columns, seed=1, dtype=dtype)
        whole = linear(x, weight)
        for rows in range(1, 131):
            assert same_bits(linear(x[:rows], weight), whole[:rows]), f"K = {columns}, {rows} rows"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_librarys_own_product_depends_on_the_number_of_rows(dtype: torch.dtype) -> None:
    """The twin: were this equal, the tests above could not fail, and tiles would be needless."""
    different = []
    for columns in (1024, 2048):
        for outputs in (48, 128):
            x, weight = normal(130, columns, dtype=dtype), normal(outputs, columns, seed=1, dtype=dtype)
            whole = torch.nn.functional.linear(x, weight)
            for rows in (1, 3, 5, 17, 34, 36, 40, 65, 100):
                if not same_bits(torch.nn.functional.linear(x[:rows], weight), whole[:rows]):
                    different.append((columns, outputs, rows))
    print(f"{dtype}: {len(different)} of 36 shapes: (K, N, M) = {different}")
    if dtype == torch.bfloat16 and not different:
        pytest.skip(
            "on this CPU a bf16 product of torch's library has the same bits in any number of rows; without AMX"
        )
    assert different
