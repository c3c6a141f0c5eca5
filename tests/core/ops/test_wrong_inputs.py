"""Inputs that the contracts refuse, each by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.ops import fp8_linear as fp8
from dsv3_plugin.ops import fp8_wgrad as gradients
from dsv3_plugin.ops import mla_attention, quantize
from dsv3_plugin.ops import rms_norm as norms
from dsv3_plugin.ops.absorb import absorb
from dsv3_plugin.ops.combine import combine, combine_gradient
from dsv3_plugin.ops.fp8_weight import quantize_fp8_weight
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.linear import grouped_linear, head_linear, linear
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.permute import sort_by_expert
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope
from dsv3_plugin.ops.router import route, router_linear
from dsv3_plugin.ops.silu_and_mul import silu_and_mul, silu_and_mul_gradient
from dsv3_plugin.ops.sliced_linear import sliced_fp8_linear, sliced_linear

Tensor = torch.Tensor

X = torch.zeros(2, 256)
HEADS_X = torch.zeros(2, 3, 8)
Q8, S8 = quantize.quantize_fp8(X, "ue8m0")
W8, WS8 = quantize.quantize_weight(torch.zeros(130, 256), "ue8m0")
COUNTS = torch.tensor([2])
C8, CS8 = gradients.quantize_fp8_columns(X, None, COUNTS, "ue8m0")
CACHE = torch.zeros(4, 16, 40)
QUERIES = torch.zeros(3, 2, 40)


BATCH = PagedBatch.of(QUERIES, CACHE, torch.tensor([[0, 1]]), torch.tensor([20]), torch.tensor([0, 3]))


def attention_of(
    q: Tensor = QUERIES, cache: Tensor = CACHE, keys: KeySelection = ALL_KEYS, scale: float = 1.0
) -> Tensor:
    return mla_attention.mla_attention(q, cache, BATCH, keys, kv_lora_rank=32, scale=scale)


STARTS = torch.tensor([0, 3])
OF_HEADS = {
    "q": QUERIES,
    "k": torch.zeros(5, 2, 32),
    "k_rope": torch.zeros(5, 8),
    "v": torch.zeros(5, 2, 16),
    "query_starts": STARTS,
    "key_starts": torch.tensor([0, 5]),
}


def by_heads(scale: float = 1.0, **changes: Tensor) -> Tensor:
    return head_attention(**OF_HEADS | changes, scale=scale)


def selection_of(*positions: int, queries: int = 3) -> Tensor:
    return attention_of(keys=KeySelection(torch.tensor([positions] * queries)))


choose = partial(route, num_experts_per_tok=2, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0)

REFUSED: list[tuple[str, Callable[[], object]]] = [
    (r"linear: x has shape \(2,\)", lambda: linear(X[:, 0].contiguous(), X)),
    (r"linear: x is torch.float64", lambda: linear(X.double(), X.double())),
    (r"linear: x of shape \(256, 2\) is not contiguous", lambda: linear(X.t(), torch.zeros(4, 2))),
    (r"linear: weight is torch.bfloat16", lambda: linear(X, X.bfloat16())),
    (r"linear: x has K=256, weight has K=128", lambda: linear(X, torch.zeros(4, 128))),
    (r"linear: out_dtype is torch.bfloat16", lambda: linear(X, X, out_dtype=torch.bfloat16)),
    (
        r"head_linear: x of shape \(2, 3, 8\).*\(4, 5, 8\)",
        lambda: head_linear(torch.zeros(2, 3, 8), torch.zeros(4, 5, 8)),
    ),
    (r"head_linear: weight is not", lambda: head_linear(HEADS_X, torch.zeros(3, 8, 5).transpose(1, 2))),
    (r"grouped_linear: weight is torch.bfloat16", lambda: grouped_linear(X, torch.tensor([2]), X.bfloat16()[None])),
    (r"grouped_linear: expert_counts sum to 3, x has 2", lambda: grouped_linear(X, torch.tensor([3]), X[None])),
    (r"quantize_fp8: K=200", lambda: quantize.quantize_fp8(torch.zeros(2, 200), "ue8m0")),
    (r"quantize_fp8: x is torch.float16", lambda: quantize.quantize_fp8(X.half(), "ue8m0")),
    (r"fp8_linear: x is torch.float32", lambda: fp8.fp8_linear(X, S8, W8, WS8)),
    (r"fp8_linear: weight is torch.float32", lambda: fp8.fp8_linear(Q8, S8, X, WS8)),
    (r"fp8_linear: x has K=256, weight has K=128", lambda: fp8.fp8_linear(Q8, S8, W8[:, :128].contiguous(), WS8)),
    (r"fp8_linear: x_scale has shape \(2, 1\)", lambda: fp8.fp8_linear(Q8, S8[:, :1], W8, WS8)),
    (r"fp8_linear: weight_scale has shape \(1, 2\)", lambda: fp8.fp8_linear(Q8, S8, W8, WS8[:1])),
    (r"quantize_fp8_weight: K=200 is", lambda: quantize_fp8_weight(torch.zeros(8, 200), "ue8m0")),
    (r"quantize_fp8_weight: weight of shape .* is not contiguous", lambda: quantize_fp8_weight(X.t(), "ue8m0")),
    (
        r"quantize_fp8_columns: x is torch.float16",
        lambda: gradients.quantize_fp8_columns(X.half(), None, COUNTS, "ue8m0"),
    ),
    (
        r"quantize_fp8_columns: K=200",
        lambda: gradients.quantize_fp8_columns(Q8[:, :200].contiguous(), S8[:, :1], COUNTS, "ue8m0"),
    ),
    (
        r"quantize_fp8_columns: x_scale has shape \(2, 1\)",
        lambda: gradients.quantize_fp8_columns(Q8, S8[:, :1], COUNTS, "ue8m0"),
    ),
    (
        r"quantize_fp8_columns: expert_counts sum to 4, x has 2",
        lambda: gradients.quantize_fp8_columns(Q8, S8, 2 * COUNTS, "ue8m0"),
    ),
    (r"fp8_wgrad: grad is torch.float32", lambda: gradients.fp8_wgrad(X, S8, C8, CS8, COUNTS)),
    (r"fp8_wgrad: grad has 256 tokens, x has 128", lambda: gradients.fp8_wgrad(Q8, S8, C8, CS8, COUNTS)),
    (r"fp8_wgrad: grad_scale has shape \(2, 1\)", lambda: gradients.fp8_wgrad(C8, CS8[:2], C8, CS8, COUNTS)),
    (r"fp8_wgrad: x_scale has shape \(2, 1\)", lambda: gradients.fp8_wgrad(C8, CS8, C8, CS8[:2], COUNTS)),
    (
        r"fp8_wgrad: expert_counts are of 2 blocks, grad has 1",
        lambda: gradients.fp8_wgrad(C8, CS8, C8, CS8, torch.tensor([129])),
    ),
    (r"sliced_linear: 3 slices are no power of two", lambda: sliced_linear(X, X, 3)),
    (r"sliced_linear: K=256 has no 512 equal slices", lambda: sliced_linear(X, X, 512)),
    (
        r"sliced_fp8_linear: K=256 has no 4 equal slices of whole blocks of 128",
        lambda: sliced_fp8_linear(Q8, S8, W8, WS8, 4),
    ),
    (r"rms_norm: weight is torch.bfloat16", lambda: rms_norm(X, torch.ones(256).bfloat16(), 1e-6)),
    (r"rms_norm: weight has shape \(255,\)", lambda: rms_norm(X, torch.ones(255), 1e-6)),
    (r"silu_and_mul: gate_up has an odd width 255", lambda: silu_and_mul(torch.zeros(2, 255))),
    (
        r"silu_and_mul_gradient: grad has shape \(2, 256\), gate_up \(2, 256\)",
        lambda: silu_and_mul_gradient(X, X),
    ),
    (r"silu_and_mul_gradient: grad is torch.bfloat16", lambda: silu_and_mul_gradient(X.bfloat16(), X)),
    (r"rms_norm_gradient: grad is torch.bfloat16", lambda: norms.rms_norm_gradient(X.bfloat16(), X, X[0], 1e-6)),
    (r"rms_norm_gradient: grad has shape \(1, 256\)", lambda: norms.rms_norm_gradient(X[:1], X, X[0], 1e-6)),
    (r"rms_norm_gradient: weight has shape \(2,\)", lambda: norms.rms_norm_gradient(X, X, X[:, 0], 1e-6)),
    (r"rope: x of shape \(2, 1, 8\).*\(2, 3\)", lambda: rope(torch.zeros(2, 1, 8), X[:, :3], X[:, :3])),
    (r"rope: x of shape \(2, 1, 8\).*\(2, 5\)", lambda: rope(torch.zeros(2, 1, 8), X[:, :5], X[:, :5])),
    (r"router_linear: x has K=256, weight has K=255", lambda: router_linear(X, torch.zeros(3, 255))),
    (r"router_linear: weight is torch.bfloat16", lambda: router_linear(X, X.bfloat16())),
    (r"add_rms_norm: x has shape \(2, 256\), addend \(1, 256\)", lambda: norms.add_rms_norm(X, X[:1], X[0], 1e-6)),
    (r"add_rms_norm: x is torch.float32, addend", lambda: norms.add_rms_norm(X, X.bfloat16(), X[0], 1e-6)),
    (r"route: logits is torch.bfloat16", lambda: choose(torch.zeros(1, 4).bfloat16(), torch.zeros(4))),
    (r"route: e_score_correction_bias is torch.bfloat16", lambda: choose(X, torch.zeros(256).bfloat16())),
    (r"route: e_score_correction_bias is .*\(3,\)", lambda: choose(X, torch.zeros(3))),
    (
        r"absorb: heads of shape \(2, 3, 8\) do not fit w_uk of shape \(3, 5, 6\), latent of shape \(2, 256\)",
        lambda: absorb(HEADS_X, torch.zeros(3, 5, 6), X, X[0, :5], 1e-6, X[:, :1], X[:, :1]),
    ),
    (r"sort_by_expert: topk_ids is torch.float32", lambda: sort_by_expert(X, 4)),
    (r"combine: slots .*\[2, 2\].*\[2, 3\]", lambda: combine(X, torch.zeros(2, 2).long(), torch.zeros(2, 3), X)),
    (r"combine: topk_weights is torch.bfloat16", lambda: combine(X, torch.zeros(2, 2).long(), X[:, :2].bfloat16(), X)),
    (
        r"combine_gradient: 2 rows of slots, 1 of grad",
        lambda: combine_gradient(X[:1], X, torch.zeros(2, 2).long(), torch.zeros(2, 2)),
    ),
    (
        r"combine_gradient: slots is torch.int32",
        lambda: combine_gradient(X, X, torch.zeros(2, 2).int(), torch.zeros(2, 2)),
    ),
    (
        r"combine_gradient: grad has N=256, expert_out has N=255",
        lambda: combine_gradient(X, torch.zeros(4, 255), torch.zeros(2, 2).long(), torch.zeros(2, 2)),
    ),
    (r"head_attention: q has shape \(3, 40\), expected", lambda: by_heads(q=QUERIES[:, 0])),
    (
        r"head_attention: k of shape \(5, 2, 31\) and k_rope of shape \(5, 8\) do not fit q of shape \(3, 2, 40\)",
        lambda: by_heads(k=torch.zeros(5, 2, 31)),
    ),
    (r"head_attention: k .* and k_rope of shape \(4, 8\) do not fit", lambda: by_heads(k_rope=torch.zeros(4, 8))),
    (r"head_attention: k of shape \(5, 1, 32\)", lambda: by_heads(k=torch.zeros(5, 1, 32))),
    (
        r"head_attention: v has shape \(4, 2, 16\), k \(5, 2, 32\)",
        lambda: by_heads(v=torch.zeros(4, 2, 16)),
    ),
    (r"head_attention: v is torch.bfloat16, q is", lambda: by_heads(v=torch.zeros(5, 2, 16).bfloat16())),
    (r"head_attention: key_starts is torch.float32 of shape \(2,\)", lambda: by_heads(key_starts=X[0, :2])),
    (r"head_attention: 2 query_starts, 3 key_starts", lambda: by_heads(key_starts=torch.tensor([0, 5, 5]))),
    (r"head_attention: query_starts is on meta, q is on cpu", lambda: by_heads(query_starts=STARTS.to("meta"))),
    (
        r"head_attention: query_starts \[0, 2\] do not ascend from 0 to 3",
        lambda: by_heads(query_starts=torch.tensor([0, 2])),
    ),
    (
        r"head_attention: sequence 1 has 2 queries and 1 keys",
        lambda: by_heads(query_starts=torch.tensor([0, 1, 3]), key_starts=torch.tensor([0, 4, 5])),
    ),
    (r"head_attention: scale is 0.0, expected a positive", lambda: by_heads(scale=0.0)),
    (r"mla_attention: q has shape \(3, 40\)", lambda: attention_of(q=QUERIES[:, 0])),
    (r"mla_attention: latent_cache has shape \(4, 16, 39\)", lambda: attention_of(cache=CACHE[..., :39])),
    (r"mla_attention: latent_cache has shape \(3, 16, 40\), .* 4 blocks of 16", lambda: attention_of(cache=CACHE[:3])),
    (r"mla_attention: q has 2 tokens, the batch 3", lambda: attention_of(q=QUERIES[:2])),
    (r"mla_attention: the batch is on cpu, q is on meta", lambda: attention_of(QUERIES.to("meta"), CACHE.to("meta"))),
    (r"mla_attention: the selection of keys is for 2 queries, q has 3", lambda: selection_of(0, queries=2)),
    (r"mla_attention: a query selects none of the keys up to its own", lambda: selection_of(-1, 18)),
    (r"KeySelection: positions are torch.float32 of shape \(2, 2\)", lambda: KeySelection(X[:, :2])),
    (r"KeySelection: positions are torch.int64 of shape \(3,\)", lambda: KeySelection(torch.zeros(3).long())),
    (r"mla_attention: latent_cache is torch.bfloat16", lambda: attention_of(cache=CACHE.bfloat16())),
    (r"mla_attention: scale is 0.0, expected a positive", lambda: attention_of(scale=0.0)),
    (r"mla_attention: scale is nan", lambda: attention_of(scale=float("nan"))),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_a_wrong_input_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        call()


def test_the_inputs_beside_the_refused_ones_are_accepted() -> None:
    assert attention_of().shape == (3, 2, 32)
    assert by_heads().shape == (3, 2, 16)
    assert selection_of(-1, 17).shape == (3, 2, 32)
    assert fp8.fp8_linear(Q8, S8, W8, WS8).shape == (2, 130)
