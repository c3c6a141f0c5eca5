"""The scoreboard: this package's kernels beside the best public ones, on DeepSeek-V3's shapes, in one run.

    python -m dsv3_plugin.kernels.bench [--only dense] [--markdown FILE]

A time is the median over replays of a CUDA graph that holds the call several times, each time on other buffers, so that
the weights are not in the L2 cache; the spread is the 10th to the 90th percentile. The floor is the larger of bytes
over 4.3 TB/s and operations over 1580 TFLOP/s in fp8 or 790 in bf16, what an H200 was seen to reach. `differs` counts
outputs whose bits are not ours. A peer that is not installed is named as absent; no time stands without its peer's.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer

from dsv3_plugin.kernels import (
    bf16_linear,
    combine,
    fp8_linear,
    mla,
    quantize,
    rms_norm,
    router,
    silu_and_mul,
)
from dsv3_plugin.ops.fp8 import E4M3

app = typer.Typer(add_completion=False)

_BYTES_PER_US = 4.3e6
_FP8_PER_US = 1580e6
_BF16_PER_US = 790e6
_CACHE = 250_000_000
_DEVICE = "cuda"
_EXPERTS, _TOPK, _HIDDEN, _EXPERT_SIZE = 256, 8, 7168, 2048

Call = Callable[[], Any]


class Case(NamedTuple):
    """One row of the scoreboard: `make` builds the calls by name, ours first, on buffers of their own."""

    name: str
    make: Callable[[], dict[str, Call | str]]
    bytes_moved: float
    fp8_operations: float = 0
    bf16_operations: float = 0

    @property
    def floor_us(self) -> float:
        """The time below which no kernel runs on an H200."""
        work = self.fp8_operations / _FP8_PER_US + self.bf16_operations / _BF16_PER_US
        return max(self.bytes_moved / _BYTES_PER_US, work)


class Time(NamedTuple):
    """Microseconds of one call."""

    median: float
    low: float
    high: float


def time_calls(calls: list[Call], replays: int = 15) -> Time:
    """Replay a graph of `calls`, each on other buffers."""
    calls[0]()
    torch.cuda.synchronize()  # the other stream does not wait for inputs that are still being made
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    times = []
    for _ in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    deciles = statistics.quantiles(times[3:], n=10)
    return Time(statistics.median(times[3:]), deciles[0], deciles[-1])


def differing_bits(ours: Any, peer: Any) -> int | None:
    """How many bf16 outputs differ; None where the results are not of one shape and dtype."""
    if not (isinstance(ours, torch.Tensor) and isinstance(peer, torch.Tensor)):
        return None
    if ours.shape != peer.shape or ours.dtype != peer.dtype or ours.dtype != torch.bfloat16:
        return None
    return int((ours.contiguous().view(torch.int16) != peer.contiguous().view(torch.int16)).sum())


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
    except Exception as error:  # a scoreboard goes on without a peer, and says so
        return f"{type(error).__name__}: {error}".splitlines()[0][:60]


def dense_cases() -> Iterator[Case]:
    """fp8 projections: prefill with 4096 tokens, decode with 1 to 128."""
    prefill = [(4096, n, k) for n, k in ((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432))]
    decode = [(m, n, k) for n, k in ((2112, 7168), (24576, 1536), (7168, 16384)) for m in (1, 16, 64, 128)]
    for m, n, k in prefill + decode:

        def make(m: int = m, n: int = n, k: int = k) -> dict[str, Call | str]:
            weight = fp8_weight(n, k)
            x = quantize.quantize_fp8(bf16(m, k), "float32")
            out = torch.empty(m, n, dtype=torch.bfloat16, device=_DEVICE)

            def deep_gemm() -> Call:
                import deep_gemm

                def call() -> torch.Tensor:
                    deep_gemm.fp8_gemm_nt(x, weight, out)
                    return out

                return call

            return {"ours": lambda: fp8_linear.fp8_linear(*x, *weight), "DeepGEMM": peer(deep_gemm)}

        yield Case(f"fp8 {m} x {n} x {k}", make, m * k + n * k + 2 * m * n, fp8_operations=2 * m * n * k)


def random_experts(tokens: int) -> torch.Tensor:
    """Expert numbers int64 [tokens, 8], ascending, every set equally likely."""
    return torch.rand(tokens, _EXPERTS, device=_DEVICE).topk(_TOPK).indices.sort().values


def sort_by_expert(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, slots, counts) for grouped products, in operations that a CUDA graph can hold."""
    flat = ids.flatten()
    expert, order = torch.sort(flat, stable=True)
    slots = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(expert, torch.arange(_EXPERTS, device=expert.device), right=True)
    return order // _TOPK, slots.view_as(ids), ends.diff(prepend=ends.new_zeros(1))


def grouped_cases() -> Iterator[Case]:
    """All experts of a layer on one card. DeepGEMM gets rows that are padded to its alignment already, at no cost."""
    for n, k in ((2 * _EXPERT_SIZE, _HIDDEN), (_HIDDEN, _EXPERT_SIZE)):
        weight = fp8_weight(_EXPERTS, n, k)
        for tokens in (128, 1024, 4096):

            def make(
                tokens: int = tokens, n: int = n, k: int = k, weight: tuple[torch.Tensor, torch.Tensor] = weight
            ) -> dict[str, Call | str]:
                counts = torch.bincount(random_experts(tokens).flatten(), minlength=_EXPERTS)
                x = quantize.quantize_fp8(bf16(tokens * _TOPK, k), "float32")

                def deep_gemm() -> Call:
                    import deep_gemm

                    align = deep_gemm.get_mk_alignment_for_contiguous_layout()
                    padded = (counts + align - 1) // align * align
                    rows = torch.repeat_interleave(torch.arange(_EXPERTS, device=_DEVICE), padded).to(torch.int32)
                    wide = quantize.quantize_fp8(bf16(len(rows), k), "float32")
                    out = torch.empty(len(rows), n, dtype=torch.bfloat16, device=_DEVICE)
                    return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(wide, weight, out, rows)

                return {
                    "ours": lambda: fp8_linear.grouped_fp8_linear(*x, counts, *weight),
                    "DeepGEMM contiguous, padded": peer(deep_gemm),
                }

            rows = tokens * _TOPK
            hit = _EXPERTS * (1 - (1 - _TOPK / _EXPERTS) ** tokens)
            moved = hit * n * k + rows * (k + 2 * n)
            yield Case(f"grouped fp8 T={tokens}, 256 x {n} x {k}", make, moved, fp8_operations=2 * rows * n * k)


def attention_cases() -> Iterator[Case]:
    """Absorbed MLA over pages of 64: decode, verify of two tokens, one long request."""
    for requests, keys, heads, queries in (
        (128, 4096, 128, 1),
        (128, 4096, 16, 1),
        (128, 4096, 128, 2),
        (1, 65536, 128, 1),
        (1, 8192, 128, 512),
    ):

        def make(
            requests: int = requests, keys: int = keys, heads: int = heads, queries: int = queries
        ) -> dict[str, Call | str]:
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
                    raise NotImplementedError("decodes one token a request")
                keys_of_heads = cache.unsqueeze(2)
                out, lse = q.new_zeros(requests, heads, 512), q.new_zeros(requests, heads)
                parts = q.new_empty(requests, heads, 1, 513, dtype=torch.float32)

                def call() -> torch.Tensor:
                    values = keys_of_heads[..., :512]
                    decode_attention_fwd(
                        q, keys_of_heads, values, out, lse, table, lengths, parts, 1, scale, 64, is_mla=True
                    )
                    return out

                return call

            return {
                "ours": lambda: mla.mla_attention(q, cache, table, lengths, starts, kv_lora_rank=512, scale=scale),
                "FlashMLA": peer(flash_mla),
                "vLLM batch-invariant (Triton, one split)": peer(one_split),
            }

        moved = requests * keys * 1152 + requests * queries * heads * 1088 * 2
        name = f"MLA B={requests} S={keys} h={heads} s_q={queries}"
        operations = 2 * requests * queries * heads * 1088 * (keys - (queries - 1) / 2)
        yield Case(name, make, moved, bf16_operations=operations)


def bf16_cases() -> Iterator[Case]:
    """Router, output head and absorbed projections."""
    for m, n, k in ((1, 256, 7168), (128, 256, 7168), (4096, 256, 7168), (1, 129280, 7168), (128, 129280, 7168)):

        def make(m: int = m, n: int = n, k: int = k) -> dict[str, Call | str]:
            x, weight = bf16(m, k), bf16(n, k)

            def vllm() -> Call:
                from vllm.model_executor.layers.batch_invariant import matmul_persistent

                return lambda: matmul_persistent(x, weight.t())

            return {
                "ours": lambda: bf16_linear.linear(x, weight),
                "cuBLAS": lambda: torch.nn.functional.linear(x, weight),
                "vLLM batch-invariant": peer(vllm),
            }

        yield Case(f"bf16 {m} x {n} x {k}", make, 2 * (m * k + n * k + m * n), bf16_operations=2 * m * n * k)

    def absorbed() -> dict[str, Call | str]:
        x, weight = bf16(128, 128, 128), bf16(128, 512, 128)
        return {
            "ours": lambda: bf16_linear.head_linear(x, weight),
            "cuBLAS bmm": lambda: torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1),
        }

    moved = 2 * 128 * (128 * 128 + 512 * 128 + 128 * 512)
    yield Case("head_linear T=128, 128 x 512 x 128", absorbed, moved, bf16_operations=2 * 128 * 128 * 512 * 128)


def small_cases() -> Iterator[Case]:
    """What is bound by memory or by a launch."""
    for m in (128, 4096):

        def norm(m: int = m) -> dict[str, Call | str]:
            x, weight = bf16(m, _HIDDEN), bf16(_HIDDEN)

            def vllm() -> Call:
                from vllm import _custom_ops

                out = torch.empty_like(x)
                return lambda: _custom_ops.rms_norm(out, x, weight, 1e-6)

            return {"ours": lambda: rms_norm.rms_norm(x, weight, 1e-6), "vLLM rms_norm": peer(vllm)}

        def quantise(m: int = m) -> dict[str, Call | str]:
            x = bf16(m, _HIDDEN)

            def vllm() -> Call:
                from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

                return lambda: per_token_group_quant_fp8(x, 128, column_major_scales=True)

            return {
                "ours, power-of-two scales": lambda: quantize.quantize_fp8(x, "ue8m0"),
                "vLLM per_token_group_quant_fp8": peer(vllm),
            }

        def swiglu(m: int = m) -> dict[str, Call | str]:
            x = bf16(m * _TOPK, 2 * _EXPERT_SIZE)

            def vllm() -> Call:
                import vllm._custom_ops  # noqa: F401

                out = torch.empty(len(x), _EXPERT_SIZE, dtype=x.dtype, device=_DEVICE)
                return lambda: torch.ops._C.silu_and_mul(out, x)

            return {"ours": lambda: silu_and_mul.silu_and_mul(x), "vLLM silu_and_mul": peer(vllm)}

        def choose(m: int = m) -> dict[str, Call | str]:
            logits = torch.randn(m, _EXPERTS, device=_DEVICE)
            bias = torch.randn(_EXPERTS, device=_DEVICE) * 0.1
            x = bf16(m, 1)

            def vllm() -> Call:
                from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

                return lambda: grouped_topk(x, logits, _TOPK, True, 8, 4, "sigmoid", 2.5, bias)

            return {
                "ours": lambda: router.route(
                    logits,
                    bias,
                    num_experts_per_tok=_TOPK,
                    n_group=8,
                    topk_group=4,
                    norm_topk_prob=True,
                    routed_scaling_factor=2.5,
                ),
                "vLLM grouped_topk": peer(vllm),
            }

        def put_together(m: int = m) -> dict[str, Call | str]:
            rows, shared = bf16(m * _TOPK, _HIDDEN), bf16(m, _HIDDEN)
            slots = torch.randperm(m * _TOPK, device=_DEVICE).view(m, _TOPK)
            weights = torch.rand(m, _TOPK, device=_DEVICE)
            return {
                "ours": lambda: combine.combine(rows, slots, weights, shared),
                "torch gather and sum": lambda: (rows[slots].float() * weights[..., None]).sum(1).bfloat16(),
            }

        yield Case(f"RMSNorm {m} x 7168", norm, m * _HIDDEN * 4)
        yield Case(f"quantise {m} x 7168", quantise, m * _HIDDEN * 3)
        yield Case(f"SwiGLU {m * _TOPK} x 4096", swiglu, m * _TOPK * _EXPERT_SIZE * 6)
        yield Case(f"route {m} x 256", choose, m * _EXPERTS * 4)
        yield Case(f"combine T={m}", put_together, m * (_TOPK + 2) * _HIDDEN * 2)


def moe_cases() -> Iterator[Case]:
    """The routed experts of one layer, from hidden states and the router's choice to the combined output."""
    gate_up = fp8_weight(_EXPERTS, 2 * _EXPERT_SIZE, _HIDDEN)
    down = fp8_weight(_EXPERTS, _HIDDEN, _EXPERT_SIZE)
    for tokens in (128, 4096):

        def make(tokens: int = tokens) -> dict[str, Call | str]:
            x, none = bf16(tokens, _HIDDEN), torch.zeros(tokens, _HIDDEN, device=_DEVICE, dtype=torch.bfloat16)
            ids = random_experts(tokens)
            weights = torch.rand(tokens, _TOPK, device=_DEVICE)

            def ours() -> torch.Tensor:
                rows, slots, counts = sort_by_expert(ids)
                a = fp8_linear.grouped_fp8_linear(*quantize.quantize_fp8(x[rows], "float32"), counts, *gate_up)
                b = quantize.quantize_fp8(silu_and_mul.silu_and_mul(a), "float32")
                return combine.combine(fp8_linear.grouped_fp8_linear(*b, counts, *down), slots, weights, none)

            def vllm() -> Call:
                from vllm.config import VllmConfig, set_current_vllm_config
                from vllm.model_executor.layers.fused_moe import fused_experts
                from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

                config = fp8_w8a8_moe_quant_config(gate_up[1], down[1], block_shape=[128, 128])
                narrow = ids.to(torch.int32)

                def call() -> torch.Tensor:
                    with set_current_vllm_config(VllmConfig()):
                        return fused_experts(x, gate_up[0], down[0], weights, narrow, quant_config=config)

                return call

            def vllm_invariant() -> Call:
                call = vllm()

                def in_that_mode() -> torch.Tensor:
                    with mock.patch.dict(os.environ, VLLM_BATCH_INVARIANT="1"):
                        return call()

                return in_that_mode

            return {
                "ours": ours,
                "vLLM fused_experts": peer(vllm),
                "vLLM fused_experts, batch-invariant": peer(vllm_invariant),
            }

        hit = _EXPERTS * (1 - (1 - _TOPK / _EXPERTS) ** tokens)
        rows = tokens * _TOPK
        moved = hit * 3 * _EXPERT_SIZE * _HIDDEN + rows * 2 * _HIDDEN
        operations = 2 * rows * 3 * _EXPERT_SIZE * _HIDDEN
        yield Case(f"routed experts of a layer T={tokens}", make, moved, fp8_operations=operations)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "dense": dense_cases,
    "attention": attention_cases,
    "grouped": grouped_cases,
    "moe": moe_cases,
    "bf16": bf16_cases,
    "small": small_cases,
}


def row_of(case: Case, *, rotate: bool) -> str:
    """Measure a case and describe it as a row of a Markdown table."""
    copies = max(1, min(16, round(_CACHE / case.bytes_moved))) if rotate else 1
    made = [case.make() for _ in range(copies)]
    cells: list[str] = []
    first = None
    for name in made[0]:
        calls = [calls_of_copy[name] for calls_of_copy in made]
        if isinstance(calls[0], str):
            cells.append(f"{name}: absent ({calls[0]})")
            continue
        out = calls[0]()
        out = out.clone() if isinstance(out, torch.Tensor) else out
        try:
            taken = time_calls([call for call in calls if not isinstance(call, str)])
        except RuntimeError as error:
            cells.append(f"{name}: not timed ({str(error).splitlines()[0][:60]})")
            torch.cuda.synchronize()
            continue
        text = f"{name} {taken.median:.1f} ({taken.low:.1f}-{taken.high:.1f})"
        if first is None:
            first = out
            text += f" | {taken.median / case.floor_us:.2f}"
        else:
            wrong = differing_bits(first, out)
            text += "" if wrong is None else f", differs {wrong}"
        cells.append(text)
    return f"| {case.name} | {case.floor_us:.1f} | {' | '.join(cells) if len(cells) > 1 else cells[0] + ' | -'} |"


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Groups: {', '.join(GROUPS)}.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Time this package's kernels and their peers on the card of this machine."""
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds, median (10th-90th percentile)",
        "",
        "| case | floor | ours | ours / floor | peer |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in only or GROUPS:
        for case in GROUPS[name]():
            # The experts' weights are larger than the cache by themselves, and shared by the copies.
            lines.append(row_of(case, rotate=name not in ("grouped", "moe")))
            print(lines[-1], flush=True)
            torch.cuda.empty_cache()
    if markdown:
        markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
