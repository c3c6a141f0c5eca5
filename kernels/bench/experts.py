"""The routed experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from dsv3_plugin.kernels.bench import peers
from dsv3_plugin.kernels.bench.case import (
    DEVICE,
    EXPERT_SIZE,
    EXPERTS,
    HIDDEN,
    MOST_ROWS,
    TOPK,
    Case,
    Contenders,
    bf16,
    fp8_weight,
    peer,
    random_experts,
)
from dsv3_plugin.kernels.bench.measure import Rows
from dsv3_plugin.kernels.triton import combine, fp8_linear, permute, quantize, silu_and_mul


def moe_cases() -> Iterator[Case]:
    """The routed experts of one layer, from hidden states and the router's choice to the combined output."""
    gate_up = fp8_weight(EXPERTS, 2 * EXPERT_SIZE, HIDDEN)
    down = fp8_weight(EXPERTS, HIDDEN, EXPERT_SIZE)

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        rows, slots, counts = permute.sort_by_expert(ids, EXPERTS)
        quantized = permute.permute_fp8(*quantize.quantize_fp8(x, "float32"), rows)
        b = silu_and_mul.silu_and_mul_fp8(fp8_linear.grouped_fp8_linear(*quantized, counts, *gate_up), "float32")
        return combine.combine(fp8_linear.grouped_fp8_linear(*b, counts, *down), slots, weights, shared)

    def tokens_of(tokens: int) -> tuple[torch.Tensor, ...]:
        none = torch.zeros(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        return bf16(tokens, HIDDEN), random_experts(tokens), torch.rand(tokens, TOPK, device=DEVICE), none

    def any_rows() -> Rows:
        made = tokens_of(MOST_ROWS)
        return Rows(MOST_ROWS, lambda i: experts(*(tensor[i] for tensor in made)))

    for tokens in (128, 4096):

        def make(tokens: int = tokens) -> Contenders:
            x, ids, weights, none = tokens_of(tokens)
            theirs = (x, gate_up, down, weights, ids.to(torch.int32))
            return Contenders(
                lambda: experts(x, ids, weights, none),
                {
                    "vLLM fused_experts": peer(peers.vllm_experts, *theirs),
                    "SGLang fused_experts": peer(partial(peers.sglang_experts, deterministic=False), *theirs),
                },
                {
                    "vLLM fused_experts": peer(peers.vllm_invariant_experts, *theirs),
                    "SGLang fused_experts": peer(partial(peers.sglang_experts, deterministic=True), *theirs),
                },
            )

        hit = EXPERTS * (1 - (1 - TOPK / EXPERTS) ** tokens)
        rows = tokens * TOPK
        moved = hit * 3 * EXPERT_SIZE * HIDDEN + rows * 2 * HIDDEN
        operations = 2 * rows * 3 * EXPERT_SIZE * HIDDEN
        yield Case(f"routed experts of a layer T={tokens}", make, moved, fp8_operations=operations, rows=any_rows)
