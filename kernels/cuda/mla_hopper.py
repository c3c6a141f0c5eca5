"""Absorbed attention for the V3 latent (512 + 64) in CUDA C++ (mla_hopper.cu): descriptors, memory and the launch.

Lengths stay on the device, so that a launch can be part of a CUDA graph: CTAs find their work themselves.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from dsv3_plugin.kernels import mla_inputs
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.ops import mla_attention as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.elementary import EXP2_POLYNOMIAL, LOG2_E
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.mla_attention import MAXIMUM_STEP, SPLIT_KEYS
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.paged_batch import PagedBatch

RANK = 512
DIM = 576
_ROWS = 64
_KEYS = 64
_TILES = 9
_TILES_A_COPY = 3
# What the struct `Shared` of mla_hopper.cu takes, and room to align it.
_SHARED_BYTES = 27 * 64 * 128 + 2048 + 1024
# Where the hardware's 2**x rounds to another bf16 number than the contract's does, it is at most so many fp32 numbers
# from the middle between the two: tests/kernels/test_near_exp2.py tries every x.
NEAR = 2
# Splits of a row that a thread of `combine` waits for at once, and how many such groups can be on their way.
GROUP_SPLITS = 8
_GROUP_BYTES = GROUP_SPLITS * RANK * 4
_GROUPS = 8
# Partials of splits that may be stored at once, for each multiprocessor: 128 KiB each.
_PARTIALS = 8

PROGRAM = compiler.Program(
    "mla_hopper.cu",
    (
        ("SPLIT_KEYS", SPLIT_KEYS),
        ("MAXIMUM_STEP", MAXIMUM_STEP),
        ("NEAR", NEAR),
        ("GROUP_SPLITS", GROUP_SPLITS),
        *((f"EXP2_{5 - i}", c) for i, c in enumerate(EXP2_POLYNOMIAL[:-1])),
    ),
    (),
)


class _Batch(ctypes.Structure):
    """The struct `Batch` of mla_hopper.cu."""

    _fields_ = (
        ("block_table", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("table_stride", ctypes.c_longlong),
        ("table_wide", ctypes.c_int),
        ("lens_wide", ctypes.c_int),
        ("starts_wide", ctypes.c_int),
        ("requests", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("block_size", ctypes.c_int),
        ("box_rows", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("prefixes", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("capacity", ctypes.c_int),
        ("split_kv", ctypes.c_void_p),
    )

    def getPtr(self) -> int:  # noqa: N802 (what the driver's bindings ask an argument for)
        return ctypes.addressof(self)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@implements(contracts.mla_attention)
def mla_attention(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    batch: PagedBatch,
    keys: KeySelection = ALL_KEYS,
    *,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """q bf16 [T, H, 576], latent_cache bf16 [num_blocks, block_size, 576] whose keys lie at multiples of 16 bytes, all
    of which are attended to; to bf16 [T, H, 512].

    Raises `InputError`.
    """
    op = "mla_attention"
    mla_inputs.check(q, latent_cache, batch, keys, kv_lora_rank, scale)
    is_v3 = kv_lora_rank == RANK and q.shape[2] == DIM
    require(is_v3, op, f"this kernel attends with a latent of {RANK} + 64, not {kv_lora_rank} of {q.shape[2]}")
    strides = latent_cache.stride()[:2]
    aligned = latent_cache.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    require(aligned, op, f"latent_cache with strides {strides} has keys that begin at no multiple of 16 bytes")
    out = q.new_empty(*q.shape[:2], kv_lora_rank)
    if out.numel():
        launch(q, latent_cache, batch, out, scale)
    return out


def launch(q: torch.Tensor, latent_cache: torch.Tensor, batch: PagedBatch, out: torch.Tensor, scale: float) -> None:
    """The same of checked arguments, to out."""
    tokens, heads, _ = q.shape
    pages, block_size, _ = latent_cache.shape
    requests = batch.num_reqs
    processors = _processors(q.device.index)
    # Bounds: a request adds at most one tile that is not full, and is not longer than its row of pages.
    tiles = tokens * heads // _ROWS + (min(requests, tokens) if heads % _ROWS else 0)
    splits = -(-batch.block_table.shape[1] * block_size // SPLIT_KEYS)
    # Enough tiles for nearly two rounds keep the card busy: then there is no need for split-KV.
    capacity = 0 if splits == 1 or tiles >= 1.75 * processors else min(tiles * splits, _PARTIALS * processors)
    grid = min(processors, tiles * splits if capacity else tiles)
    prefixes = q.new_empty(grid * _ROWS * RANK if splits > 1 else 0, dtype=torch.float32)
    partials = q.new_empty(capacity * _ROWS * RANK, dtype=torch.float32)
    stats = q.new_empty(capacity * _ROWS * 2, dtype=torch.float32)
    split_kv = q.new_empty(1, dtype=torch.int32)
    box_rows = min(_KEYS, block_size & -block_size)
    described = _Batch(
        *(x.data_ptr() for x in batch.tensors),
        batch.block_table.stride(0),
        *(x.dtype == torch.int64 for x in batch.tensors),
        requests,
        heads,
        block_size,
        box_rows,
        scale * LOG2_E,
        *(x.data_ptr() for x in (out, prefixes, partials, stats)),
        capacity,
        split_kv.data_ptr(),
    )
    # A tile is 128 bytes wide; a copy takes several, and where a page holds less than a tile's keys one.
    q_map = compiler.tensor_map(
        "e4m3", q.data_ptr(), (128, tokens * heads, _TILES), (2 * DIM, 128), (128, _ROWS, _TILES_A_COPY)
    )
    key_map = compiler.tensor_map(
        "e4m3",
        latent_cache.data_ptr(),
        (128, block_size, _TILES, pages),
        (2 * latent_cache.stride(1), 128, 2 * latent_cache.stride(0)),
        (128, box_rows, _TILES_A_COPY if box_rows == _KEYS else 1, 1),
    )
    compiler.launch(PROGRAM, "attend", compiler.Launch(grid, 512, _SHARED_BYTES, pdl=True), (q_map, key_map, described))
    if capacity:
        rows = tokens * heads
        blocks = min(rows, 8 * processors)
        # `combine` comes to multiprocessors that `attend` has left. It takes their shared memory: that spreads it.
        groups = min(_GROUPS, compiler.shared_bytes_each(-(-blocks // processors)) // _GROUP_BYTES)
        how = compiler.Launch(blocks, 128, groups * _GROUP_BYTES, pdl=True)
        compiler.launch(PROGRAM, "combine", how, (described, rows, groups))
