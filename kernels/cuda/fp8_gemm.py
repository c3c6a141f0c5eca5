"""Block-scaled fp8 products in CUDA C++ (fp8_gemm.cu): tile configurations for few tokens, many, and experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.triton.scales import with_contiguous_columns


class TileConfig(NamedTuple):
    """A tile configuration of fp8_gemm.cu; the names are explained there."""

    tile_rows: int
    tokens: int
    k_blocks: int = 1
    row_blocks: int = 1
    row_groups: int = 1
    k_groups: int = 1
    cluster: int = 1
    share_weight: int = 0
    tokens_first: int = 0
    token_box: int = 0
    token_parts: int = 1
    buffers: int = 1
    registers: int = 0
    groups: int = 1
    out_boxes: int = 0
    in_ring: int = 0
    stages: int = 0

    @property
    def box(self) -> int:
        """Tokens a copy."""
        return self.token_box or self.tokens

    def clusters(self, columns: int, rows: int) -> int:
        """How many have a tile each of a dense product."""
        chunks = -(-rows // self.tokens)
        groups, left = divmod(-(-columns // self.tile_rows), self.cluster)
        last = left * (chunks // self.cluster) + chunks % self.cluster if self.share_weight else chunks
        return groups * chunks + (last if left else 0)

    @property
    def token_copy(self) -> tuple[int, int]:
        """Tokens and K-blocks that are copied at once."""
        return self.box, self.k_blocks if self.share_weight else max(1, self.k_blocks // self.cluster)

    @property
    def weight_copy(self) -> tuple[int, int]:
        """Rows of the weight and K-blocks that are copied at once."""
        if not self.share_weight:
            return self.tile_rows, self.k_blocks
        if self.k_blocks > 1:
            return self.tile_rows, self.k_blocks // self.cluster
        return self.tile_rows // self.cluster, 1

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.row_groups * self.k_groups

    @property
    def scale_box(self) -> int:
        """Tokens' scales a copy."""
        return self.tokens + (4 if self.groups > 1 else 0)

    def shared_bytes(self, stages: int) -> int:
        """Shared memory of a CTA."""
        tokens = -(-self.tokens // self.box) * self.box
        scales = -(-self.k_blocks * self.scale_box * 4 // 128) * 128
        ring = stages * (128 * self.k_blocks * (self.tile_rows + tokens) + scales + 16)
        if self.tokens_first:
            unused_rows, out = 0, 0 if self.in_ring else 8192 * max(1, self.out_boxes)
        else:
            unused_rows, out = 64 * self.row_blocks * self.row_groups - self.tile_rows, 144 * self.tokens
        sums = 256 * (self.tile_rows if self.tokens_first else self.tokens) if self.k_groups > 1 else 0
        return ring + 128 * unused_rows + self.consumers * out + sums + 8 * (self.groups + 1 + self.k_groups)

    def filled(self, most: int = 32) -> TileConfig:
        """With as many stages as there is room for."""
        return self._replace(stages=max(n for n in range(1, most + 1) if self.shared_bytes(n) <= compiler.SHARED_BYTES))

    def program(self) -> compiler.Program:
        """What is to be compiled."""
        parameters = {
            "TILE_ROWS": self.tile_rows,
            "ROW_BLOCKS": self.row_blocks,
            "ROW_GROUPS": self.row_groups,
            "K_GROUPS": self.k_groups,
            "CLUSTER": self.cluster,
            "SHARE_WEIGHT": self.share_weight,
            "TOKENS_FIRST": self.tokens_first,
            "TOKENS": self.tokens,
            "TOKEN_BOX": self.box,
            "TOKEN_PARTS": self.token_parts,
            "BUFFERS": self.buffers,
            "STAGES": self.stages,
            "K_BLOCKS": self.k_blocks,
            "GROUPS": self.groups,
            "OUT_BOXES": self.out_boxes,
            "IN_RING": self.in_ring,
            "CONSUMER_REGISTERS": self.registers,
        }
        seconds = [self.tile_rows] if self.tokens_first else range(16, self.tokens + 1, 16)
        widths = tuple(n // self.token_parts for n in seconds)
        return compiler.Program("fp8_gemm.cu", tuple(parameters.items()), widths)


# Tiles for many tokens: two K-blocks a stage, whose memory the sums take; and wider ones, which read operands less.
_MANY = TileConfig(128, 128, 2, row_groups=2, cluster=2, tokens_first=1, buffers=2, registers=240, in_ring=1)
_WIDE = TileConfig(192, 128, row_groups=2, cluster=2, share_weight=1, tokens_first=1, registers=240, out_boxes=3)
_WIDEST = TileConfig(
    256, 128, row_groups=2, cluster=2, tokens_first=1, token_box=64, token_parts=2, registers=240, out_boxes=2
)
_WIDEST_SHARED_WEIGHT = _WIDEST._replace(share_weight=1, token_box=0)

# Configurations that differ in kind: what is compiled without a GPU and checked at random shapes.
DENSE_SAMPLE = (
    TileConfig(16, 16, 4, k_groups=3),
    TileConfig(56, 16, 4, k_groups=3),
    TileConfig(32, 32, 4, buffers=4),
    TileConfig(192, 64, 2, row_groups=3, cluster=2),
    TileConfig(192, 128, row_groups=3, registers=160),
    TileConfig(16, 64, 4, k_groups=3, tokens_first=1),
    TileConfig(56, 64, 4, buffers=4, tokens_first=1),
    TileConfig(128, 128, 2, row_groups=2, cluster=2, tokens_first=1, buffers=2, registers=240),
    _MANY,
    _WIDE,
    _WIDEST,
    TileConfig(112, 64, 2, cluster=2, share_weight=1, tokens_first=1, buffers=2),
    TileConfig(
        192, 128, row_groups=2, cluster=2, share_weight=1, tokens_first=1, token_parts=2, buffers=2, registers=240
    ),
)
GROUPED_SAMPLE = (
    TileConfig(128, 16, 4, row_groups=2, buffers=4),
    TileConfig(128, 48, 2, row_groups=2, buffers=2),
    TileConfig(256, 144, row_blocks=2, row_groups=2, token_box=48, registers=240),
    _MANY,
    _MANY._replace(share_weight=1),
    _WIDE,
    _WIDE._replace(share_weight=0, token_box=64),
    _WIDEST._replace(cluster=1),
    _WIDEST,
    _WIDEST_SHARED_WEIGHT,
)


def dense_configs(columns: int, rows: int, multiprocessors: int) -> Iterator[TileConfig]:
    """Configurations to choose from: tiles that give every multiprocessor equally much, and larger ones."""
    for config in _dense_configs(columns, rows, multiprocessors):
        if config.filled().stages >= max(2, config.k_groups):
            yield config


def _dense_configs(columns: int, rows: int, multiprocessors: int) -> Iterator[TileConfig]:

    def share(most: int) -> int:
        waves = -(-columns // (multiprocessors * most))
        return max(16, -(-columns // (multiprocessors * waves * 8)) * 8)

    one, three = share(64), share(192)
    if rows <= 16:
        yield TileConfig(one, 16, 4, k_groups=3)
        yield TileConfig(three, 16, 2, row_groups=3, buffers=2)
    elif rows <= 64:
        if rows <= 32:
            yield TileConfig(one, 32, 4, k_groups=3, registers=160)
            yield TileConfig(three, 32, 2, row_groups=3, buffers=2)
        yield TileConfig(one, 64, 4, k_groups=3, tokens_first=1, registers=160)
        yield TileConfig(one, 64, 4, buffers=4, tokens_first=1)
        yield TileConfig(one, 64, 4, cluster=2, buffers=4, tokens_first=1)
    elif rows <= 256:
        yield TileConfig(min(64, 2 * one), 64, 4, tokens_first=1, buffers=4)
        yield TileConfig(2 * one, 64, 2, cluster=2, share_weight=1, tokens_first=1, buffers=2)
        yield TileConfig(2 * one, 64, 4, cluster=2, share_weight=1, tokens_first=1, buffers=2)
        yield TileConfig(one, 128, 2, row_groups=2, tokens_first=1, buffers=2)
        yield _MANY
    else:
        yield _MANY
        yield _WIDE
        yield _WIDEST
        yield _WIDEST_SHARED_WEIGHT


def grouped_configs(rows: int) -> Iterator[TileConfig]:
    """The same for experts with `rows` tokens each, on average."""
    if rows <= 16:
        yield TileConfig(128, 16, 1, row_groups=2)
        yield TileConfig(128, 16, 4, row_groups=2, buffers=4)
        yield TileConfig(256, 16, 1, row_blocks=2, row_groups=2, buffers=2)
        yield TileConfig(128, 32, 2, row_groups=2, buffers=2)
    elif rows <= 64:
        yield TileConfig(128, 48, 2, row_groups=2, buffers=2)
        yield TileConfig(128, 64, 1, row_groups=2, token_box=32)
        yield TileConfig(128, 96, 1, row_groups=2, token_box=48)
        yield TileConfig(256, 96, 1, row_blocks=2, row_groups=2, token_box=48, registers=232)
    else:
        yield TileConfig(256, 144, 1, row_blocks=2, row_groups=2, token_box=48, registers=240)
        yield TileConfig(128, 192, 1, row_groups=2, token_box=64, registers=240)
        yield _MANY
        yield _WIDE
        yield _WIDE._replace(share_weight=0, token_box=64)
        yield _WIDEST
        yield _WIDEST_SHARED_WEIGHT


def compile_all(configs: Iterable[TileConfig]) -> None:
    """Compile many programs at a time, so that their first calls find them in the cache."""
    programs = {config.filled().program() for config in configs}
    with ThreadPoolExecutor() as pool:
        list(pool.map(compiler.compile_program, programs))


def serves(columns: int) -> bool:
    """Whether the kernel can run: outputs are written 16 bytes at a time."""
    return columns % 8 == 0 and compiler.available()


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_counts: torch.Tensor | None,
    out: torch.Tensor,
    config: TileConfig,
) -> None:
    """Write out bf16 [M, N] from checked operands; weight is [N, K], or [E, N, K] with expert_counts [E]."""
    (rows, depth), columns = x.shape, weight.shape[-2]
    x_scale = with_contiguous_columns(x_scale)
    weight_rows = weight.numel() // depth
    clusters = torch.cuda.get_device_properties(x.device).multi_processor_count // config.cluster
    if expert_counts is None:
        clusters = min(clusters, config.clusters(columns, rows))
    blocks = depth // 128
    scale_box = (config.scale_box, config.k_blocks)
    arguments = (
        _k_blocks(x, rows, depth, (128, *config.token_copy)),
        compiler.tensor_map("fp32", x_scale.data_ptr(), (rows, blocks), (4 * x_scale.stride(1),), scale_box),
        _k_blocks(weight, weight_rows, depth, (128, *config.weight_copy)),
        compiler.tensor_map("bf16", out.data_ptr(), (columns, rows), (2 * columns,), (64, 16)),
        weight_scale,
        None if expert_counts is None else expert_counts.long(),
        out,
        rows,
        columns,
        blocks,
        config.groups,
    )
    block = 128 * config.consumers + (128 if config.registers else 32)
    how = compiler.Launch(clusters * config.cluster, block, config.shared_bytes(config.stages), pdl=True)
    compiler.launch(config.program(), "fp8_gemm", how, arguments)


def _k_blocks(matrix: torch.Tensor, rows: int, depth: int, box: tuple[int, ...]) -> Any:
    """A map of an e4m3 matrix [rows, depth] as (128, rows, depth / 128)."""
    return compiler.tensor_map("e4m3", matrix.data_ptr(), (128, rows, depth // 128), (depth, 128), box)
