"""What is bound by memory or by a launch: norms, SwiGLU, quantization, the router and the moves of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from dsv3_plugin.kernels.bench import peers
from dsv3_plugin.kernels.bench.case import (
    DEVICE,
    EXPERT_SIZE,
    EXPERTS,
    HIDDEN,
    MOST_ROWS,
    ROUTING,
    TOPK,
    Case,
    Contenders,
    bf16,
    peer,
    random_experts,
)
from dsv3_plugin.kernels.bench.measure import Rows
from dsv3_plugin.kernels.triton import combine, permute, quantize, rms_norm, router, silu_and_mul
from dsv3_plugin.kernels.vendors import transformer_engine
from dsv3_plugin.ops.permute import sort_by_expert

_VOCABULARY, _TEMPERATURE = 129280, 0.7


def small_cases() -> Iterator[Case]:
    """What is bound by memory or by a launch."""
    for m in (128, 4096):

        def norm(m: int = m) -> Contenders:
            x, weight = bf16(m, HIDDEN), bf16(HIDDEN)
            return Contenders(
                lambda: rms_norm.rms_norm(x, weight, 1e-6),
                {"vLLM rms_norm": peer(peers.vllm_rms_norm, x, weight)},
            )

        def quantized(m: int = m) -> Contenders:
            x = bf16(m, HIDDEN)
            theirs = partial(transformer_engine.quantize_fp8, x, "ue8m0")
            return Contenders(
                lambda: quantize.quantize_fp8(x, "ue8m0"),
                {
                    "vLLM per_token_group_quant_fp8": peer(peers.vllm_quantize_fp8, x),
                    "TransformerEngine": peer(lambda: theirs),
                },
            )

        def swiglu(m: int = m) -> Contenders:
            x = bf16(m * TOPK, 2 * EXPERT_SIZE)
            return Contenders(
                lambda: silu_and_mul.silu_and_mul(x), {"vLLM silu_and_mul": peer(peers.vllm_silu_and_mul, x)}
            )

        def choose(m: int = m) -> Contenders:
            logits = torch.randn(m, EXPERTS, device=DEVICE)
            bias = torch.randn(EXPERTS, device=DEVICE) * 0.1
            x = bf16(m, 1)
            return Contenders(
                lambda: router.route(logits, bias, **ROUTING),
                {"vLLM grouped_topk": peer(peers.vllm_route, x, lambda: logits, bias)},
            )

        def put_together(m: int = m) -> Contenders:
            rows, shared = bf16(m * TOPK, HIDDEN), bf16(m, HIDDEN)
            slots = torch.randperm(m * TOPK, device=DEVICE).view(m, TOPK)
            weights = torch.rand(m, TOPK, device=DEVICE)
            return Contenders(
                lambda: combine.combine(rows, slots, weights, shared),
                {"torch gather and sum": lambda: (rows[slots].float() * weights[..., None]).sum(1).bfloat16()},
            )

        yield Case(f"RMSNorm {m} x 7168", norm, m * HIDDEN * 4, rows=_norm_rows)
        yield Case(f"quantize {m} x 7168", quantized, m * HIDDEN * 3, rows=_quantize_rows)
        yield Case(f"SwiGLU {m * TOPK} x 4096", swiglu, m * TOPK * EXPERT_SIZE * 6, rows=_swiglu_rows)
        yield Case(f"route {m} x 256", choose, m * EXPERTS * 4, rows=_route_rows)
        yield Case(f"combine T={m}", put_together, m * (TOPK + 2) * HIDDEN * 2, rows=_combine_rows)
        yield from fused_cases(m)
    yield from log_softmax_cases()


def log_softmax_cases() -> Iterator[Case]:
    """torch's own, which servers and trainers take of logits / temperature: this package has no kernel for it."""
    for m in (1, 128, 4096):

        def make(m: int = m) -> Contenders:
            logits, temperature = torch.randn(m, _VOCABULARY, device=DEVICE), _temperature()
            return Contenders(
                lambda: torch.log_softmax(logits / temperature, -1),
                {},
                {"vLLM": peer(peers.vllm_invariant_log_softmax, logits, temperature)},
            )

        yield Case(f"log-softmax of torch {m} x {_VOCABULARY}", make, m * _VOCABULARY * 8, rows=_log_softmax_rows)


def _log_softmax_rows() -> Rows:
    logits, temperature = torch.randn(MOST_ROWS, _VOCABULARY, device=DEVICE), _temperature()
    return Rows(MOST_ROWS, lambda i: torch.log_softmax(logits[i] / temperature, -1))


def _temperature() -> torch.Tensor:
    """On the card, as servers have it: a division by a Python number would be a product with its reciprocal there."""
    return torch.tensor(_TEMPERATURE, device=DEVICE)


def fused_cases(m: int) -> Iterator[Case]:
    """What stands next to each other in a layer, in one kernel; vLLM's norm writes the sum over its input."""

    def norm_quantized() -> Contenders:
        x, weight = bf16(m, HIDDEN), bf16(HIDDEN)
        ours = partial(rms_norm.rms_norm_fp8, x, weight, 1e-6, "float32")
        return Contenders(ours, {"vLLM rms_norm_per_block_quant": peer(peers.vllm_rms_norm_fp8, x, weight)})

    def norm_of_sum() -> Contenders:
        x, addend, weight = bf16(m, HIDDEN), bf16(m, HIDDEN), bf16(HIDDEN)
        ours = partial(rms_norm.add_rms_norm, x, addend, weight, 1e-6)
        return Contenders(ours, {"vLLM fused_add_rms_norm": peer(peers.vllm_add_rms_norm, x, addend, weight)})

    def norm_of_sum_quantized() -> Contenders:
        x, addend, weight = bf16(m, HIDDEN), bf16(m, HIDDEN), bf16(HIDDEN)
        ours = partial(rms_norm.add_rms_norm_fp8, x, addend, weight, 1e-6, "float32")
        theirs = peer(peers.vllm_rms_norm_fp8, x, weight, addend.clone())
        return Contenders(ours, {"vLLM rms_norm_per_block_quant, which writes no bf16": theirs})

    def swiglu_quantized() -> Contenders:
        x = bf16(m * TOPK, 2 * EXPERT_SIZE)
        ours = partial(silu_and_mul.silu_and_mul_fp8, x, "float32")
        return Contenders(ours, {"vLLM silu_and_mul_per_block_quant": peer(peers.vllm_silu_and_mul_fp8, x)})

    def sorted_pairs() -> Contenders:
        ids = random_experts(m)
        return Contenders(
            lambda: permute.sort_by_expert(ids, EXPERTS)[0], {"torch": lambda: sort_by_expert(ids, EXPERTS)[0]}
        )

    def permuted() -> Contenders:
        x, rows = bf16(m, HIDDEN), sort_by_expert(random_experts(m), EXPERTS)[0]
        return Contenders(lambda: permute.permute(x, rows), {"torch": lambda: x[rows]})

    def permuted_quantized() -> Contenders:
        values, scales = quantize.quantize_fp8(bf16(m, HIDDEN), "float32")
        rows = sort_by_expert(random_experts(m), EXPERTS)[0]
        theirs = values.view(torch.int64)
        return Contenders(
            lambda: permute.permute_fp8(values, scales, rows), {"torch": lambda: (theirs[rows], scales[rows])}
        )

    def routed() -> Contenders:
        x, weight, bias = bf16(m, HIDDEN), bf16(EXPERTS, HIDDEN), torch.randn(EXPERTS, device=DEVICE) * 0.1

        ours = partial(router.moe_router, x, weight, bias, **ROUTING)
        theirs = peer(peers.vllm_route, x, lambda: F.linear(x, weight).float(), bias)
        return Contenders(ours, {"cuBLAS, then vLLM grouped_topk": theirs})

    row, expert_rows = m * HIDDEN, m * TOPK * EXPERT_SIZE
    yield Case(f"RMSNorm, quantized {m} x 7168", norm_quantized, row * 3, rows=_norm_quantized_rows)
    yield Case(f"RMSNorm of a sum {m} x 7168", norm_of_sum, row * 8, rows=_norm_of_sum_rows)
    yield Case(
        f"RMSNorm of a sum, and quantized {m} x 7168", norm_of_sum_quantized, row * 9, rows=_norm_of_sum_quantized_rows
    )
    yield Case(f"SwiGLU, quantized {m * TOPK} x 4096", swiglu_quantized, expert_rows * 5, rows=_swiglu_quantized_rows)
    yield Case(f"sort {m} x 8 pairs by expert", sorted_pairs, m * TOPK * 24)
    yield Case(f"permute {m} x 7168 for 8 experts each", permuted, row * (TOPK + 1) * 2, rows=_permute_rows)
    yield Case(
        f"permute in fp8 {m} x 7168 for 8 experts each",
        permuted_quantized,
        row * (TOPK + 1),
        rows=_permute_quantized_rows,
    )
    moved = 2 * (row + EXPERTS * HIDDEN)
    operations = 2 * row * EXPERTS
    yield Case(f"router T={m}", routed, moved, bf16_operations=operations, rows=_router_rows)


def _router_rows() -> Rows:
    x, weight, bias = bf16(MOST_ROWS, HIDDEN), bf16(EXPERTS, HIDDEN), torch.randn(EXPERTS, device=DEVICE) * 0.1
    return Rows(MOST_ROWS, lambda i: _side_by_side(router.moe_router(x[i], weight, bias, **ROUTING)))


def _side_by_side(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Results of a row in one, exact in fp32."""
    return torch.cat([result.float() for result in results], 1)


def _norm_rows() -> Rows:
    x, weight = bf16(MOST_ROWS, HIDDEN), bf16(HIDDEN)
    return Rows(MOST_ROWS, lambda i: rms_norm.rms_norm(x[i], weight, 1e-6))


def _norm_quantized_rows() -> Rows:
    x, weight = bf16(MOST_ROWS, HIDDEN), bf16(HIDDEN)
    return Rows(MOST_ROWS, lambda i: _side_by_side(rms_norm.rms_norm_fp8(x[i], weight, 1e-6, "float32")))


def _norm_of_sum_rows() -> Rows:
    x, addend, weight = bf16(MOST_ROWS, HIDDEN), bf16(MOST_ROWS, HIDDEN), bf16(HIDDEN)
    return Rows(MOST_ROWS, lambda i: _side_by_side(rms_norm.add_rms_norm(x[i], addend[i], weight, 1e-6)))


def _norm_of_sum_quantized_rows() -> Rows:
    x, addend, weight = bf16(MOST_ROWS, HIDDEN), bf16(MOST_ROWS, HIDDEN), bf16(HIDDEN)
    fused_norm = partial(rms_norm.add_rms_norm_fp8, weight=weight, eps=1e-6, scale_format="float32")
    return Rows(MOST_ROWS, lambda i: _side_by_side(fused_norm(x[i], addend[i])))


def _quantize_rows() -> Rows:
    x = bf16(MOST_ROWS, HIDDEN)
    return Rows(MOST_ROWS, lambda i: _side_by_side(quantize.quantize_fp8(x[i], "float32")))


def _swiglu_rows() -> Rows:
    x = bf16(MOST_ROWS, 2 * EXPERT_SIZE)
    return Rows(MOST_ROWS, lambda i: silu_and_mul.silu_and_mul(x[i]))


def _swiglu_quantized_rows() -> Rows:
    x = bf16(MOST_ROWS, 2 * EXPERT_SIZE)
    return Rows(MOST_ROWS, lambda i: _side_by_side(silu_and_mul.silu_and_mul_fp8(x[i], "float32")))


def _permute_rows() -> Rows:
    x, source = bf16(MOST_ROWS, HIDDEN), torch.randperm(MOST_ROWS, device=DEVICE)
    return Rows(MOST_ROWS, lambda i: permute.permute(x, source[i]))


def _permute_quantized_rows() -> Rows:
    values, scales = quantize.quantize_fp8(bf16(MOST_ROWS, HIDDEN), "float32")
    source = torch.randperm(MOST_ROWS, device=DEVICE)
    return Rows(MOST_ROWS, lambda i: _side_by_side(permute.permute_fp8(values, scales, source[i])))


def _route_rows() -> Rows:
    logits, bias = torch.randn(MOST_ROWS, EXPERTS, device=DEVICE), torch.randn(EXPERTS, device=DEVICE) * 0.1
    return Rows(MOST_ROWS, lambda i: _side_by_side(router.route(logits[i], bias, **ROUTING)))


def _combine_rows() -> Rows:
    x, shared = bf16(MOST_ROWS * TOPK, HIDDEN), bf16(MOST_ROWS, HIDDEN)
    slots = torch.randperm(MOST_ROWS * TOPK, device=DEVICE).view(MOST_ROWS, TOPK)
    weights = torch.rand(MOST_ROWS, TOPK, device=DEVICE)
    return Rows(MOST_ROWS, lambda i: combine.combine(x, slots[i], weights[i], shared[i]))
