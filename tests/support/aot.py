"""Compile the GPU kernels for sm_90a on a machine without a GPU, at the shapes of DeepSeek-V3."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dsv3_plugin.kernels.cuda import compiler, fp8_gemm, head_hopper, mla_hopper
from dsv3_plugin.kernels.sm90 import tensor_core, tensor_core_gpu
from dsv3_plugin.kernels.triton import (
    absorb,
    combine,
    fp8_gluon,
    fp8_linear,
    fp8_weight,
    fp8_wgrad,
    head_attention,
    linear,
    mla_attention,
    permute,
    quantize,
    rms_norm,
    rope,
    router,
    silu_and_mul,
    sliced_linear,
)
from dsv3_plugin.ops.rms_norm import ROW_CHUNK
from dsv3_plugin.ops.router import K_CHUNK

_EXACT = {"enable_fp_fusion": False}
_ALIGNED = ("columns", "depth", "size", "width", "heads", "block_size", "token_stride", "head_stride", "block_stride")
_ALIGNED += ("k_stride", "k_head_stride", "k_rope_stride", "v_stride", "v_head_stride")
_ALIGNED += ("tokens", "padded_rows", "x_row_stride", "x_head_stride", "out_row_stride", "out_head_stride")


class Source(NamedTuple):
    """A kernel, the types of its arguments in order, its compile-time parameters and launch options."""

    kernel: Any
    types: str
    constants: dict[str, Any]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What the compiler made."""

    ptx: str
    spilled_bytes: int
    said: str


def _descriptor(rows: int, columns: int, dtype: str, bits: int) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}],{gl.NVMMASharedLayout(128, bits, 2)!r}>"


def _fp8(rows: int, columns: int, weight_first: bool, warps: int) -> Source:
    constants = {"ROWS": rows, "COLUMNS": columns, "WEIGHT_FIRST": weight_first, "BAND": 8}
    types = "*fp8e4nv *fp32 *fp8e4nv *fp32 *bf16 i32 i32 i32 i32 i32"
    return Source(fp8_linear._fp8_linear, types, constants, {"num_warps": warps, "num_stages": 4})


def _fp8_gluon(groups: int, second: int, tokens_first: bool, stages: int) -> Source:
    constants = {"GROUPS": groups, "PADDED": max(1, groups), "N": second, "TOKENS_FIRST": tokens_first}
    constants |= {"STAGES": stages, "BAND": 8} | ({} if groups else {"counts": None})
    first, other = _descriptor(64, 128, "fp8e4nv", 8), _descriptor(second, 128, "fp8e4nv", 8)
    x, weight = (first, other) if tokens_first else (other, first)
    types = f"{x}|{weight}|*fp32|*fp32|{'*i64|' if groups else ''}*bf16|i32|i32|i32|i32|i32"
    return Source(fp8_gluon._linear, types, constants, {"num_warps": 4})


def _bf16(rows: int, columns: int, depth: int, warps: int, stages: int) -> Source:
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "BAND": 8}
    types = "*bf16 *bf16 *bf16 i32 i32 i32 i32 i32 i32 i32"
    return Source(linear._linear, types, constants, {"num_warps": warps, "num_stages": stages})


def _sliced(tile: sliced_linear.Tile) -> Source:
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "BAND": 8}
    types = "*bf16 *bf16 *fp32 i32 i32 i32 i32"
    return Source(sliced_linear._sliced_linear, types, constants, {"num_warps": tile.warps, "num_stages": tile.stages})


def _sliced_fp8(tile: sliced_linear.Tile) -> Source:
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "WEIGHT_FIRST": tile.rows <= 64, "BAND": 8}
    types = "*fp8e4nv *fp32 *fp8e4nv *fp32 *fp32 i32 i32 i32 i32 i32 i32"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Source(sliced_linear._sliced_fp8_linear, types, constants, options)


def _quantized_columns(x: str, ue8m0: bool) -> Source:
    constants = {"GROUPS": 256, "PADDED": 256, "COLUMNS": 32, "UE8M0": ue8m0}
    constants |= {} if x == "*fp8e4nv" else {"x_scale": None}
    types = f"{x} {'*fp32 ' if x == '*fp8e4nv' else ''}*i64 *fp8e4nv *fp32 i32 i32 i32 i32 i32"
    return Source(fp8_wgrad._quantize_columns, types, constants, _EXACT | {"num_warps": 4})


def _quantized_weight(transposed: bool, ue8m0: bool) -> Source:
    constants = {"TRANSPOSED": transposed, "UE8M0": ue8m0}
    types = "*bf16 *fp8e4nv *fp32 i32 i32 i32"
    return Source(fp8_weight._quantize_weight, types, constants, _EXACT | {"num_warps": 8})


def _wgrad(groups: int, out: str) -> Source:
    tile = fp8_wgrad.TILE
    constants = {"GROUPS": groups, "PADDED": groups, "ROWS": tile.rows, "COLUMNS": tile.columns}
    types = f"*fp8e4nv *fp32 *fp8e4nv *fp32 *i64 {out} i32 i32 i32 i32 i32"
    return Source(fp8_wgrad._fp8_wgrad, types, constants, {"num_warps": tile.warps, "num_stages": tile.stages})


def _quantized_heads(rows: int, depth: int, warps: int, stages: int) -> Source:
    constants = {"BLOCKS_A_HEAD": 1, "UE8M0": False, "ROWS": rows, "DEPTH": depth}
    types = "*bf16 *bf16 *fp8e4nv *fp32 i32 i32 i32 i32 i32 i32"
    options = _EXACT | {"num_warps": warps, "num_stages": stages}
    return Source(linear._head_linear_fp8, types, constants, options)


def _norm(*wanted: str, without: tuple[str, ...] = ()) -> Source:
    types = {"x": "*bf16", "addend": "*bf16", "weight": "*bf16", "total_out": "*bf16", "out": "*bf16"}
    types |= {"values": "*fp8e4nv", "scales": "*fp32", "eps": "fp32", "scale_stride": "i32"}
    optional = {"addend", "total_out", "values", "scales"}.difference(wanted) | set(without)
    constants = {"K": 7168, "BLOCKS": 64, "UE8M0": False, "PRELOAD": False} | dict.fromkeys(optional)
    given = " ".join(kind for name, kind in types.items() if name not in optional)
    return Source(rms_norm._rms_norm, given, constants, _EXACT | {"num_warps": 4})


def _sums_of_chunks(count: int, tile: router.Tile) -> Source:
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "K_CHUNK": K_CHUNK, "COUNT": count}
    types = "*bf16 *bf16 *fp32 i32 i32 i32"
    return Source(router._sums_of_chunks, types, constants, {"num_warps": tile.warps, "num_stages": tile.stages})


def _model(instruction: tensor_core.Instruction) -> Source:
    constants = {"DEPTH": instruction.depth, "FRACTION_BITS": instruction.fraction_bits, "FLOOR": instruction.floor}
    constants |= {"RESULT_BITS": instruction.result_bits, "OPERAND_EXPONENT": instruction.operand_exponent, "TILE": 16}
    return Source(tensor_core_gpu._dot, "*fp32 *fp32 *fp32 *fp32 i32 i32 i32", constants, _EXACT)


_ROUTE = {"EXPERTS": 256, "GROUPS": 8, "GROUPS_CHOSEN": 4, "TOPK": 8, "NORMALISE": True}
_ROUTE |= {"GROUPS_PADDED": 8, "SIZE_PADDED": 32, "TOPK_PADDED": 8, "SPLITS": 14, "FOLLOWS": True}
_MLA = {"BLOCK_SIZE": 16, "REQUESTS": 128, "PADDED": 128, "RANK": 512, "ROPE": 64, "RANK_PADDED": 512}
_MLA |= {"ROPE_PADDED": 64, "ROWS": 64, "KEYS": 64, "SPLIT": 1024, "STEP": 8}
_HEADS = {"PADDED": 16, "NOPE": 128, "ROPE": 64, "WIDTH": 128, "NOPE_PADDED": 128, "ROPE_PADDED": 64}
_HEADS |= {"WIDTH_PADDED": 128, "ROWS": 128, "KEYS": 128, "STEP": 8}
_ABSORB = {"NOPE": 128, "RANK": 512, "BLOCKS": 4, "PAIRS": 32, "WIDTH": 32, "HEADS": 16}
_ABSORB_MANY = {"NOPE": 128, "DEPTH": 128, "RANK": 512, "PAIRS": 32, "WIDTH": 32, "ROWS": 128, "COLUMNS": 64}
_GROUPED = {"GROUPS": 256, "PADDED": 256, "ROWS": 16, "COLUMNS": 128}

SOURCES: dict[str, Source] = {
    "rms_norm": _norm(),
    "add_rms_norm": _norm("addend", "total_out"),
    "rms_norm, quantized": _norm("values", "scales", without=("out",)),
    "add_rms_norm, quantized": _norm("addend", "total_out", "values", "scales"),
    "quantize ue8m0": Source(
        quantize._quantize, "*bf16 *fp8e4nv *fp32 i32 i32 i32", {"GROUPS": 32, "UE8M0": True}, _EXACT
    ),
    "quantize float32": Source(
        quantize._quantize, "*bf16 *fp8e4nv *fp32 i32 i32 i32", {"GROUPS": 32, "UE8M0": False}, _EXACT
    ),
    "silu_and_mul": Source(
        silu_and_mul._silu_and_mul,
        "*bf16 *bf16 i32 i32",
        {"COLUMNS": 1024, "scales": None, "FP8": False, "UE8M0": False},
        _EXACT,
    ),
    "silu_and_mul, quantized": Source(
        silu_and_mul._silu_and_mul,
        "*bf16 *fp8e4nv *fp32 i32 i32",
        {"COLUMNS": 1024, "FP8": True, "UE8M0": False},
        _EXACT,
    ),
    "silu_and_mul, gradient": Source(
        silu_and_mul._silu_and_mul_gradient, "*bf16 *bf16 *bf16 i32", {"COLUMNS": 1024}, _EXACT
    ),
    "rms_norm, gradient": Source(
        rms_norm._rms_norm_gradient,
        "*bf16 *bf16 *bf16 *bf16 *fp32 fp32",
        {"K": 7168, "BLOCKS": 64},
        _EXACT | {"num_warps": 8},
    ),
    "rms_norm, gradient of a chunk": Source(
        rms_norm._sum_of_chunk,
        "*bf16 *bf16 *fp32 *fp32 i32 i32",
        {"ROW_CHUNK": ROW_CHUNK, "COLUMNS": 256},
        _EXACT | {"num_warps": 1},
    ),
    "rms_norm, gradient of the weight": Source(
        rms_norm._add_chunks, "*fp32 *bf16 i32 i32", {"COLUMNS": 256}, _EXACT | {"num_warps": 1}
    ),
    "sort_by_expert": Source(
        permute._sort_by_expert, "*i64 *i64 *i64 *i64 i32", {"TOPK": 8, "PAIRS": 4096}, {"num_warps": 8}
    ),
    "permute": Source(permute._permute, "*u8 *fp32 *i64 *u8 *fp32 i32 i32 i32 i32 i32", {"ROWS": 8, "BLOCKS": 8}, {}),
    "absorb": Source(
        absorb._norm_and_rotate, "*bf16 *bf16 *bf16 *fp32 *fp32 *bf16 *bf16 fp32 i32 i32", _ABSORB, _EXACT
    ),
    "absorb, many tokens": Source(
        absorb._multiply_and_rotate,
        "*bf16 *bf16 *fp32 *fp32 *bf16 i32 i32",
        _ABSORB_MANY,
        _EXACT | {"num_warps": 8},
    ),
    "rope": Source(rope._rope, "*bf16 *fp32 *fp32 *bf16 i32 i32 i32", {"PAIRS": 32, "WIDTH": 32, "HEADS": 16}, _EXACT),
    "combine": Source(combine._combine, "*bf16 *i64 *fp32 *bf16 *bf16 i32", {"TOPK": 8, "COLUMNS": 1024}, _EXACT),
    "combine, gradient": Source(
        combine._combine_gradient,
        "*bf16 *bf16 *i64 *fp32 *bf16 *fp32 i32",
        {"TOPK": 8, "SIZE": 8192},
        _EXACT | {"num_warps": 8},
    ),
    "route": Source(router._route, "*fp32 *fp32 *i64 *fp32 fp32 i32", _ROUTE, _EXACT | {"num_warps": 1}),
    "router's chunks, split-K": _sums_of_chunks(1, router.choose_tile(128)),
    "router's chunks in order": _sums_of_chunks(14, router.choose_tile(4096)),
    "bf16 few rows": _bf16(16, 32, 256, 4, 4),
    "bf16 many rows": _bf16(128, 256, 64, 8, 3),
    "heads, few rows": _quantized_heads(16, 128, 4, 4),
    "heads, many rows": _quantized_heads(128, 64, 8, 2),
    "fp8 few rows": _fp8(16, 64, True, 4),
    "fp8 many rows": _fp8(128, 128, False, 8),
    "bf16 slices, few rows": _sliced(sliced_linear.choose_tile(16)),
    "bf16 slices, many rows": _sliced(sliced_linear.choose_tile(4096)),
    "fp8 slices, few rows": _sliced_fp8(sliced_linear.choose_fp8_tile(16)),
    "fp8 slices, many rows": _sliced_fp8(sliced_linear.choose_fp8_tile(4096)),
    "slices added": Source(sliced_linear._add_slices, "*fp32 *bf16 i32", {"SLICES": 8, "SIZE": 1024}, {}),
    "fp8 experts, few rows": Source(
        fp8_linear._grouped_fp8_linear,
        "*fp8e4nv *fp32 *i64 *fp8e4nv *fp32 *bf16 i32 i32 i32 i32",
        _GROUPED | {"WEIGHT_FIRST": True},
        {"num_warps": 4, "num_stages": 4},
    ),
    "quantize weight": _quantized_weight(False, True),
    "quantize weight float32": _quantized_weight(False, False),
    "quantize weight, transposed": _quantized_weight(True, True),
    "quantize weight, transposed float32": _quantized_weight(True, False),
    "quantize columns": _quantized_columns("*bf16", True),
    "quantize columns float32": _quantized_columns("*bf16", False),
    "quantize columns again": _quantized_columns("*fp8e4nv", True),
    "quantize columns again float32": _quantized_columns("*fp8e4nv", False),
    "fp8 wgrad": _wgrad(1, "*fp32"),
    "fp8 wgrad of experts": _wgrad(32, "*bf16"),
    "fp8 gluon": _fp8_gluon(0, 128, True, 6),
    "fp8 gluon, one row": _fp8_gluon(0, 16, False, 8),
    "fp8 gluon, experts": _fp8_gluon(256, 128, True, 6),
    "mla": Source(
        mla_attention._mla_attention,
        "*bf16 *bf16 *i32 *i32 *i32 *bf16 fp32 i32 i32 i32 i32",
        _MLA,
        _EXACT | {"num_warps": 8, "num_stages": 2},
    ),
    "head attention": Source(
        head_attention._head_attention,
        "*bf16 *bf16 *bf16 *bf16 *i32 *i32 *bf16 fp32 i32 i32 i32 i32 i32 i32 i32",
        _HEADS,
        _EXACT | {"num_warps": 8, "num_stages": 2},
    ),
    "model of bf16 products": _model(tensor_core.BF16),
    "model of e4m3 products": _model(tensor_core.FP8),
}


CUDA_SOURCES: dict[str, compiler.Program] = {
    f"fp8 gemm {tuple(config)}": config.filled().program()
    for config in (*fp8_gemm.DENSE_SAMPLE, *(config._replace(groups=256) for config in fp8_gemm.GROUPED_SAMPLE))
} | {"mla hopper": mla_hopper.PROGRAM, "head hopper": head_hopper.PROGRAM}


def compile_kernel(source: Source, folder: Path) -> Compiled:
    """Compile a Triton or Gluon kernel to sm_90a."""
    names = source.kernel.arg_names
    types = iter(source.types.split("|" if "|" in source.types else " "))
    signature = {name: "constexpr" if name in source.constants else next(types) for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or (name in _ALIGNED and kind == "i32")
    }
    make = GluonASTSource if source.kernel.is_gluon() else ASTSource
    ast = make(source.kernel, signature, source.constants, attributes)
    compiled = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=source.options)
    ptx = compiled.asm["ptx"]
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    assembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    command = [assembler, "-v", "-arch=sm_90a", file, "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(ptx, _spilled_bytes(said), said)


def compile_cuda(program: compiler.Program) -> Compiled:
    """The same for CUDA C++."""
    built = compiler.build(program)
    return Compiled(built.ptx, _spilled_bytes(built.log), built.log)


def _spilled_bytes(said: str) -> int:
    found = re.findall(r"(\d+) bytes spill stores", said)
    assert found, f"the assembler did not say what it spilled: {said}"
    return sum(int(size) for size in found)
