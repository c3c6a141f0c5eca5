"""The products of matrices: one row tile, one product an expert or a head, sums in fp32 on one thread."""

from __future__ import annotations

import pytest
import torch
from bits import FLOATS, normal, same_bits

from dsv3_plugin.errors import InputError
from dsv3_plugin.ops import tile
from dsv3_plugin.ops.linear import grouped_linear, head_linear, linear


def test_another_tile_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile is part of the arithmetic: a row of an fp32 product of 64 rows is not one of itself. (In bf16 that
    depends on the CPU.)
    """
    x, weight = normal(130, 1024), normal(512, 1024, seed=1)
    whole = linear(x, weight)
    monkeypatch.setattr(tile, "ROWS", 1)
    assert int((linear(x, weight) != whole).sum()) > 0


def test_linear_to_fp32_does_not_round() -> None:
    x, weight = normal(3, 256, dtype=torch.bfloat16), normal(100, 256, seed=1, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    wide = linear(x, weight, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert (wide - exact).abs().max() < 1e-4 < 1e-2 < (linear(x, weight) - exact).abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grouped_linear_is_one_linear_an_expert(dtype: torch.dtype) -> None:
    counts = torch.tensor([3, 0, 70, 1])
    x, weight = normal(74, 256, dtype=dtype), normal(4, 40, 256, seed=1, dtype=dtype)
    expected = torch.cat([linear(x[:3], weight[0]), linear(x[3:73], weight[2]), linear(x[73:], weight[3])])
    assert same_bits(grouped_linear(x, counts, weight), expected)
    assert grouped_linear(x[:0], torch.zeros(4, dtype=torch.int64), weight).shape == (0, 40)


def test_head_linear_is_one_linear_a_head() -> None:
    x, weight = normal(70, 4, 32), normal(4, 24, 32, seed=1)
    out = head_linear(x, weight)
    assert all(same_bits(out[:, h], linear(x[:, h].contiguous(), weight[h])) for h in range(4))


def test_several_threads_or_reduced_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tile.check_one_thread()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with pytest.raises(InputError, match="4 threads"):
        tile.check_one_thread()
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with pytest.raises(InputError, match="'medium'"):
        tile.check_one_thread()
