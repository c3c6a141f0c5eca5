"""The CUDA C++ kernel of attention by heads, run on a CPU, prints the bits of the model of Hopper."""

from __future__ import annotations

import functools
import math
import random
import shutil
from typing import Any

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: the attention kernel is not run on this CPU", allow_module_level=True)

import emulation

from dsv3_plugin.kernels.certify.compare import bits_differ
from dsv3_plugin.kernels.cuda import head_hopper
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.ops.drawing import numbers
from dsv3_plugin.ops.head_attention import head_attention

SCALE = 192**-0.5
Args = list[torch.Tensor]


def build(folder: Any, replacements: Any = ()) -> Any:
    return emulation.compile_kernel(folder, head_hopper.PROGRAM, "head_emulated.cpp", replacements)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory.mktemp("emulated"))


def batch(queries: list[int], keys: list[int], heads: int, seed: int = 0) -> Args:
    """Sequences of which nothing is asked are NaN."""
    rng = random.Random(seed)
    q = numbers(rng, sum(queries), heads, 192) * 0.3
    up, latent = numbers(rng, sum(keys), heads, 256), numbers(rng, sum(keys), 576)
    starts = [torch.tensor([0, *counts]).cumsum(0) for counts in (queries, keys)]
    for asked, first, end in zip(queries, starts[1][:-1], starts[1][1:], strict=True):
        if not asked:
            up[first:end], latent[first:end] = torch.nan, torch.nan
    k, v = up.split([128, 128], -1)
    return [q, k, latent[:, 512:], v, starts[0].to(torch.int32), starts[1]]


def expected(args: Args, scale: float = SCALE) -> torch.Tensor:
    return sm90_model.model_of(head_attention)(*args, scale=scale)


# Queries, keys, heads, multiprocessors. With one multiprocessor the tiles are walked one after the other.
CASES = {
    "one key": ([1], [1], 1, 4),
    "two tiles, the last of two rows": ([130], [130], 2, 1),
    "a whole tile and a chunk": ([128, 70], [128, 200], 1, 3),
    "a block that half of the rows does not see": ([70], [100], 1, 1),
    "strangers before, between and behind": ([0, 3, 0, 5, 0], [20, 150, 100, 5, 300], 2, 2),
    "more sequences than a warp has lanes": ([1] * 33, [2] * 33, 2, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_prints_the_bits_of_hopper(name: str, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    *shape, processors = CASES[name]
    args = batch(*shape)
    out = emulation.attend_by_heads(monkeypatch, library, processors, args, scale=SCALE)
    print(name, out.numel(), "outputs")
    assert bits_differ(expected(args), out) == 0


def test_each_tile_is_taken_once_in_every_order(library: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in groups of one and of some, whatever the number of multiprocessors."""
    args = batch([257, 20], [300, 90], 5)
    few = build(tmp_path, [("(24 << 20)", "(1 << 18)")])  # 512 keys
    first = emulation.attend_by_heads(monkeypatch, library, 1, args, scale=SCALE)
    for kernel in library, few:
        for processors in 2, 7, 100:
            again = emulation.attend_by_heads(monkeypatch, kernel, processors, args, scale=SCALE)
            assert bits_differ(first, again) == 0
    assert bits_differ(expected([x[:, :1] if x.dim() == 3 else x for x in args]), first[:, :1]) == 0


def test_the_hardwares_powers_are_computed_again_where_they_may_round_otherwise(
    library: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulated hardware rounds otherwise wherever it may; the scale is small, so that many keys count."""
    args, scale = batch([64], [192], 16), SCALE / 300
    out = emulation.attend_by_heads(monkeypatch, library, 1, args, scale=scale)
    assert bits_differ(expected(args, scale), out) == 0
    trusting = build(tmp_path, [("if (__any_sync(~0u, nearest.in_doubt())) {", "if (false) {")])
    wrong = bits_differ(out, emulation.attend_by_heads(monkeypatch, trusting, 1, args, scale=scale))
    print(wrong, "outputs differ")
    assert wrong > 0


def test_powers_near_the_smallest_number(library: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract has zero below 2**-125, the hardware numbers."""
    args = batch([64], [64], 1)
    q, k, k_rope, v, *_ = args
    q.zero_(), k.zero_(), k_rope.zero_(), v.zero_()
    # Two powers of 2**-124.5 and 2**-125.5 in each row's sum, whose values show.
    q[..., 0], k[1::4, :, 0], k[2::4, :, 0] = 1, -124.5, -125.5
    v[1::4], v[2::4] = 2.0**120, 2.0**127
    scale = math.log(2)
    out = emulation.attend_by_heads(monkeypatch, library, 1, args, scale=scale)
    assert bits_differ(expected(args, scale), out) == 0 and out[10].min() > 0
    trusting = build(tmp_path, [("|| min(smallest & 0xFFFF, smallest >> 16) < Doubt::LEAST", "")])
    assert bits_differ(out, emulation.attend_by_heads(monkeypatch, trusting, 1, args, scale=scale)) > 0


SABOTAGE = {
    "adds before it scales": ("if (!scales) return;", "return;"),
    "forgets the sum": ("rows.total[r] = __fmul_rn(rows.total[r], rows.alpha[r]);", ""),
    "keeps the maxima": ("if (!__any_sync(~0u, grows)) return false;", "if (rows.maximum[0] > -1e30f) return false;"),
    "reads what nobody wrote": ("if (seen < KEYS) clear", "if (seen < 0) clear"),
    "sees later keys": (">= hidden[i / 2 % 2]) scores[i] = __int_as_float(0xff800000);", "> 1000) {}"),
    "takes the keys' columns by turns": ("k / 4 * COLUMN_BYTES", "k / 4 % 2 * COLUMN_BYTES"),
}


@functools.cache
def sabotaged_cases() -> list[tuple[Args, torch.Tensor]]:
    """In the first one maxima grow, in the second one many keys count."""
    growing, even = batch([70, 0], [200, 60], 1), batch([70], [200], 1)
    growing[0][..., 0], growing[1][:200, :, 0] = 4, torch.arange(200)[:, None]
    even[0] /= 300
    return [(args, expected(args)) for args in (growing, even)]


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_kernel_is_caught(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged = build(tmp_path, [SABOTAGE[name]])
    wrong = 0
    for args, right in sabotaged_cases():
        wrong += bits_differ(right, emulation.attend_by_heads(monkeypatch, sabotaged, 1, args, scale=SCALE))
    print(name, wrong, "outputs differ")
    assert wrong > 0


def test_the_twin_of_the_sabotaged_kernels(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for args, right in sabotaged_cases():
        assert bits_differ(right, emulation.attend_by_heads(monkeypatch, library, 1, args, scale=SCALE)) == 0
