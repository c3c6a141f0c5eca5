"""What the scoreboard measures: this package's kernels beside the best public ones, on DeepSeek-V3's shapes.

    python -m dsv3_plugin.kernels.bench.bench [--only dense] [--json FILE]

A time is the median over replays of a CUDA graph that holds the call several times, each time on other buffers, so that
the weights are not in the L2 cache; the spread is the 10th to the 90th percentile. The contenders of a case take turns.
The floor is the larger of bytes over 4.3 TB/s and operations over 1580 TFLOP/s in fp8 or 790 in bf16, what an H200 was
seen to reach. A peer that is not installed is named as absent; no time stands without its peer's. Records and tables:
`scoreboard`; clock: `measure`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import typer

from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels import provider
from dsv3_plugin.kernels.bench import scoreboard
from dsv3_plugin.kernels.bench.measure import (
    Call,
    RowBits,
    Rows,
    capture,
    compare_rows,
    differing_bits,
    time_in_turns,
    workspace_bytes,
)
from dsv3_plugin.kernels.bench.scoreboard import Record, Role, Scoreboard
from dsv3_plugin.kernels.cuda import mla_hopper
from dsv3_plugin.kernels.triton import combine, fp8_linear, linear, permute, quantize, rms_norm, router, silu_and_mul
from dsv3_plugin.kernels.vendors import cublas, transformer_engine
from dsv3_plugin.layers.moe import permutation
from dsv3_plugin.ops import fused
from dsv3_plugin.ops.fp8 import E4M3
from dsv3_plugin.profile import FP8_FLOAT32
from dsv3_plugin.registry import Ops, bind
from dsv3_plugin.version import __version__

app = typer.Typer(add_completion=False)

_BYTES_PER_US = 4.3e6
_FP8_PER_US = 1580e6
_BF16_PER_US = 790e6
_CACHE = 250_000_000
_DEVICE = "cuda"
_EXPERTS, _TOPK, _HIDDEN, _EXPERT_SIZE = 256, 8, 7168, 2048
_LOCAL_EXPERTS = 32
_VOCABULARY, _TEMPERATURE = 129280, 0.7
_MOST_ROWS = 4096
_DISTRIBUTIONS = ("triton", "vllm", "sglang", "sglang-kernel", "sgl-deep-gemm", "transformer-engine-torch")


@dataclass(frozen=True)
class Contenders:
    """The calls of one case, on buffers of their own. A text stands for a call that there is not, and says why."""

    ours: Call
    peers: dict[str, Call | str] = field(default_factory=dict)
    invariant: dict[str, Call | str] = field(default_factory=dict)
    """The peers' batch-invariant modes."""
    served: Call | None = None
    """What a model runs, where that may be another provider's kernel."""

    def all(self) -> Iterator[tuple[str, Role, Call | str]]:
        """Name, role and call of each, ours first."""
        yield "ours", "ours", self.ours
        if self.served:
            yield "served", "served", self.served
        for name, call in self.peers.items():
            yield name, "peer", call
        for name, call in self.invariant.items():
            yield name, "invariant", call


class Case(NamedTuple):
    """One row of the scoreboard."""

    name: str
    make: Callable[[], Contenders]
    bytes_moved: float
    fp8_operations: float = 0
    bf16_operations: float = 0
    rows: Callable[[], Rows] | None = None
    """Our operation on rows in any order and number, to compare their bits; once for all cases that share it."""

    @property
    def floor_us(self) -> float:
        """The time below which no kernel runs on an H200."""
        work = self.fp8_operations / _FP8_PER_US + self.bf16_operations / _BF16_PER_US
        return max(self.bytes_moved / _BYTES_PER_US, work)

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether moving the bytes takes longer than the operations."""
        return self.floor_us == self.bytes_moved / _BYTES_PER_US


def fp8_weight(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random e4m3 weight [..., N, K] and its scales."""
    values = torch.randint(-127, 127, shape, dtype=torch.int8, device=_DEVICE)
    values = torch.where((values & 0x7F) == 0x7F, 0, values).view(E4M3)
    scales = torch.rand(*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128, device=_DEVICE) + 0.5
    return values, scales


def bf16(*shape: int) -> torch.Tensor:
    """Normal bf16 numbers."""
    return torch.randn(shape, device=_DEVICE, dtype=torch.bfloat16)


def peer(build: Callable[[], Call]) -> Call | str:
    """A peer's call, or why there is none."""
    try:
        call = build()
        call()
        return call
    except ImportError as error:
        return f"not installed: {error.name}"
    except Exception as error:  # a scoreboard goes on without a peer, and says so
        return why_not(error)


def why_not(error: Exception) -> str:
    """Why a peer was not timed, in a few words."""
    if "NOT_SUPPORTED" in str(error):
        return "does not take this shape"
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0][:100]


@functools.cache
def served() -> Ops:
    """The kernels that a model gets on this machine."""
    return bind(Setting("cuda", "sm90", FP8_FLOAT32, (9, 0)), "fast", provider.dsv3_kernels())


def dense_cases() -> Iterator[Case]:
    """fp8 projections: decode with 1 to 128 tokens, prefill with 4096."""
    decoded = ((2112, 7168), (24576, 1536), (7168, 16384))
    shapes = [(m, n, k) for n, k in decoded for m in (1, 16, 64, 128, 4096)]
    shapes += [(4096, n, k) for n, k in ((36864, 7168), (7168, 18432))]
    rows = {(n, k): partial(_dense_rows, n, k) for _, n, k in shapes}
    for m, n, k in shapes:

        def make(m: int = m, n: int = n, k: int = k) -> Contenders:
            weight = fp8_weight(n, k)
            x = quantize.quantize_fp8(bf16(m, k), "float32")
            out = torch.empty(m, n, dtype=torch.bfloat16, device=_DEVICE)

            def deep_gemm() -> Call:
                import deep_gemm

                def call() -> torch.Tensor:
                    deep_gemm.fp8_gemm_nt(x, weight, out)
                    return out

                return call

            def cublaslt() -> Call:
                operands = *cublas.whole_rows(*x), weight[0], F.pad(weight[1], (0, -weight[1].shape[1] % 4))
                return lambda: cublas.product(*operands)[:m]

            return Contenders(
                lambda: fp8_linear.fp8_linear(*x, *weight),
                {"DeepGEMM": peer(deep_gemm), "cuBLASLt": peer(cublaslt)},
                served=lambda: served().fp8_linear(*x, *weight),
            )

        moved = m * k + n * k + 2 * m * n
        yield Case(f"fp8 {m} x {n} x {k}", make, moved, fp8_operations=2 * m * n * k, rows=rows[n, k])


def _dense_rows(n: int, k: int) -> Rows:
    weight = fp8_weight(n, k)
    values, scales = quantize.quantize_fp8(bf16(_MOST_ROWS, k), "float32")
    return Rows(_MOST_ROWS, lambda i: fp8_linear.fp8_linear(*fused.permute_fp8(values, scales, i), *weight))


def random_experts(tokens: int) -> torch.Tensor:
    """Expert numbers int64 [tokens, 8], ascending, every set equally likely."""
    return torch.rand(tokens, _EXPERTS, device=_DEVICE).topk(_TOPK).indices.sort().values


def grouped_cases() -> Iterator[Case]:
    """All experts of a layer on one card, and 32 of them with as many rows each. DeepGEMM gets rows that lie as it
    wants them already, at no cost.
    """
    for n, k in ((2 * _EXPERT_SIZE, _HIDDEN), (_HIDDEN, _EXPERT_SIZE)):
        weight = fp8_weight(_EXPERTS, n, k)
        rows = partial(_grouped_rows, weight)
        for tokens in (128, 1024, 4096):

            def make(
                tokens: int = tokens, n: int = n, k: int = k, weight: tuple[torch.Tensor, torch.Tensor] = weight
            ) -> Contenders:
                counts = torch.bincount(random_experts(tokens).flatten(), minlength=_EXPERTS)
                return _grouped_contenders(counts, weight, masked=tokens <= 128)

            hit = _EXPERTS * (1 - (1 - _TOPK / _EXPERTS) ** tokens)
            yield _grouped_case(f"grouped fp8 T={tokens}, 256 x {n} x {k}", make, hit, tokens * _TOPK, n, k, rows)
        for each in (16, 1024):

            def local(each: int = each, weight: tuple[torch.Tensor, torch.Tensor] = weight) -> Contenders:
                few = (weight[0][:_LOCAL_EXPERTS], weight[1][:_LOCAL_EXPERTS])
                counts = torch.full((_LOCAL_EXPERTS,), each, device=_DEVICE)
                return _grouped_contenders(counts, few, masked=True)

            name = f"grouped fp8 {_LOCAL_EXPERTS} experts x {each} rows, {n} x {k}"
            yield _grouped_case(name, local, _LOCAL_EXPERTS, _LOCAL_EXPERTS * each, n, k, rows)


def _grouped_case(
    name: str, make: Callable[[], Contenders], experts: float, rows: int, n: int, k: int, check: Callable[[], Rows]
) -> Case:
    return Case(name, make, experts * n * k + rows * (k + 2 * n), fp8_operations=2 * rows * n * k, rows=check)


def _grouped_contenders(counts: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], *, masked: bool) -> Contenders:
    """counts integers [E]; weight [E, N, K] and its scales."""
    experts, n, k = weight[0].shape
    rows = int(counts.sum())
    x = quantize.quantize_fp8(bf16(rows, k), "float32")

    def contiguous() -> Call:
        import deep_gemm

        align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        padded = (counts + align - 1) // align * align
        expert = torch.repeat_interleave(torch.arange(experts, device=_DEVICE), padded).to(torch.int32)
        wide = quantize.quantize_fp8(bf16(len(expert), k), "float32")
        out = torch.empty(len(expert), n, dtype=torch.bfloat16, device=_DEVICE)
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(wide, weight, out, expert)

    def in_rooms() -> Call:
        import deep_gemm

        room = max(128, -(-int(counts.max()) // 128) * 128)
        values, scales = quantize.quantize_fp8(bf16(experts * room, k), "float32")
        # Scales of neighbouring rows lie side by side, as DeepGEMM reads them; otherwise it copies them in each call.
        by_row = scales.reshape(experts, room, -1).transpose(1, 2).contiguous().transpose(1, 2)
        wide = values.view(experts, room, k), by_row
        out = torch.empty(experts, room, n, dtype=torch.bfloat16, device=_DEVICE)
        used, expected = counts.to(torch.int32), -(-rows // experts)
        return lambda: deep_gemm.fp8_m_grouped_gemm_nt_masked(wide, weight, out, used, expected)

    peers = {"DeepGEMM contiguous": peer(contiguous)}
    if masked:
        peers["DeepGEMM masked"] = peer(in_rooms)
    return Contenders(
        lambda: fp8_linear.grouped_fp8_linear(*x, counts, *weight),
        peers,
        served=lambda: served().grouped_fp8_linear(*x, counts, *weight),
    )


def _grouped_rows(weight: tuple[torch.Tensor, torch.Tensor]) -> Rows:
    """A row is a token with its eight experts."""
    ids, tokens = random_experts(_MOST_ROWS), bf16(_MOST_ROWS, weight[0].shape[2])

    def of(rows: torch.Tensor) -> torch.Tensor:
        source, slots, counts = permutation(ids[rows], _EXPERTS)
        x = quantize.quantize_fp8(tokens[rows][source], "float32")
        return fp8_linear.grouped_fp8_linear(*x, counts, *weight)[slots].flatten(1)

    return Rows(_MOST_ROWS, of)


def attention_cases() -> Iterator[Case]:
    """Absorbed MLA over pages of 64: decode, verify of two tokens, one long request."""
    rows = {heads: partial(_attention_rows, heads) for heads in (16, 128)}
    for requests, keys, heads, queries in (
        (128, 4096, 128, 1),
        (128, 4096, 16, 1),
        (128, 4096, 128, 2),
        (1, 65536, 128, 1),
        (1, 8192, 128, 512),
    ):

        def make(requests: int = requests, keys: int = keys, heads: int = heads, queries: int = queries) -> Contenders:
            pages = keys // 64
            cache = bf16(requests * pages, 64, 576) * 0.3
            table = torch.randperm(requests * pages, device=_DEVICE).to(torch.int32).view(requests, pages)
            lengths = torch.full((requests,), keys, device=_DEVICE, dtype=torch.int32)
            starts = torch.arange(requests + 1, device=_DEVICE, dtype=torch.int32) * queries
            q = bf16(requests * queries, heads, 576)
            scale = 192**-0.5

            def flash_mla() -> Call:
                from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

                metadata, splits = get_mla_metadata()
                shaped = q.view(requests, queries, heads, 576)

                def call() -> torch.Tensor:
                    return flash_mla_with_kvcache(
                        shaped, cache.unsqueeze(2), table, lengths, 512, metadata, splits, scale, causal=True
                    )[0]

                return call

            def one_split() -> Call:
                from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

                if queries > 1:
                    raise NotImplementedError("takes one token a request")
                keys_of_heads = cache.unsqueeze(2)
                out, lse = q.new_zeros(requests, heads, 512), q.new_zeros(requests, heads)
                parts = q.new_empty(requests, heads, 1, 513, dtype=torch.float32)
                # The cache's scales: made anew in each call, they cannot be captured.
                scales = dict.fromkeys(("k_scale", "v_scale"), q.new_ones((), dtype=torch.float32))

                def call() -> torch.Tensor:
                    kv = keys_of_heads, keys_of_heads[..., :512]
                    decode_attention_fwd(q, *kv, out, lse, table, lengths, parts, 1, scale, 64, is_mla=True, **scales)
                    return out

                return call

            return Contenders(
                lambda: mla_hopper.mla_attention(q, cache, table, lengths, starts, kv_lora_rank=512, scale=scale),
                {"FlashMLA": peer(flash_mla)},
                {"vLLM (Triton, one split)": peer(one_split)},
            )

        moved = requests * keys * 1152 + requests * queries * heads * 1088 * 2
        name = f"MLA B={requests} S={keys} h={heads} s_q={queries}"
        operations = 2 * requests * queries * heads * 1088 * (keys - (queries - 1) / 2)
        yield Case(name, make, moved, bf16_operations=operations, rows=rows[heads])


def _attention_rows(heads: int) -> Rows:
    """512 queries of each of eight requests: decoded one by one, or as chunks of 512."""
    chunk, requests, pages = 512, _MOST_ROWS // 512, 141
    q, cache = bf16(_MOST_ROWS, heads, 576), bf16(requests * pages, 64, 576) * 0.3
    table = torch.randperm(requests * pages, device=_DEVICE).to(torch.int32).view(requests, pages)
    lengths = torch.randint(chunk, pages * 64, (requests,), device=_DEVICE, dtype=torch.int32)
    seen = (lengths[:, None] - torch.arange(chunk - 1, -1, -1, device=_DEVICE, dtype=torch.int32)).flatten()
    request = torch.arange(_MOST_ROWS, device=_DEVICE) // chunk
    attend = partial(mla_hopper.mla_attention, kv_lora_rank=512, scale=192**-0.5)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        starts = torch.arange(len(rows) + 1, device=_DEVICE, dtype=torch.int32)
        return attend(q[rows], cache, table[request[rows]], seen[rows], starts)

    starts = torch.arange(requests + 1, device=_DEVICE, dtype=torch.int32) * chunk
    return Rows(_MOST_ROWS, decode, lambda: attend(q, cache, table, lengths, starts))


def bf16_cases() -> Iterator[Case]:
    """Router, output head and absorbed projections."""
    shapes = ((1, 256, 7168), (128, 256, 7168), (4096, 256, 7168), (1, 129280, 7168), (128, 129280, 7168))
    rows = {(n, k): partial(_bf16_rows, n, k) for _, n, k in shapes}
    for m, n, k in shapes:

        def make(m: int = m, n: int = n, k: int = k) -> Contenders:
            x, weight = bf16(m, k), bf16(n, k)

            def vllm() -> Call:
                from vllm.model_executor.layers.batch_invariant import matmul_persistent

                return lambda: matmul_persistent(x, weight.t())

            def deep_gemm() -> Call:
                import deep_gemm

                out = torch.empty(m, n, dtype=torch.bfloat16, device=_DEVICE)

                def call() -> torch.Tensor:
                    deep_gemm.bf16_gemm_nt(x, weight, out)
                    return out

                return call

            return Contenders(
                lambda: linear.linear(x, weight),
                {"cuBLAS": lambda: F.linear(x, weight), "DeepGEMM": peer(deep_gemm)},
                {"vLLM": peer(vllm)},
                served=lambda: served().linear(x, weight),
            )

        moved = 2 * (m * k + n * k + m * n)
        yield Case(f"bf16 {m} x {n} x {k}", make, moved, bf16_operations=2 * m * n * k, rows=rows[n, k])

    # The halves of kv_b_proj: queries to the latent, and the latent's sum to values.
    for name, n, k in (("W_UK", 512, 128), ("W_UV", 128, 512)):

        def absorbed(n: int = n, k: int = k) -> Contenders:
            x, weight = bf16(128, 128, k), bf16(128, n, k)
            return Contenders(
                lambda: linear.head_linear(x, weight),
                {"cuBLAS bmm": lambda: cublas.head_linear(x, weight)},
            )

        def heads_of(n: int = n, k: int = k) -> Rows:
            x, weight = bf16(_MOST_ROWS, 128, k), bf16(128, n, k)
            return Rows(_MOST_ROWS, lambda i: linear.head_linear(x[i], weight))

        moved = 2 * 128 * (128 * k + n * k + 128 * n)
        operations = 2 * 128 * 128 * n * k
        yield Case(f"{name} T=128, 128 x {n} x {k}", absorbed, moved, bf16_operations=operations, rows=heads_of)


def _bf16_rows(n: int, k: int) -> Rows:
    x, weight = bf16(_MOST_ROWS, k), bf16(n, k)
    return Rows(_MOST_ROWS, lambda i: linear.linear(x[i], weight))


_ROUTING: dict[str, Any] = {
    "num_experts_per_tok": _TOPK,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def small_cases() -> Iterator[Case]:
    """What is bound by memory or by a launch."""
    for m in (128, 4096):

        def norm(m: int = m) -> Contenders:
            x, weight = bf16(m, _HIDDEN), bf16(_HIDDEN)

            def vllm() -> Call:
                from vllm import _custom_ops

                out = torch.empty_like(x)
                return lambda: _custom_ops.rms_norm(out, x, weight, 1e-6)

            return Contenders(lambda: rms_norm.rms_norm(x, weight, 1e-6), {"vLLM rms_norm": peer(vllm)})

        def quantized(m: int = m) -> Contenders:
            x = bf16(m, _HIDDEN)

            def vllm() -> Call:
                from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

                return lambda: per_token_group_quant_fp8(x, 128, column_major_scales=True, use_ue8m0=True)

            theirs = partial(transformer_engine.quantize_fp8, x, "ue8m0")
            return Contenders(
                lambda: quantize.quantize_fp8(x, "ue8m0"),
                {"vLLM per_token_group_quant_fp8": peer(vllm), "TransformerEngine": peer(lambda: theirs)},
            )

        def swiglu(m: int = m) -> Contenders:
            x = bf16(m * _TOPK, 2 * _EXPERT_SIZE)

            def vllm() -> Call:
                import vllm._custom_ops  # noqa: F401

                out = torch.empty(len(x), _EXPERT_SIZE, dtype=x.dtype, device=_DEVICE)
                return lambda: torch.ops._C.silu_and_mul(out, x)

            return Contenders(lambda: silu_and_mul.silu_and_mul(x), {"vLLM silu_and_mul": peer(vllm)})

        def choose(m: int = m) -> Contenders:
            logits = torch.randn(m, _EXPERTS, device=_DEVICE)
            bias = torch.randn(_EXPERTS, device=_DEVICE) * 0.1
            x = bf16(m, 1)

            def vllm() -> Call:
                from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

                return lambda: grouped_topk(x, logits, _TOPK, True, 8, 4, "sigmoid", 2.5, bias)

            return Contenders(lambda: router.route(logits, bias, **_ROUTING), {"vLLM grouped_topk": peer(vllm)})

        def put_together(m: int = m) -> Contenders:
            rows, shared = bf16(m * _TOPK, _HIDDEN), bf16(m, _HIDDEN)
            slots = torch.randperm(m * _TOPK, device=_DEVICE).view(m, _TOPK)
            weights = torch.rand(m, _TOPK, device=_DEVICE)
            return Contenders(
                lambda: combine.combine(rows, slots, weights, shared),
                {"torch gather and sum": lambda: (rows[slots].float() * weights[..., None]).sum(1).bfloat16()},
            )

        yield Case(f"RMSNorm {m} x 7168", norm, m * _HIDDEN * 4, rows=_norm_rows)
        yield Case(f"quantize {m} x 7168", quantized, m * _HIDDEN * 3, rows=_quantize_rows)
        yield Case(f"SwiGLU {m * _TOPK} x 4096", swiglu, m * _TOPK * _EXPERT_SIZE * 6, rows=_swiglu_rows)
        yield Case(f"route {m} x 256", choose, m * _EXPERTS * 4, rows=_route_rows)
        yield Case(f"combine T={m}", put_together, m * (_TOPK + 2) * _HIDDEN * 2, rows=_combine_rows)
        yield from fused_cases(m)
    yield from log_softmax_cases()


def log_softmax_cases() -> Iterator[Case]:
    """torch's own, which servers and trainers take of logits / temperature: this package has no kernel for it."""
    for m in (1, 128, 4096):

        def make(m: int = m) -> Contenders:
            logits, temperature = torch.randn(m, _VOCABULARY, device=_DEVICE), _temperature()

            def vllm() -> Call:
                from vllm.model_executor.layers.batch_invariant import log_softmax

                return lambda: log_softmax(logits / temperature, dim=-1)

            return Contenders(lambda: torch.log_softmax(logits / temperature, -1), {}, {"vLLM": peer(vllm)})

        yield Case(f"log-softmax of torch {m} x {_VOCABULARY}", make, m * _VOCABULARY * 8, rows=_log_softmax_rows)


def _log_softmax_rows() -> Rows:
    logits, temperature = torch.randn(_MOST_ROWS, _VOCABULARY, device=_DEVICE), _temperature()
    return Rows(_MOST_ROWS, lambda i: torch.log_softmax(logits[i] / temperature, -1))


def _temperature() -> torch.Tensor:
    """On the card, as servers have it: a division by a Python number would be a product with its reciprocal there."""
    return torch.tensor(_TEMPERATURE, device=_DEVICE)


def fused_cases(m: int) -> Iterator[Case]:
    """What stands next to each other in a layer, in one kernel; vLLM's norm writes the sum over its input."""

    def blockwise(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> Call:
        from vllm import _custom_ops

        theirs = partial(_custom_ops.rms_norm_per_block_quant, x, weight, 1e-6, E4M3, [1, 128], None, residual, True)
        return theirs

    def norm_quantized() -> Contenders:
        x, weight = bf16(m, _HIDDEN), bf16(_HIDDEN)
        ours = partial(rms_norm.rms_norm_fp8, x, weight, 1e-6, "float32")
        return Contenders(ours, {"vLLM rms_norm_per_block_quant": peer(lambda: blockwise(x, weight))})

    def norm_of_sum() -> Contenders:
        x, addend, weight = bf16(m, _HIDDEN), bf16(m, _HIDDEN), bf16(_HIDDEN)

        def vllm() -> Call:
            from vllm import _custom_ops

            hidden, residual = x.clone(), addend.clone()
            return lambda: _custom_ops.fused_add_rms_norm(hidden, residual, weight, 1e-6)

        ours = partial(rms_norm.add_rms_norm, x, addend, weight, 1e-6)
        return Contenders(ours, {"vLLM fused_add_rms_norm": peer(vllm)})

    def norm_of_sum_quantized() -> Contenders:
        x, addend, weight = bf16(m, _HIDDEN), bf16(m, _HIDDEN), bf16(_HIDDEN)
        ours = partial(rms_norm.add_rms_norm_fp8, x, addend, weight, 1e-6, "float32")
        theirs = peer(lambda: blockwise(x, weight, addend.clone()))
        return Contenders(ours, {"vLLM rms_norm_per_block_quant, which writes no bf16": theirs})

    def swiglu_quantized() -> Contenders:
        x = bf16(m * _TOPK, 2 * _EXPERT_SIZE)

        def vllm() -> Call:
            from vllm import _custom_ops

            theirs = partial(_custom_ops.silu_and_mul_per_block_quant, x, 128, E4M3, None, True)
            return theirs

        ours = partial(silu_and_mul.silu_and_mul_fp8, x, "float32")
        return Contenders(ours, {"vLLM silu_and_mul_per_block_quant": peer(vllm)})

    def permuted() -> Contenders:
        x, rows = bf16(m, _HIDDEN), permutation(random_experts(m), _EXPERTS)[0]
        return Contenders(lambda: permute.permute(x, rows), {"torch": lambda: x[rows]})

    def permuted_quantized() -> Contenders:
        values, scales = quantize.quantize_fp8(bf16(m, _HIDDEN), "float32")
        rows = permutation(random_experts(m), _EXPERTS)[0]
        theirs = values.view(torch.int64)
        return Contenders(
            lambda: permute.permute_fp8(values, scales, rows), {"torch": lambda: (theirs[rows], scales[rows])}
        )

    def routed() -> Contenders:
        x, weight, bias = bf16(m, _HIDDEN), bf16(_EXPERTS, _HIDDEN), torch.randn(_EXPERTS, device=_DEVICE) * 0.1

        def vllm() -> Call:
            from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

            return lambda: grouped_topk(x, F.linear(x, weight).float(), _TOPK, True, 8, 4, "sigmoid", 2.5, bias)

        ours = partial(router.moe_router, x, weight, bias, **_ROUTING)
        return Contenders(ours, {"cuBLAS, then vLLM grouped_topk": peer(vllm)})

    row, expert_rows = m * _HIDDEN, m * _TOPK * _EXPERT_SIZE
    yield Case(f"RMSNorm, quantized {m} x 7168", norm_quantized, row * 3, rows=_norm_quantized_rows)
    yield Case(f"RMSNorm of a sum {m} x 7168", norm_of_sum, row * 8, rows=_norm_of_sum_rows)
    yield Case(
        f"RMSNorm of a sum, and quantized {m} x 7168", norm_of_sum_quantized, row * 9, rows=_norm_of_sum_quantized_rows
    )
    yield Case(f"SwiGLU, quantized {m * _TOPK} x 4096", swiglu_quantized, expert_rows * 5, rows=_swiglu_quantized_rows)
    yield Case(f"permute {m} x 7168 for 8 experts each", permuted, row * (_TOPK + 1) * 2, rows=_permute_rows)
    yield Case(
        f"permute in fp8 {m} x 7168 for 8 experts each",
        permuted_quantized,
        row * (_TOPK + 1),
        rows=_permute_quantized_rows,
    )
    moved = 2 * (row + _EXPERTS * _HIDDEN)
    operations = 2 * row * _EXPERTS
    yield Case(f"router T={m}", routed, moved, bf16_operations=operations, rows=_router_rows)


def _router_rows() -> Rows:
    x, weight, bias = bf16(_MOST_ROWS, _HIDDEN), bf16(_EXPERTS, _HIDDEN), torch.randn(_EXPERTS, device=_DEVICE) * 0.1
    return Rows(_MOST_ROWS, lambda i: _side_by_side(router.moe_router(x[i], weight, bias, **_ROUTING)))


def _side_by_side(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Results of a row in one, exact in fp32."""
    return torch.cat([result.float() for result in results], 1)


def _norm_rows() -> Rows:
    x, weight = bf16(_MOST_ROWS, _HIDDEN), bf16(_HIDDEN)
    return Rows(_MOST_ROWS, lambda i: rms_norm.rms_norm(x[i], weight, 1e-6))


def _norm_quantized_rows() -> Rows:
    x, weight = bf16(_MOST_ROWS, _HIDDEN), bf16(_HIDDEN)
    return Rows(_MOST_ROWS, lambda i: _side_by_side(rms_norm.rms_norm_fp8(x[i], weight, 1e-6, "float32")))


def _norm_of_sum_rows() -> Rows:
    x, addend, weight = bf16(_MOST_ROWS, _HIDDEN), bf16(_MOST_ROWS, _HIDDEN), bf16(_HIDDEN)
    return Rows(_MOST_ROWS, lambda i: _side_by_side(rms_norm.add_rms_norm(x[i], addend[i], weight, 1e-6)))


def _norm_of_sum_quantized_rows() -> Rows:
    x, addend, weight = bf16(_MOST_ROWS, _HIDDEN), bf16(_MOST_ROWS, _HIDDEN), bf16(_HIDDEN)
    fused_norm = partial(rms_norm.add_rms_norm_fp8, weight=weight, eps=1e-6, scale_format="float32")
    return Rows(_MOST_ROWS, lambda i: _side_by_side(fused_norm(x[i], addend[i])))


def _quantize_rows() -> Rows:
    x = bf16(_MOST_ROWS, _HIDDEN)
    return Rows(_MOST_ROWS, lambda i: _side_by_side(quantize.quantize_fp8(x[i], "float32")))


def _swiglu_rows() -> Rows:
    x = bf16(_MOST_ROWS, 2 * _EXPERT_SIZE)
    return Rows(_MOST_ROWS, lambda i: silu_and_mul.silu_and_mul(x[i]))


def _swiglu_quantized_rows() -> Rows:
    x = bf16(_MOST_ROWS, 2 * _EXPERT_SIZE)
    return Rows(_MOST_ROWS, lambda i: _side_by_side(silu_and_mul.silu_and_mul_fp8(x[i], "float32")))


def _permute_rows() -> Rows:
    x, source = bf16(_MOST_ROWS, _HIDDEN), torch.randperm(_MOST_ROWS, device=_DEVICE)
    return Rows(_MOST_ROWS, lambda i: permute.permute(x, source[i]))


def _permute_quantized_rows() -> Rows:
    values, scales = quantize.quantize_fp8(bf16(_MOST_ROWS, _HIDDEN), "float32")
    source = torch.randperm(_MOST_ROWS, device=_DEVICE)
    return Rows(_MOST_ROWS, lambda i: _side_by_side(permute.permute_fp8(values, scales, source[i])))


def _route_rows() -> Rows:
    logits, bias = torch.randn(_MOST_ROWS, _EXPERTS, device=_DEVICE), torch.randn(_EXPERTS, device=_DEVICE) * 0.1
    return Rows(_MOST_ROWS, lambda i: _side_by_side(router.route(logits[i], bias, **_ROUTING)))


def _combine_rows() -> Rows:
    x, shared = bf16(_MOST_ROWS * _TOPK, _HIDDEN), bf16(_MOST_ROWS, _HIDDEN)
    slots = torch.randperm(_MOST_ROWS * _TOPK, device=_DEVICE).view(_MOST_ROWS, _TOPK)
    weights = torch.rand(_MOST_ROWS, _TOPK, device=_DEVICE)
    return Rows(_MOST_ROWS, lambda i: combine.combine(x, slots[i], weights[i], shared[i]))


def moe_cases() -> Iterator[Case]:
    """The routed experts of one layer, from hidden states and the router's choice to the combined output."""
    gate_up = fp8_weight(_EXPERTS, 2 * _EXPERT_SIZE, _HIDDEN)
    down = fp8_weight(_EXPERTS, _HIDDEN, _EXPERT_SIZE)

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        rows, slots, counts = permutation(ids, _EXPERTS)
        quantized = permute.permute_fp8(*quantize.quantize_fp8(x, "float32"), rows)
        b = silu_and_mul.silu_and_mul_fp8(fp8_linear.grouped_fp8_linear(*quantized, counts, *gate_up), "float32")
        return combine.combine(fp8_linear.grouped_fp8_linear(*b, counts, *down), slots, weights, shared)

    def tokens_of(tokens: int) -> tuple[torch.Tensor, ...]:
        none = torch.zeros(tokens, _HIDDEN, device=_DEVICE, dtype=torch.bfloat16)
        return bf16(tokens, _HIDDEN), random_experts(tokens), torch.rand(tokens, _TOPK, device=_DEVICE), none

    def any_rows() -> Rows:
        made = tokens_of(_MOST_ROWS)
        return Rows(_MOST_ROWS, lambda i: experts(*(tensor[i] for tensor in made)))

    for tokens in (128, 4096):

        def make(tokens: int = tokens) -> Contenders:
            x, ids, weights, none = tokens_of(tokens)
            theirs = (x, gate_up, down, weights, ids.to(torch.int32))
            return Contenders(
                lambda: experts(x, ids, weights, none),
                {
                    "vLLM fused_experts": peer(lambda: _vllm_experts(*theirs)),
                    "SGLang fused_experts": peer(lambda: _sglang_experts(*theirs, deterministic=False)),
                },
                {
                    "vLLM fused_experts": peer(lambda: _vllm_invariant_experts(*theirs)),
                    "SGLang fused_experts": peer(lambda: _sglang_experts(*theirs, deterministic=True)),
                },
            )

        hit = _EXPERTS * (1 - (1 - _TOPK / _EXPERTS) ** tokens)
        rows = tokens * _TOPK
        moved = hit * 3 * _EXPERT_SIZE * _HIDDEN + rows * 2 * _HIDDEN
        operations = 2 * rows * 3 * _EXPERT_SIZE * _HIDDEN
        yield Case(f"routed experts of a layer T={tokens}", make, moved, fp8_operations=operations, rows=any_rows)


Weight = tuple[torch.Tensor, torch.Tensor]


def _vllm_experts(x: torch.Tensor, gate_up: Weight, down: Weight, weights: torch.Tensor, ids: torch.Tensor) -> Call:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    config = fp8_w8a8_moe_quant_config(gate_up[1], down[1], block_shape=[128, 128])

    def call() -> torch.Tensor:
        with set_current_vllm_config(VllmConfig()):
            return fused_experts(x, gate_up[0], down[0], weights, ids, quant_config=config)

    return call


def _vllm_invariant_experts(*arguments: Any) -> Call:
    call = _vllm_experts(*arguments)

    def in_that_mode() -> torch.Tensor:
        with mock.patch.dict(os.environ, VLLM_BATCH_INVARIANT="1"):
            return call()

    return in_that_mode


def _sglang_experts(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    deterministic: bool,
) -> Call:
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    _start_sglang()
    experts = len(gate_up[0])
    config = MoeRunnerConfig(num_experts=experts, num_local_experts=experts, inplace=False)
    chosen = StandardTopKOutput(weights, ids, None)
    arguments = ServerArgs(model_path="dummy", enable_deterministic_inference=deterministic)

    def call() -> torch.Tensor:
        publish(arguments, role="test")
        return fused_experts(
            x,
            gate_up[0],
            down[0],
            chosen,
            config,
            use_fp8_w8a8=True,
            w1_scale=gate_up[1],
            w2_scale=down[1],
            block_shape=[128, 128],
        )

    return call


@functools.cache
def _start_sglang() -> None:
    """SGLang's kernels ask for its process groups, even on one rank."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy"), role="test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method=address)
    initialize_model_parallel(backend="gloo")


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "dense": dense_cases,
    "attention": attention_cases,
    "grouped": grouped_cases,
    "moe": moe_cases,
    "bf16": bf16_cases,
    "small": small_cases,
}


def copy_of(bytes_moved: float) -> Call:
    """Read half of the bytes and write the other half, in whole pages."""
    source = torch.empty(max(1, round(bytes_moved / 2 / 4096)) * 4096, dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(group: str, case: Case, *, rotate: bool, rows: RowBits | None) -> list[Record]:
    """All contenders of a case; with `rotate` each replayed call has buffers of its own."""
    copies = max(1, min(16, round(_CACHE / case.bytes_moved))) if rotate else 1
    made = [list(case.make().all()) for _ in range(copies)]
    if case.is_bound_by_memory:
        for contenders in made:
            contenders.append(("copy", "copy", copy_of(case.bytes_moved)))
    found: list[dict[str, Any]] = []
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    ours: Any = None
    for index, (name, role, first) in enumerate(made[0]):
        known: dict[str, Any] = {"group": group, "case": case.name, "floor_us": case.floor_us}
        known |= {"contender": name, "role": role}
        found.append(known)
        if isinstance(first, str):
            known["absent"] = first
            continue
        calls: list[Call] = [contenders[index][2] for contenders in made]  # type: ignore[misc]
        try:
            workspace = workspace_bytes(first)
            result = first()
            graphs[index] = capture(calls)
        except RuntimeError as error:
            torch.cuda.synchronize()
            known["absent"] = f"not timed: {why_not(error)}"
            continue
        known["workspace_bytes"] = workspace
        if role == "ours":
            ours = result.clone() if isinstance(result, torch.Tensor) else result
            if rows:
                known |= {"rows_compared": rows.compared, "rows_differ": rows.differ}
        elif role != "copy" and (wrong := differing_bits(ours, result)) is not None:
            outputs = ours if isinstance(ours, tuple) else (ours,)
            known |= {"differs": wrong, "outputs": sum(x.numel() for x in outputs)}
    times = time_in_turns(graphs, copies)
    for index, taken in times.items():
        found[index] |= {"median_us": taken.median, "low_us": taken.low, "high_us": taken.high}
    return [Record(**known) for known in found]


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Groups: {', '.join(GROUPS)}. Repeat it.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the measurements to this file.")] = None,
    rows: Annotated[bool, typer.Option(help="Also compare our rows' bits over batches.")] = True,
) -> None:
    """Measure this package's kernels and their peers on the card of this machine."""
    unknown = sorted(set(only or ()) - set(GROUPS))
    if unknown:
        raise KernelError(f"there is no group {', '.join(unknown)}; the groups are {', '.join(GROUPS)}")
    if json and json.exists():
        raise KernelError(f"{json} exists; name another file")
    compared: dict[Callable[[], Rows], RowBits] = {}
    records: list[Record] = []
    failed: list[str] = []
    print("\n".join(scoreboard.HEADER), flush=True)
    for group in only or GROUPS:
        for case in GROUPS[group]():
            try:
                if rows and case.rows and case.rows not in compared:
                    compared[case.rows] = compare_rows(case.rows())
                found = compared.get(case.rows) if case.rows else None
                # The experts' weights are larger than the cache by themselves, and shared by the copies.
                measured = measure(group, case, rotate=group not in ("grouped", "moe"), rows=found)
            except Exception as error:  # the other cases are measured, and the exit status says that one was not
                failed.append(f"{case.name}: {type(error).__name__}: {error}")
                continue
            print(scoreboard.row(measured), flush=True)
            records += measured
            torch.cuda.empty_cache()
            if json:  # now, so that a run that ends early leaves what it has
                board = Scoreboard(card=torch.cuda.get_device_name(), versions=versions(), records=tuple(records))
                json.write_text(board.model_dump_json(indent=1, exclude_none=True) + "\n")
    if failed:
        raise KernelError("not measured: " + "; ".join(failed))


def versions() -> dict[str, str]:
    """This package, torch, and the peers that are installed."""
    found = {"dsv3-plugin": __version__, "torch": torch.__version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    app()
