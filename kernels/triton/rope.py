"""Rotary embedding of interleaved pairs: a CTA takes one token and several heads."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton.elementary import EXACT
from dsv3_plugin.ops import rope as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements

_HEADS = 16


@triton.jit
def rotate(x, out, cos, sin, head, heads, stride, out_stride, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """Heads `head` [HEADS] of one token from x to out, which like cos and sin begin at the token's."""
    pair = tl.arange(0, WIDTH)
    element = (2 * pair[:, None] + tl.arange(0, 2)[None, :])[None, :, :]
    inside = (head < heads)[:, None, None] & (element < 2 * PAIRS)
    even, odd = tl.split(tl.load(x + head[:, None, None] * stride + element, mask=inside, other=0).to(tl.float32))
    c = tl.load(cos + pair, mask=pair < PAIRS, other=0)[None, :]
    s = tl.load(sin + pair, mask=pair < PAIRS, other=0)[None, :]
    rotated = tl.join(even * c - odd * s, even * s + odd * c).to(out.dtype.element_ty)
    tl.store(out + head[:, None, None] * out_stride + element, rotated, mask=inside)


@triton.jit
def _rope(
    x, cos, sin, out, token_stride, head_stride, heads, PAIRS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    x += token * token_stride
    out += token * heads * 2 * PAIRS
    rotate(x, out, cos + token * PAIRS, sin + token * PAIRS, head, heads, head_stride, 2 * PAIRS, PAIRS, WIDTH)


@implements(contracts.rope)
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x bf16 [M, H, P], any strides but 1 in P; cos, sin fp32 [M, P / 2]; to bf16 [M, H, P]. Raises `InputError`."""
    require(
        x.dim() == 3 and tuple(cos.shape) == tuple(sin.shape) == (x.shape[0], x.shape[2] // 2),
        "rope",
        f"x of shape {tuple(x.shape)} does not fit cos of shape {tuple(cos.shape)} and sin of shape {tuple(sin.shape)}",
    )
    require(x.dtype == torch.bfloat16, "rope", f"x is {x.dtype}, expected torch.bfloat16")
    require(cos.dtype == sin.dtype == torch.float32, "rope", f"cos is {cos.dtype}, sin is {sin.dtype}, not fp32")
    require(cos.is_contiguous() and sin.is_contiguous(), "rope", "cos or sin is not contiguous")
    require(x.stride(2) == 1, "rope", f"x has stride {x.stride(2)} in its last dimension, expected 1")
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        width = triton.next_power_of_2(size // 2)
        _rope[(tokens, triton.cdiv(heads, _HEADS))](
            x, cos, sin, out, x.stride(0), x.stride(1), heads, size // 2, width, _HEADS, num_warps=4, **EXACT
        )
    return out
