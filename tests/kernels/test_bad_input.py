"""Kernels refuse what they cannot read before anything is launched, so that a machine without a GPU can ask them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: `make test` runs this in .envs/kernels")

from dsv3_plugin.errors import InputError
from dsv3_plugin.kernels.cuda import head_hopper, mla_hopper
from dsv3_plugin.kernels.triton import (
    absorb,
    combine,
    fp8_linear,
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
from dsv3_plugin.kernels.vendors import flash_mla
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.paged_batch import PagedBatch


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


def fp32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


ROUTE = {"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
COUNTS = torch.tensor([2, 2])
CASES = {
    "linear in fp32": (linear.linear, (fp32(2, 16), bf16(8, 16)), "linear: x is torch.float32"),
    "linear, K": (linear.linear, (bf16(2, 16), bf16(8, 24)), "linear: x has K=16, weight has K=24"),
    "linear, strides": (linear.linear, (bf16(16, 2).t(), bf16(8, 16)), "linear: x .* not contiguous"),
    "head_linear, heads": (linear.head_linear, (bf16(2, 3, 16), bf16(4, 8, 16)), r"\(2, 3, 16\) does not fit"),
    "head_linear_fp8, heads": (
        linear.head_linear_fp8,
        (bf16(2, 3, 16), bf16(4, 128, 16), "ue8m0"),
        r"head_linear_fp8: x of shape \(2, 3, 16\) does not fit",
    ),
    "absorb, latent": (
        absorb.absorb,
        (bf16(2, 3, 24), bf16(3, 32, 16), bf16(2, 41), bf16(32), 1e-6, fp32(2, 4), fp32(2, 4)),
        r"absorb: heads of shape \(2, 3, 24\) do not fit w_uk of shape \(3, 32, 16\), latent of shape \(2, 41\)",
    ),
    "absorb, table": (
        absorb.absorb,
        (bf16(2, 3, 24), bf16(3, 32, 16), bf16(2, 40), bf16(32), 1e-6, fp32(2, 4), bf16(2, 4)),
        "absorb: sin is torch.bfloat16 of shape",
    ),
    "grouped_linear, counts": (
        linear.grouped_linear,
        (bf16(4, 16), torch.tensor([4]), bf16(2, 8, 16)),
        r"grouped_linear: expert_counts has shape \(1,\)",
    ),
    "slices, K": (
        sliced_linear.sliced_linear,
        (bf16(2, 24), bf16(8, 24), 16),
        "sliced_linear: K=24 has no 16 equal slices",
    ),
    "fp8 slices, K": (
        sliced_linear.sliced_fp8_linear,
        (e4m3(2, 256), fp32(2, 2), e4m3(8, 256), fp32(1, 2), 4),
        "sliced_fp8_linear: K=256 has no 4 equal slices of whole blocks of 128",
    ),
    "columns, scales": (
        fp8_wgrad.quantize_fp8_columns,
        (e4m3(4, 256), fp32(4, 1), COUNTS, "ue8m0"),
        r"quantize_fp8_columns: x_scale has shape \(4, 1\)",
    ),
    "wgrad, tokens": (
        fp8_wgrad.fp8_wgrad,
        (e4m3(8, 256), fp32(8, 2), e4m3(8, 128), fp32(8, 1), COUNTS),
        "fp8_wgrad: grad has 256 tokens, x has 128",
    ),
    "wgrad, counts": (
        fp8_wgrad.fp8_wgrad,
        (e4m3(8, 256), fp32(8, 2), e4m3(8, 256), fp32(8, 2), fp32(2)),
        "fp8_wgrad: expert_counts is torch.float32, not integers",
    ),
    "quantize, K": (quantize.quantize_fp8, (bf16(2, 96), "ue8m0"), "quantize_fp8: K=96 is not a multiple of 128"),
    "fp8, dtype": (
        fp8_linear.fp8_linear,
        (bf16(2, 128), fp32(2, 1), e4m3(8, 128), fp32(1, 1)),
        "fp8_linear: x is torch.bfloat16",
    ),
    "fp8, K": (
        fp8_linear.fp8_linear,
        (e4m3(2, 96), fp32(2, 1), e4m3(8, 96), fp32(1, 1)),
        "fp8_linear: K=96 is not a multiple of 128",
    ),
    "fp8, scales": (
        fp8_linear.fp8_linear,
        (e4m3(2, 256), fp32(2, 1), e4m3(8, 256), fp32(1, 2)),
        r"fp8_linear: x_scale has shape \(2, 1\)",
    ),
    "fp8, scales of the weight": (
        fp8_linear.fp8_linear,
        (e4m3(2, 256), fp32(2, 2), e4m3(8, 256), fp32(2, 2)),
        r"fp8_linear: weight_scale has shape \(2, 2\)",
    ),
    "fp8 experts, counts": (
        fp8_linear.grouped_fp8_linear,
        (e4m3(4, 128), fp32(4, 1), COUNTS.float(), e4m3(2, 8, 128), fp32(2, 1, 1)),
        "grouped_fp8_linear: expert_counts is torch.float32",
    ),
    "fp8 experts, weight": (
        fp8_linear.grouped_fp8_linear,
        (e4m3(4, 128), fp32(4, 1), COUNTS, e4m3(8, 128), fp32(2, 1, 1)),
        r"grouped_fp8_linear: weight has shape \(8, 128\)",
    ),
    "rms_norm, weight": (rms_norm.rms_norm, (bf16(2, 64), bf16(32), 1e-6), r"rms_norm: weight has shape \(32,\)"),
    "rms_norm_fp8, K": (rms_norm.rms_norm_fp8, (bf16(2, 96), bf16(96), 1e-6, "ue8m0"), "rms_norm_fp8: K=96 is not"),
    "add_rms_norm, rows": (
        rms_norm.add_rms_norm,
        (bf16(2, 64), bf16(3, 64), bf16(64), 1e-6),
        "add_rms_norm: the addend has 3 rows, x has 2",
    ),
    "silu_and_mul_fp8, width": (
        silu_and_mul.silu_and_mul_fp8,
        (bf16(2, 96 * 2), "float32"),
        "silu_and_mul_fp8: I=96 is not a multiple of 128",
    ),
    "sort_by_expert, dtype": (permute.sort_by_expert, (fp32(2, 8), 256), "sort_by_expert: topk_ids is torch.float32"),
    "permute, rows": (permute.permute, (bf16(2, 64), fp32(2)), "permute: rows are torch.float32, expected integers"),
    "permute_fp8, scales": (
        permute.permute_fp8,
        (e4m3(2, 256), fp32(2, 1), torch.zeros(4, dtype=torch.int64)),
        r"permute_fp8: scales have shape \(2, 1\), expected \(2, 2\)",
    ),
    "router_linear, K": (
        router.router_linear,
        (bf16(2, 16), bf16(8, 24)),
        "router_linear: x has K=16, weight has K=24",
    ),
    "silu, width": (silu_and_mul.silu_and_mul, (bf16(2, 63),), "silu_and_mul: gate_up has an odd width 63"),
    "silu gradient, dtype": (
        silu_and_mul.silu_and_mul_gradient,
        (fp32(2, 64), fp32(2, 128)),
        "silu_and_mul_gradient: gate_up is torch.float32",
    ),
    "norm gradient, shape": (
        rms_norm.rms_norm_gradient,
        (bf16(3, 64), bf16(2, 64), bf16(64), 1e-6),
        r"rms_norm_gradient: grad has shape \(3, 64\), x \(2, 64\)",
    ),
    "combine gradient, slots": (
        combine.combine_gradient,
        (bf16(2, 64), bf16(4, 64), torch.zeros(2, 2), fp32(2, 2)),
        "combine_gradient: slots is torch.float32",
    ),
    "combine, slots": (
        combine.combine,
        (bf16(4, 64), torch.zeros(2, 2), fp32(2, 2), bf16(2, 64)),
        "combine: slots is torch.float32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(name):
    function, args, message = CASES[name]
    with pytest.raises(InputError, match=message):
        function(*args)


def test_router_names_groups():
    with pytest.raises(InputError, match="route: 10 experts do not divide into n_group=4 groups"):
        router.route(fp32(2, 10), fp32(10), **ROUTE)
    with pytest.raises(InputError, match=r"route: logits is torch\.bfloat16"):
        router.route(bf16(2, 16), fp32(16), **ROUTE)


def test_rope_names_its_argument():
    with pytest.raises(InputError, match="rope: "):
        rope.rope(bf16(2, 4, 64), fp32(2, 16), fp32(2, 32))


STARTS = torch.tensor([0, 2])
OF_HEADS = {"q": bf16(2, 3, 48), "k": bf16(2, 3, 32), "k_rope": bf16(2, 16), "v": bf16(2, 3, 32)}
OF_HEADS |= {"query_starts": STARTS, "key_starts": STARTS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({name: x.float() for name, x in OF_HEADS.items() if x.dim() > 1}, "q is torch.float32, expected torch.bf"),
        ({"q": bf16(2, 48, 3).transpose(1, 2)}, r"q of shape \(2, 3, 48\) is not contiguous"),
        ({"v": bf16(2, 32, 3).transpose(1, 2)}, "v has stride 3 in its last dimension"),
        ({"k": bf16(2, 3, 40), "k_rope": bf16(2, 8)}, "keys of 40 and 8 numbers, expected multiples of 16"),
        ({"v": bf16(1, 3, 32)}, r"v has shape \(1, 3, 32\)"),
    ],
)
def test_head_attention_names_what_it_cannot_read(changes, message):
    with pytest.raises(InputError, match=f"^head_attention: {message}"):
        head_attention.head_attention(**OF_HEADS | changes, scale=0.1)
    nothing = {name: x[:0] if x.dim() > 1 else STARTS * 0 for name, x in OF_HEADS.items()}
    assert head_attention.head_attention(**nothing, scale=0.1).shape == (0, 3, 32)


V3_HEADS = {"q": bf16(2, 3, 192), "k": bf16(2, 3, 128), "k_rope": bf16(2, 64), "v": bf16(2, 3, 128)}


@pytest.mark.parametrize(
    "changes",
    [
        OF_HEADS,
        {"q": bf16(2, 192, 3).transpose(1, 2)},
        {"v": bf16(2, 3, 132)[..., 4:]},
        {"k_rope": bf16(2, 65)[:, 1:]},
        {name: x.float() for name, x in V3_HEADS.items()},
    ],
)
def test_v3s_head_attention_names_what_it_cannot_read(changes):
    starts = {"query_starts": STARTS, "key_starts": STARTS}
    with pytest.raises(InputError, match=r"^head_attention: this kernel attends with 128 \+ 64 and 128"):
        head_hopper.head_attention(**V3_HEADS | starts | changes, scale=0.1)
    nothing = {name: x[:0] for name, x in V3_HEADS.items()} | {name: x * 0 for name, x in starts.items()}
    assert head_hopper.head_attention(**nothing, scale=0.1).shape == (0, 3, 128)


ATTENTION = {"kv_lora_rank": 512, "scale": 0.1}


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (fp32(1, 4, 576), "mla_attention: latent_cache is torch.bfloat16, q is torch.float32"),
        (bf16(1, 8, 576)[:, ::2], r"mla_attention: q of shape \(1, 4, 576\) is not contiguous"),
        (bf16(2, 4, 576), "mla_attention: q has 2 tokens, the batch 1"),
    ],
)
def test_attention_names_what_does_not_fit(q, message):
    cache = bf16(3, 16, 576)
    batch = PagedBatch.of(q[:1], cache, torch.tensor([[0, 2]]), torch.tensor([20]), torch.tensor([0, 1]))
    with pytest.raises(InputError, match=message):
        mla_attention.mla_attention(q, cache, batch, **ATTENTION)


@pytest.mark.parametrize("attend", [mla_attention.mla_attention, mla_hopper.mla_attention, flash_mla.mla_attention])
def test_dense_kernels_decline_a_selection_before_any_launch(attend, monkeypatch):
    """The twin: without a selection they come as far as their launch, which has no card here."""
    q, cache = bf16(1, 4, 576), bf16(3, 64, 576)
    batch = PagedBatch.of(q, cache, torch.tensor([[0, 2]]), torch.tensor([100]), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="attends to all keys, not to a selection of them"):
        attend(q, cache, batch, KeySelection(torch.tensor([[99]])), **ATTENTION)
    with pytest.raises(Exception) as found:
        attend(q, cache, batch, ALL_KEYS, **ATTENTION)
    assert not isinstance(found.value, InputError)


def test_no_rows_are_no_error():
    """The twin: what is accepted is not refused, and launches nothing."""
    assert fp8_linear.fp8_linear(e4m3(0, 128), fp32(0, 1), e4m3(8, 128), fp32(1, 1)).shape == (0, 8)
    assert linear.linear(bf16(0, 16), bf16(8, 16)).shape == (0, 8)
    assert [x.shape for x in rms_norm.add_rms_norm(bf16(0, 64), bf16(0, 64), bf16(64), 1e-6)] == [(0, 64)] * 2
    assert permute.permute(bf16(3, 64), torch.zeros(0, dtype=torch.int64)).shape == (0, 64)
    assert router.moe_router(bf16(0, 16), bf16(8, 16), fp32(8), **ROUTE)[0].shape == (0, 2)
