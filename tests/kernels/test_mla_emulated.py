"""The CUDA C++ attention kernel, run on a CPU, prints the bits of the model of Hopper."""

from __future__ import annotations

import functools
import random
import shutil
from typing import Any

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: the attention kernel is not run on this CPU", allow_module_level=True)

import emulation

from dsv3_plugin.kernels.certify.compare import bits_differ
from dsv3_plugin.kernels.cuda import compiler, mla_hopper
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.layers.attend import FAST_PAGE_SIZE
from dsv3_plugin.ops import mla_attention
from dsv3_plugin.ops.drawing import numbers
from dsv3_plugin.ops.paged_batch import PagedBatch

SCALE = 576**-0.5
Case = tuple[torch.Tensor, torch.Tensor, PagedBatch]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulation.build(tmp_path_factory.mktemp("emulated"))


def batch(lengths: list[int], queries: list[int], heads: int, block_size: int, seed: int = 0) -> Case:
    """Requests on shuffled pages; what they have not written is NaN."""
    rng = random.Random(seed)
    blocks = [-(-length // block_size) for length in lengths]
    cache = numbers(rng, sum(blocks) + 3, block_size, 576)
    pages = list(range(len(cache)))
    rng.shuffle(pages)
    table = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for request, count in enumerate(blocks):
        table[request, :count] = torch.tensor([pages.pop() for _ in range(count)])
        if lengths[request] % block_size:
            cache[table[request, count - 1], lengths[request] % block_size :] = torch.nan
    q = numbers(rng, sum(queries), heads, 576) * 0.3
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return q, cache, PagedBatch.of(q, cache, table, torch.tensor(lengths, dtype=torch.int32), starts)


def expected(case: Case, scale: float = SCALE) -> torch.Tensor:
    return sm90_model.model_of(mla_attention.mla_attention)(*case, kv_lora_rank=512, scale=scale)


# Lengths, queries, heads, page size, multiprocessors. With one multiprocessor a tile's splits are walked in order.
CASES = {
    "one key": ([1], [1], 16, 64, 4),
    "one split, verify": ([130, 64], [2, 1], 16, 64, 4),
    "prefill, pages of 16": ([100, 70], [70, 3], 4, 16, 2),
    "pages of one key": ([90], [2], 16, 1, 1),
    "pages of 48 keys": ([150], [1], 16, 48, 1),
    "splits in order": ([2100], [1], 16, 64, 1),
    "rows on both sides of a border, in order": ([1030, 70], [9, 3], 16, 16, 1),
    "a tile's rows end in two splits": ([2049], [2], 32, 64, 1),
    "split-KV": ([2100, 900], [1, 1], 16, 64, 8),
    "a border inside a tile, split-KV": ([1025, 2047], [3, 1], 17, 64, 12),
}


def test_the_page_that_engines_are_given_is_one_copy() -> None:
    assert FAST_PAGE_SIZE == mla_hopper._KEYS


@pytest.mark.parametrize("name", CASES)
def test_prints_the_bits_of_hopper(name: str, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    *shape, processors = CASES[name]
    case = batch(*shape)
    out = emulation.attend(monkeypatch, library, processors, *case, scale=SCALE)
    print(name, out.numel(), "outputs")
    assert bits_differ(expected(case), out) == 0


def test_wide_integers_and_gaps_in_the_cache(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache, narrow = batch([200], [1], 16, 64)
    wide = torch.full((len(cache), 64, 600), torch.nan, dtype=torch.bfloat16)
    wide[..., 8:584] = cache
    of_int64 = PagedBatch.of(q, cache, *(x.long() for x in narrow.tensors))
    out = emulation.attend(monkeypatch, library, 2, q, wide[..., 8:584], of_int64, scale=SCALE)
    assert bits_differ(expected((q, cache, narrow)), out) == 0


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A batch of 40 splits, which are one block each, lest they be many keys."""
    program = mla_hopper.PROGRAM
    parameters = tuple((name, 64 if name == "SPLIT_KEYS" else value) for name, value in program.parameters)
    monkeypatch.setattr(mla_hopper, "PROGRAM", program._replace(parameters=parameters))
    for module in (mla_hopper, mla_attention):
        monkeypatch.setattr(module, "SPLIT_KEYS", 64)
    case = batch([2500], [2], 4, 64)
    q, cache, *_ = case
    q[..., 512], cache[..., 512] = -200, 4  # no score is near zero
    return case


@pytest.mark.parametrize("room", [40, 16])
def test_combines_more_splits_than_a_warp_has_lanes(
    room: int, small_splits: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 splits, all are on their way at once, or 16."""
    monkeypatch.setattr(compiler, "shared_bytes_each", lambda blocks: room * mla_hopper.RANK * 4)
    out = emulation.attend(monkeypatch, emulation.build(tmp_path), 8, *small_splits, scale=SCALE)
    assert bits_differ(expected(small_splits), out) == 0


SABOTAGED_COMBINE = {
    "forgets the maximum": ("highest = __shfl_sync(~0u, own.maximum, 31);", ""),
    "begins at zero": ("float highest = __int_as_float(0xff800000)", "float highest = 0.0f"),
    "begins anew": ("const bool alone = first == 0 && i == 0;", "const bool alone = first == behind && i == 0;"),
}


@pytest.mark.parametrize("name", SABOTAGED_COMBINE)
def test_a_sabotaged_combine_is_caught(
    name: str, small_splits: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = emulation.build(tmp_path, [SABOTAGED_COMBINE[name]])
    out = emulation.attend(monkeypatch, library, 8, *small_splits, scale=SCALE)
    wrong = bits_differ(expected(small_splits), out)
    print(name, wrong, "outputs differ")
    assert wrong > 0


def test_the_hardwares_powers_are_computed_again_where_they_may_round_otherwise(
    library: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulated hardware rounds otherwise wherever it may; the scale is small, so that many keys count."""
    case, scale = batch([64], [64], 32, 64), SCALE / 30
    out = emulation.attend(monkeypatch, library, 4, *case, scale=scale)
    assert bits_differ(expected(case, scale), out) == 0
    trusting = emulation.build(tmp_path, [("min(nearest & 0xFFFF, nearest >> 16) <= 2 * NEAR ||", "")])
    wrong = bits_differ(out, emulation.attend(monkeypatch, trusting, 4, *case, scale=scale))
    print(wrong, "outputs differ")
    assert wrong > 0


SABOTAGE = {
    "combines from the wrong side": ("rows.a[r] = factors.a;", "rows.a[r] = factors.b;"),
    "goes on where a split ends": ("const bool first = begin % SPLIT_KEYS == 0;", "const bool first = begin == 0;"),
    "reads what nobody wrote": ("if (half == 0 && begin + KEYS > work.visible) {", "if (begin < 0) {"),
    "trusts the hardware's power of two": ("if (doubt.any()) {", "if (false) {"),
    "keeps the maxima": ("if (__any_sync(~0u, grows)) {", "if (false) {"),
    "sees later keys": ("if (key > position[i / 2 % 2]) scores[i] = -infinity;", ""),
}


@functools.cache
def sabotaged_cases() -> list[tuple[Case, torch.Tensor]]:
    cases = batch([1030], [9], 16, 64), batch([100], [3], 16, 64)
    return [(case, expected(case)) for case in cases]


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_kernel_is_caught(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = emulation.build(tmp_path, [SABOTAGE[name]])
    wrong = 0
    for case, right in sabotaged_cases():
        wrong += bits_differ(right, emulation.attend(monkeypatch, library, 1, *case, scale=SCALE))
    print(name, wrong, "outputs differ")
    assert wrong > 0
