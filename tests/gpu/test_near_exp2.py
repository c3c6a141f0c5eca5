"""The hardware's 2**x rounds to another bf16 number than the contract's only where the attention kernel expects it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hopper_card import HOPPER

from dsv3_plugin.kernels.cuda.mla_hopper import NEAR
from dsv3_plugin.ops.elementary import exp2_of_nonpositive

if not HOPPER:
    pytest.skip("needs a Hopper card: its 2**x is compared", allow_module_level=True)

import triton
import triton.language as tl

MINUS_ZERO, LEAST = 0x80000000, 0xC2FA0000  # bits of -0 and -125
CHUNK = 1 << 25


@triton.jit
def _near_exp2(x, y, count: tl.constexpr):
    at = tl.program_id(0) * count + tl.arange(0, count)
    number = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [tl.load(x + at)], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(y + at, number)


def test_every_number_from_zero_to_the_least() -> None:
    distances: Counter[int] = Counter()
    for first in range(MINUS_ZERO, LEAST + 1, CHUNK):
        bits = torch.arange(first, first + CHUNK, device="cuda").clamp(max=LEAST)
        x = (bits - (1 << 32)).to(torch.int32).view(torch.float32)
        y = torch.empty_like(x)
        _near_exp2[(CHUNK // 1024,)](x, y, 1024)
        others = y[y.bfloat16() != exp2_of_nonpositive(x).bfloat16()]
        distance = (others.view(torch.int32) & 0xFFFF) - 0x8000
        distances.update(dict(zip(*(t.tolist() for t in distance.unique(return_counts=True)), strict=True)))
    differ = distances.total()
    print(differ, "of", LEAST - MINUS_ZERO + 1, "round otherwise; fp32 numbers from the middle:", distances)
    assert differ > 0, "then no number would need to be computed again"
    assert all(abs(number) <= NEAR for number in distances)
    assert any(abs(number) == NEAR for number in distances), "NEAR is larger than it need be"
