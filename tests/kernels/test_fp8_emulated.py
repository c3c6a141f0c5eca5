"""The fp8 kernel in CUDA C++, run on a CPU, prints the bits of the model of Hopper."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: the fp8 kernel is not run on this CPU", allow_module_level=True)

import emulation

from dsv3_plugin.kernels.certify.compare import bits_differ
from dsv3_plugin.kernels.cuda import compiler, fp8_gemm
from dsv3_plugin.kernels.cuda.fp8_gemm import TileConfig
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.ops.drawing import numbers
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.quantize import E4M3, quantize_fp8, quantize_weight
from dsv3_plugin.profile import ScaleFormat


def build(folder: Path, program: compiler.Program, replacements: Sequence[tuple[str, str]] = ()) -> Any:
    """The kernel as a library, its source changed by `replacements`, each of which must apply."""
    return emulation.compile_kernel(folder, program, "fp8_emulated.cpp", replacements)


def run(monkeypatch: Any, library: Any, processors: int, config: TileConfig, *args: Any) -> torch.Tensor:
    """`fp8_gemm.launch` of tensors on a CPU, on a card of so many multiprocessors."""

    def launch(program: compiler.Program, name: str, how: compiler.Launch, arguments: Sequence[Any]) -> None:
        plain = [
            ctypes.byref(x)
            if isinstance(x, emulation.TensorMap)
            else ctypes.c_void_p(x.data_ptr())
            if isinstance(x, torch.Tensor)
            else x
            for x in arguments
        ]
        library.emulate_fp8_gemm(how.grid, how.block, *plain)

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(compiler, "tensor_map", emulation.tensor_map)
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    x, x_scale, weight, weight_scale, counts = args
    out = torch.full((len(x), weight.shape[-2]), torch.nan, dtype=torch.bfloat16)
    fp8_gemm.launch(x, x_scale, weight, weight_scale, counts, out, config)
    return out


def dense(rows: int, columns: int, depth: int) -> tuple[Any, ...]:
    rng = random.Random(f"{rows} {columns} {depth}")
    x = quantize_fp8(numbers(rng, rows, depth), "float32")
    return (*x, *quantize_weight(numbers(rng, columns, depth), "float32"), None)


def experts(counts: list[int], columns: int, depth: int, scale_format: ScaleFormat = "float32") -> tuple[Any, ...]:
    rng = random.Random(f"{counts} {columns} {depth}")
    x = quantize_fp8(numbers(rng, sum(counts), depth), scale_format)
    weights = [quantize_weight(numbers(rng, columns, depth), scale_format) for _ in counts]
    values, scales = (torch.stack(parts) for parts in zip(*weights, strict=True))
    return (*x, values, scales, torch.tensor(counts))


def vanishing(rows: int, columns: int, depth: int) -> tuple[Any, ...]:
    """Sums a little below zero, which round to -0."""
    x, weight = torch.full((rows, depth), 2.0**-6).to(E4M3), torch.full((columns, depth), -(2.0**-6)).to(E4M3)
    x_scale = torch.full((rows, depth // 128), 2.0**-75)
    return x, x_scale, weight, torch.full((-(-columns // 128), depth // 128), 2.0**-74), None


def expected(args: tuple[Any, ...]) -> torch.Tensor:
    *operands, counts = args
    if counts is None:
        return sm90_model.model_of(fp8_linear)(*operands)
    x, x_scale, weight, weight_scale = operands
    return sm90_model.model_of(grouped_fp8_linear)(x, x_scale, counts, weight, weight_scale)


# A tile configuration with so few stages that the ring wraps, multiprocessors, and a product.
CASES: dict[str, tuple[TileConfig, int, tuple[Any, ...]]] = {
    "one row, several tiles a CTA": (TileConfig(16, 16, 4, buffers=4, stages=2), 3, dense(1, 104, 1024)),
    "depth that fills no stage": (TileConfig(32, 16, 4, buffers=4, stages=2), 2, dense(5, 64, 768)),
    "depth that fills no stage, sums that vanish": (
        TileConfig(16, 16, 4, buffers=4, stages=2),
        1,
        vanishing(3, 16, 640),
    ),
    "turns, depth that fills no stage, sums that vanish": (
        TileConfig(16, 16, 2, k_groups=2, stages=2),
        1,
        vanishing(3, 16, 384),
    ),
    "tiles across scale blocks": (TileConfig(56, 16, 2, buffers=2, stages=3), 2, dense(9, 264, 512)),
    "chunks of tokens": (TileConfig(32, 32, 2, buffers=2, stages=2), 2, dense(75, 64, 512)),
    "three warpgroups, last tile not full": (
        TileConfig(192, 16, 2, row_groups=3, buffers=2, stages=2),
        1,
        dense(3, 328, 512),
    ),
    "parts of the tokens": (TileConfig(64, 32, 1, token_parts=2, buffers=2, stages=2), 1, dense(20, 64, 384)),
    "warpgroups take stages in turn, several tiles": (
        TileConfig(56, 32, 2, k_groups=3, stages=3),
        2,
        dense(40, 264, 1280),
    ),
    "turns in a cluster that shares tokens, last tile empty": (
        TileConfig(32, 32, 4, k_groups=2, cluster=2, stages=3),
        4,
        dense(50, 200, 2048),
    ),
    "a cluster that shares the weight, a chunk left over": (
        TileConfig(64, 32, cluster=2, share_weight=1, stages=3),
        4,
        dense(75, 200, 384),
    ),
    "a cluster that shares K-blocks of the weight": (
        TileConfig(112, 64, 2, cluster=2, share_weight=1, tokens_first=1, buffers=2, stages=2),
        4,
        dense(100, 200, 640),
    ),
    "a cluster that shares the weight, tokens first": (
        TileConfig(192, 64, tokens_first=1, cluster=2, share_weight=1, token_parts=2, buffers=2, stages=2),
        4,
        dense(100, 424, 384),
    ),
    "a cluster that shares boxes of tokens": (
        TileConfig(64, 32, token_box=16, cluster=2, stages=3),
        2,
        dense(50, 200, 384),
    ),
    "tokens first, last tile not full": (
        TileConfig(128, 128, row_groups=2, tokens_first=1, stages=2),
        1,
        dense(150, 200, 384),
    ),
    "tokens first, tiles across scale blocks": (
        TileConfig(136, 64, 2, tokens_first=1, buffers=2, stages=2),
        2,
        dense(70, 296, 640),
    ),
    "tokens first, turns": (TileConfig(16, 64, 4, k_groups=3, tokens_first=1, stages=3), 2, dense(64, 96, 1664)),
    "tokens first, blocks of tokens in a cluster": (
        TileConfig(56, 128, row_groups=2, cluster=2, tokens_first=1, token_box=64, stages=2),
        2,
        dense(100, 176, 256),
    ),
    "tokens first, parts of the weight": (
        TileConfig(96, 64, tokens_first=1, token_parts=2, buffers=2, stages=2),
        1,
        dense(64, 200, 256),
    ),
    "experts without rows and with many": (
        TileConfig(128, 16, 2, row_groups=2, buffers=2, stages=2),
        2,
        experts([3, 0, 21, 0, 1], 128, 512),
    ),
    "experts, copies of 16 tokens": (
        TileConfig(128, 48, row_groups=2, token_box=16, stages=2),
        1,
        experts([50, 7, 33], 128, 256, "ue8m0"),
    ),
    "experts, a cluster that shares the weight": (
        TileConfig(96, 64, tokens_first=1, token_box=32, cluster=2, share_weight=1, stages=2),
        4,
        experts([70, 0, 5, 130], 200, 256),
    ),
    "experts, tokens first": (
        TileConfig(96, 64, tokens_first=1, token_parts=2, buffers=2, token_box=32, stages=2),
        2,
        experts([70, 0, 5, 33], 200, 256),
    ),
    "boxes of sums, last tiles not full": (
        TileConfig(128, 128, row_groups=2, tokens_first=1, token_parts=2, out_boxes=2, stages=2),
        1,
        dense(150, 232, 384),
    ),
    "experts, boxes of sums, a cluster that shares tokens": (
        TileConfig(64, 128, row_groups=2, tokens_first=1, token_box=64, cluster=2, out_boxes=1, stages=2),
        4,
        experts([130, 0, 5, 70], 200, 256),
    ),
    "experts, boxes of sums, a cluster that shares the weight": (
        TileConfig(192, 64, tokens_first=1, token_parts=2, cluster=2, share_weight=1, out_boxes=3, stages=2),
        2,
        experts([30, 0, 130], 200, 256),
    ),
    "sums in the ring, last tiles not full": (
        TileConfig(128, 128, 2, row_groups=2, buffers=2, tokens_first=1, in_ring=1, stages=2),
        1,
        dense(150, 232, 640),
    ),
    "experts, sums in the ring, a cluster that shares tokens": (
        TileConfig(128, 64, 2, buffers=2, tokens_first=1, cluster=2, in_ring=1, stages=3),
        2,
        experts([130, 0, 5, 70], 328, 640),
    ),
    "experts, sums in the ring, a cluster that shares the weight": (
        TileConfig(64, 128, 2, row_groups=2, tokens_first=1, cluster=2, share_weight=1, in_ring=1, stages=2),
        2,
        experts([30, 0, 270], 136, 512),
    ),
    "experts, blocks of rows": (
        TileConfig(256, 32, row_blocks=2, row_groups=2, token_box=16, stages=2),
        1,
        experts([30, 5], 256, 256),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prints_the_models_bits(name, tmp_path, monkeypatch):
    config, processors, args = CASES[name]
    groups = 1 if args[4] is None else len(args[4])
    config = config._replace(groups=groups)
    library = build(tmp_path, config.program())
    printed = run(monkeypatch, library, processors, config, *args)
    print(name, printed.numel(), "outputs")
    assert bits_differ(expected(args), printed) == 0


# A case, and what is changed in the source.
SABOTAGE = {
    "the first K-block's scale": (
        "experts without rows and with many",
        "of[s][r] = from[r].load(s, left)",
        "of[s][r] = from[r].load(0, left)",
    ),
    "the stage's scales before": (
        "experts without rows and with many",
        "from[r].first += K_BLOCKS, from[r].second += K_BLOCKS;",
        ";",
    ),
    "the neighbour's scale": (
        "experts without rows and with many",
        "const float* place = token_scales + 8 * j",
        "const float* place = token_scales + 1 + 8 * j",
    ),
    "an expert's first token": (
        "experts without rows and with many",
        "tile.first_token = first_row[group] + chunk * size;",
        "tile.first_token = first_row[group] / 4 * 4 + chunk * size;",
    ),
    "K-blocks behind the last": (
        "depth that fills no stage, sums that vanish",
        "return make_float2(-1, -1);",
        "return make_float2(1, 1);",
    ),
    "the sums of another thread": (
        "warpgroups take stages in turn, several tiles",
        "const float4 four = shared.sums[i * 128 + thread];",
        "const float4 four = shared.sums[i * 128 + (thread ^ 1)];",
    ),
    "the other CTA's tokens": (
        "turns in a cluster that shares tokens, last tile empty",
        "k_block = rank * (K_BLOCKS / CLUSTER);",
        "k_block = 0;",
    ),
    "the other CTA's rows": (
        "a cluster that shares the weight, a chunk left over",
        "row = K_BLOCKS > 1 ? 0 : i * (TILE_ROWS / CLUSTER);",
        "row = 0;",
    ),
    "a shared part of the weight where there is none": (
        "a cluster that shares the weight, a chunk left over",
        "if (!tile.weight_shared) {",
        "if (false) {",
    ),
    "a chunk left over taken for the first": (
        "experts, a cluster that shares the weight",
        "chunk - shared + together * CLUSTER;",
        "chunk - shared;",
    ),
    "the other box of sums": (
        "experts, sums in the ring, a cluster that shares tokens",
        "IN_RING ? first / 64 * TOKEN_K_BLOCK_BYTES :",
        "IN_RING ? 0 :",
    ),
    "sums of a token behind the expert's last": (
        "experts, boxes of sums, a cluster that shares tokens",
        "int(first_token + 16 <= tile.token_count)",
        "1",
    ),
    "a stage that is given back while its sums are written": (
        "sums in the ring, last tiles not full",
        "    if (threadIdx.x % 32 == 0) wait_for_boxes_but<0>();\n",
        "",
    ),
    "a box that is filled while it is written": (
        "boxes of sums, last tiles not full",
        "wait_for_boxes_but<BOXES - 1>();",
        ";",
    ),
    "the border between scale blocks": (
        "tokens first, tiles across scale blocks",
        "return TILE_ROWS % 128 == 0 ? 128 : 128 - tile.first_row % 128;",
        "return 128;",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_kernel_is_caught(name, tmp_path, monkeypatch):
    case, *replacement = SABOTAGE[name]
    config, processors, args = CASES[case]
    config = config._replace(groups=1 if args[4] is None else len(args[4]))
    library = build(tmp_path, config.program(), [tuple(replacement)])
    assert bits_differ(expected(args), run(monkeypatch, library, processors, config, *args)) > 0
