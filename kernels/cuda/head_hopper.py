"""Attention with V3's heads (keys of 128 + 64, values of 128) in CUDA C++ (head_hopper.cu): descriptors and the launch.

Where sequences start stays on the device: CTAs find their work themselves.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.cuda.mla_hopper import NEAR
from dsv3_plugin.ops import head_attention as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.elementary import EXP2_POLYNOMIAL, LOG2_E
from dsv3_plugin.ops.head_attention import require_inputs
from dsv3_plugin.ops.mla_attention import MAXIMUM_STEP
from dsv3_plugin.ops.operation import implements

NOPE, ROPE, WIDTH = 128, 64, 128
_ROWS = 128
_KEYS = 128
# What the struct `Shared` of head_shared.cuh takes: queries, two stages of keys and values, and barriers.
_SHARED_BYTES = (_ROWS + 2 * _KEYS) * (NOPE + ROPE) * 2 + 2 * _KEYS * WIDTH * 2 + 1024

PROGRAM = compiler.Program(
    "head_hopper.cu",
    (
        ("MAXIMUM_STEP", MAXIMUM_STEP),
        ("NEAR", NEAR),
        *((f"EXP2_{5 - i}", c) for i, c in enumerate(EXP2_POLYNOMIAL[:-1])),
    ),
    (),
)


class _Heads(ctypes.Structure):
    """The struct `Heads` of head_tiles.cuh."""

    _fields_ = (
        ("query_starts", ctypes.c_void_p),
        ("key_starts", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_starts_wide", ctypes.c_int),
        ("key_starts_wide", ctypes.c_int),
        ("sequences", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("scale", ctypes.c_float),
    )

    def getPtr(self) -> int:  # noqa: N802 (what the driver's bindings ask an argument for)
        return ctypes.addressof(self)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def takes(q: torch.Tensor, k: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this kernel reads operands that fit each other."""
    is_v3 = (k.shape[2], k_rope.shape[1], v.shape[2]) == (NOPE, ROPE, WIDTH) and q.dtype == torch.bfloat16
    operands = q, k, k_rope, v
    aligned = all(x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1]) for x in operands)
    return is_v3 and aligned and q.is_contiguous() and all(x.stride(-1) == 1 for x in operands)


@implements(contracts.head_attention)
def head_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """q bf16 [T, H, 192], contiguous; k bf16 [K, H, 128], k_rope bf16 [K, 64] and v bf16 [K, H, 128], whose rows lie at
    multiples of 16 bytes; to bf16 [T, H, 128].

    Raises `InputError`. That the starts fit the tensors is not checked: they stay on the device.
    """
    require_inputs(q, k, k_rope, v, query_starts, key_starts, scale)
    told = ", ".join(f"{tuple(x.shape)} with strides {x.stride()}" for x in (q, k, k_rope, v))
    sizes = f"{NOPE} + {ROPE} and {WIDTH} bf16 numbers in rows at multiples of 16 bytes"
    require(takes(q, k, k_rope, v), "head_attention", f"this kernel attends with {sizes}, not {q.dtype} {told}")
    out = q.new_empty(*q.shape[:2], WIDTH)
    if out.numel():
        launch(q, k, k_rope, v, query_starts.contiguous(), key_starts.contiguous(), out, scale)
    return out


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """The same of checked arguments, to out."""
    tokens, heads, _ = q.shape
    sequences = len(query_starts) - 1
    # Not more tiles than this: each sequence adds at most one that is not full.
    tiles = (tokens // _ROWS + min(sequences, tokens)) * heads
    described = _Heads(
        query_starts.data_ptr(),
        key_starts.data_ptr(),
        out.data_ptr(),
        query_starts.dtype == torch.int64,
        key_starts.dtype == torch.int64,
        sequences,
        heads,
        scale * LOG2_E,
    )
    maps = (
        _columns(q, _ROWS // 2),
        _columns(k, _KEYS),
        _columns(k_rope.unsqueeze(1), _KEYS),
        _columns(v, _KEYS // 2),
    )
    how = compiler.Launch(min(_processors(q.device.index), tiles), 384, _SHARED_BYTES)
    compiler.launch(PROGRAM, "attend_heads", how, (*maps, described))


def _columns(x: torch.Tensor, rows: int) -> object:
    """How TMA copies so many rows of one head of x [rows, heads, dim]: columns of 128 bytes, one behind the other."""
    columns = x.shape[2] // 64
    strides = 2 * x.stride(0), 128, 2 * x.stride(1)
    return compiler.tensor_map(
        "e4m3", x.data_ptr(), (128, len(x), columns, x.shape[1]), strides, (128, rows, columns, 1)
    )
