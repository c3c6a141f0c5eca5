"""Calls of vLLM's and SGLang's internals, which no interface promises: what another version moves is mended here."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

from dsv3_plugin.kernels.bench.case import TOPK, Weight
from dsv3_plugin.kernels.bench.measure import Call
from dsv3_plugin.ops.quantize import E4M3


def vllm_flash_mla(
    q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, scale: float
) -> Call:
    """FlashMLA's decode: q [requests, queries, heads, 576], cache [pages, 64, 576]."""
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    metadata, splits = get_mla_metadata()

    def call() -> torch.Tensor:
        out: torch.Tensor = flash_mla_with_kvcache(
            q, cache.unsqueeze(2), table, lengths, 512, metadata, splits, scale, causal=True
        )[0]
        return out

    return call


def vllm_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
) -> Call:
    """FlashAttention 3, causal, as vLLM reads prompts: q [T, heads, 192], k [K, heads, 192], v [K, heads, 128]; where
    each sequence's queries and keys start, and the most of one.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def call() -> torch.Tensor:
        out: torch.Tensor = flash_attn_varlen_func(
            q, k, v, longest[0], starts[0], longest[1], starts[1], softmax_scale=scale, causal=True, fa_version=3
        )
        return out

    return call


def vllm_one_split(
    q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, scale: float
) -> Call:
    """Triton's decode in the batch-invariant mode: q [requests, heads, 576], cache [pages, 64, 576]."""
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    requests, heads, _ = q.shape
    if requests != len(lengths):
        raise NotImplementedError("takes one token a request")
    keys_of_heads = cache.unsqueeze(2)
    out, lse = q.new_zeros(requests, heads, 512), q.new_zeros(requests, heads)
    partials = q.new_empty(requests, heads, 1, 513, dtype=torch.float32)
    # The cache's scales: made anew in each call, they cannot be captured.
    scales = dict.fromkeys(("k_scale", "v_scale"), q.new_ones((), dtype=torch.float32))

    def call() -> torch.Tensor:
        kv = keys_of_heads, keys_of_heads[..., :512]
        decode_attention_fwd(q, *kv, out, lse, table, lengths, partials, 1, scale, 64, is_mla=True, **scales)
        return out

    return call


def vllm_invariant_matmul(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """x [M, K] times weight [N, K] in the batch-invariant mode."""
    from vllm.model_executor.layers.batch_invariant import matmul_persistent

    return lambda: matmul_persistent(x, weight.t())


def vllm_invariant_log_softmax(logits: torch.Tensor, temperature: torch.Tensor) -> Call:
    """The log-softmax of logits / temperature in the batch-invariant mode."""
    from vllm.model_executor.layers.batch_invariant import log_softmax

    return lambda: log_softmax(logits / temperature, dim=-1)


def vllm_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """x [M, K]."""
    from vllm import _custom_ops

    out = torch.empty_like(x)
    return lambda: _custom_ops.rms_norm(out, x, weight, 1e-6)


def vllm_add_rms_norm(x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor) -> Call:
    """x, addend [M, K]."""
    from vllm import _custom_ops

    hidden, residual = x.clone(), addend.clone()
    return lambda: _custom_ops.fused_add_rms_norm(hidden, residual, weight, 1e-6)


def vllm_rms_norm_fp8(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> Call:
    """The norm of x [M, K], or of its sum with the residual, which it writes over the residual, in e4m3."""
    from vllm import _custom_ops

    theirs = partial(_custom_ops.rms_norm_per_block_quant, x, weight, 1e-6, E4M3, [1, 128], None, residual, True)
    return theirs


def vllm_quantize_fp8(x: torch.Tensor) -> Call:
    """x [M, K] with power-of-two scales."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    return lambda: per_token_group_quant_fp8(x, 128, column_major_scales=True, use_ue8m0=True)


def vllm_silu_and_mul(x: torch.Tensor) -> Call:
    """x [M, 2 N]."""
    import vllm._custom_ops  # noqa: F401

    out = x.new_empty(len(x), x.shape[1] // 2)
    return lambda: torch.ops._C.silu_and_mul(out, x)


def vllm_silu_and_mul_fp8(x: torch.Tensor) -> Call:
    """x [M, 2 N], to e4m3."""
    from vllm import _custom_ops

    theirs = partial(_custom_ops.silu_and_mul_per_block_quant, x, 128, E4M3, None, True)
    return theirs


def vllm_route(x: torch.Tensor, logits_of: Callable[[], torch.Tensor], bias: torch.Tensor) -> Call:
    """V3's choice of experts by the logits [M, E] that `logits_of` gives."""
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

    return lambda: grouped_topk(x, logits_of(), TOPK, True, 8, 4, "sigmoid", 2.5, bias)


def vllm_experts(x: torch.Tensor, gate_up: Weight, down: Weight, weights: torch.Tensor, ids: torch.Tensor) -> Call:
    """Routed experts: x bf16 [T, K], weights and ids [T, k]."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    config = fp8_w8a8_moe_quant_config(gate_up[1], down[1], block_shape=[128, 128])

    def call() -> torch.Tensor:
        with set_current_vllm_config(VllmConfig()):
            return fused_experts(x, gate_up[0], down[0], weights, ids, quant_config=config)

    return call


def vllm_invariant_experts(*arguments: Any) -> Call:
    """The same in the batch-invariant mode."""
    call = vllm_experts(*arguments)

    def in_that_mode() -> torch.Tensor:
        with mock.patch.dict(os.environ, VLLM_BATCH_INVARIANT="1"):
            return call()

    return in_that_mode


def sglang_experts(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    deterministic: bool,
) -> Call:
    """The same of SGLang, in its deterministic mode or not."""
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
