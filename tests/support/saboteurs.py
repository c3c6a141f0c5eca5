"""What goes wrong in kernels, for each operation: the same arguments, and an answer that is wrong in one respect.

`SABOTEURS` has them by operation. A new operation needs some: what its kernel could do that is right almost always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from wrong_kernel import wrong_kernel

from dsv3_plugin.ops import head_attention as of_heads
from dsv3_plugin.ops import mla_attention as attention
from dsv3_plugin.ops import quantize, router
from dsv3_plugin.ops import silu_and_mul as swiglu
from dsv3_plugin.ops import sliced_linear as sliced
from dsv3_plugin.ops.absorb import absorb
from dsv3_plugin.ops.combine import combine, combine_gradient
from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.fp8_weight import quantize_fp8_weight
from dsv3_plugin.ops.fp8_wgrad import fp8_wgrad, quantize_fp8_columns
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.ops.linear import grouped_linear, head_linear, head_linear_fp8, linear
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.operation import Operation, operations
from dsv3_plugin.ops.permute import permute, permute_fp8, sort_by_expert
from dsv3_plugin.ops.products import CPU, Products
from dsv3_plugin.ops.quantize import quantize_fp8
from dsv3_plugin.ops.rms_norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8, rms_norm_gradient
from dsv3_plugin.ops.rope import rope
from dsv3_plugin.ops.router import moe_router, route, router_linear
from dsv3_plugin.ops.silu_and_mul import silu_and_mul, silu_and_mul_fp8, silu_and_mul_gradient
from dsv3_plugin.ops.sliced_linear import sliced_fp8_linear, sliced_linear

Tensor = torch.Tensor
Fault = Callable[..., Any]
FEW = 16


def halves(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """The fp32 sum of two halves of K."""
    middle = x.shape[1] // 2
    parts = (slice(middle), slice(middle, None))
    first, second = (product(x[:, part].contiguous(), weight[:, part].contiguous()) for part in parts)
    return first + second


def split_by_rows(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """K is split where there are few rows, as libraries do to use all of a card."""
    if len(x) > FEW:
        return CPU.linear(x, weight, out_dtype)
    return halves(lambda a, b: CPU.linear(a, b, torch.float32), x, weight).to(out_dtype)


def cut_off(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Rounded towards zero, where it is rounded; else to bf16."""
    exact = CPU.linear(x, weight, torch.float32)
    return (exact.view(torch.int32) & -0x10000).view(torch.float32).to(out_dtype)


def cut_off_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Accumulated in the 14 bits that Hopper's tensor cores keep of an fp8 sum."""
    return (CPU.fp8_linear(x, weight).view(torch.int32) & -0x400).view(torch.float32)


def split_fp8_by_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Halves of 128 products mostly have the same sum, which is nearly exact: so each is cut off."""
    return CPU.fp8_linear(x, weight) if len(x) > FEW else halves(cut_off_fp8, x, weight)


SPLIT = replace(CPU, linear=split_by_rows, fp8_linear=split_fp8_by_rows)
CUT_OFF = replace(CPU, linear=cut_off, fp8_linear=cut_off_fp8)


def products(op: Operation[..., Any], **more: Fault) -> dict[str, Fault]:
    """Of an operation with matrix products."""
    machines: dict[str, Products] = {"a split that depends on the rows": SPLIT, "sums that are cut off": CUT_OFF}
    return {name: op.on(machine) for name, machine in machines.items()} | more


def patched(where: object, op: Fault, **values: object) -> Fault:
    """The operation with other constants or functions in a module."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        with patch.multiple(where, **values):  # type: ignore[arg-type]
            return op(*args, **kwargs)

    return wrong


def narrow_scale(scale_for: Callable[..., Tensor], *args: Any) -> Tensor:
    """A scale for the numbers' largest up to 480, e4m3's largest if it had no NaN."""
    return scale_for(*args) * (448 / 480)


def quantized(op: Fault, **more: Fault) -> dict[str, Fault]:
    """Of an operation that quantizes."""
    scale_for = partial(narrow_scale, quantize.scale_for)
    return {
        "another largest number": patched(quantize, op, scale_for=scale_for),
        "saturating early": patched(quantize, op, to_e4m3=lambda x: x.clamp(-416, 416).to(quantize.E4M3)),
        **more,
    }


def of_neighbours(counts: Tensor) -> Tensor:
    """Each expert's rows go to the one behind it."""
    return counts.roll(1)


def stale_newest(q: Tensor, cache: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The newest row of the first request is what the page held before: its oldest one."""
    pages = cache.clone()
    block, offset = divmod(int(batch.read_seq_lens()[0]) - 1, batch.block_size)
    pages[batch.block_table[0, block], offset] = cache[batch.block_table[0, 0], 0]
    return mla_attention(q, pages, batch, *args, **kwargs)


def a_position_early(q: Tensor, cache: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
    """No query sees its own key."""
    first = batch.query_start_loc.diff() if len(batch.seq_lens) else batch.seq_lens
    shorter = (batch.seq_lens - 1).clamp_min(first)
    fewer = replace(batch, seq_lens=shorter, host_seq_lens=None)
    return mla_attention(q, cache, fewer, *args, **kwargs)


def a_key_early(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, *starts: Tensor, **kwargs: Any) -> Tensor:
    """Of each head's keys the one before is read, of the rotary numbers and the values the right one."""
    return head_attention(q, k.roll(1, 0), k_rope, v, *starts, **kwargs)


def the_neighbours_values(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, *starts: Tensor, **kwargs: Any) -> Tensor:
    """Each head reads the values of the one beside it, or of the one head every other number twice."""
    wrong = v.roll(1, 1) if v.shape[1] > 1 else v[..., ::2].repeat_interleave(2, 2)
    return head_attention(q, k, k_rope, wrong, *starts, **kwargs)


def unordered_ties(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of equal numbers the last comes first."""
    values, order = torch.sort(x.flip(-1), dim=-1, descending=True, stable=True)
    return values, x.shape[-1] - 1 - order


def bias_in_bf16(logits: Tensor, bias: Tensor, **routing: Any) -> Any:
    return route(logits, bias.bfloat16().float(), **routing)


def biased_weights(logits: Tensor, bias: Tensor, **routing: Any) -> Any:
    """Experts are weighed as they are chosen."""
    ids, _ = route(logits, bias, **routing)
    chosen = (sigmoid(logits) + bias).gather(1, ids)
    if routing["norm_topk_prob"]:
        chosen = chosen / chosen.sum(1, keepdim=True)
    return ids, chosen * routing["routed_scaling_factor"]


def router_of(wrong_route: Fault) -> Fault:
    return lambda x, weight, bias, **routing: wrong_route(router_linear(x, weight), bias, **routing)


def norm_in_two_steps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounded before the weight and behind it, as Transformers does; a norm in fp32 is rounded to bf16 between."""
    normal = rms_norm(x, torch.ones_like(weight), eps)
    return (normal.bfloat16().float() * weight.float()).to(x.dtype)


def residual_in_fp32(x: Tensor, addend: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What is normalised was not rounded to the residual's dtype; in fp32 it is rounded to bf16."""
    total = x + addend
    wide = x.float() + addend.float() if x.dtype == torch.bfloat16 else total.bfloat16().float()
    return total, rms_norm(wide, weight.float(), eps).to(x.dtype)


def then_quantized(wrong: Fault, kept: int = 0) -> Fault:
    """An operation behind which numbers are quantized: of its outputs the last, `kept` are answered too."""

    def run(*args: Any) -> Any:
        *inputs, scale_format = args
        out = wrong(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        return (*outputs[len(outputs) - kept :], *quantize_fp8(outputs[-1].flatten(1), scale_format))

    return run


def silu_rounded(gate_up: Tensor) -> Tensor:
    """silu is rounded before it is multiplied."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return ((gate * sigmoid(gate)).bfloat16().float() * up).to(gate_up.dtype)


def halves_of_a_pair(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of pairs half a vector apart, as Llama has them."""
    even, odd = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1).to(x.dtype)


def summed_in_bf16(expert_out: Tensor, slots: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    total = shared.bfloat16()
    for k in range(slots.shape[1]):
        total = total + (weights[:, k, None] * expert_out[slots[:, k]].float()).bfloat16()
    return total.to(shared.dtype)


def uncleared(grad: Tensor, expert_out: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What lay in memory stays where no slot is."""
    of_rows, of_weights = combine_gradient(grad, expert_out, slots, weights)
    held = torch.zeros(len(of_rows), dtype=torch.bool, device=slots.device).index_fill(0, slots.flatten(), True)
    return torch.where(held[:, None], of_rows, expert_out), of_weights


def with_constant_factor(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The factor is taken for a constant."""
    return rms_norm(grad, weight, eps), rms_norm_gradient(grad, x, weight, eps)[1]


def in_a_row(op: Fault) -> dict[str, Fault]:
    """Slices are added one after the other instead of by a tree."""
    return {"slices in a row": patched(sliced, op, tree_sum=lambda sums: sum(sums[1:], sums[0]))}


def sorted_backwards(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Within an expert the last token comes first."""
    tokens, slots, counts = sort_by_expert(topk_ids.flip(0), num_experts)
    return len(topk_ids) - 1 - tokens, slots.flip(0), counts


_TABLE: dict[Operation[..., Any], dict[str, Fault]] = {
    absorb: products(
        absorb,
        **{
            "a position late": lambda *args: absorb(*args[:5], *(x.roll(1, 0) for x in args[5:])),
            "sine and cosine swapped": lambda *args: absorb(*args[:5], args[6], args[5]),
        },
    ),
    combine: {
        "experts in another order": lambda out, slots, weights, shared: combine(
            out, slots.flip(1), weights.flip(1), shared
        ),
        "the neighbour's row": lambda out, slots, weights, shared: combine(out.roll(1, 0), slots, weights, shared),
        "a sum in bf16": summed_in_bf16,
    },
    combine_gradient: {
        "the neighbour's row": lambda grad, out, slots, weights: combine_gradient(grad, out.roll(1, 0), slots, weights),
        "rows that were not cleared": uncleared,
        "a sum in another order": lambda grad, out, slots, weights: (
            combine_gradient(grad, out, slots, weights)[0],
            combine_gradient(grad.flip(1), out.flip(1), slots, weights)[1],
        ),
    },
    fp8_linear: products(
        fp8_linear, **{"the scales of another block": lambda x, s, *more, **kw: fp8_linear(x, s.flip(1), *more, **kw)}
    ),
    grouped_fp8_linear: products(
        grouped_fp8_linear,
        **{
            "another expert's rows": lambda x, s, counts, *more: grouped_fp8_linear(x, s, of_neighbours(counts), *more),
        },
    ),
    quantize_fp8_weight: quantized(quantize_fp8_weight),
    quantize_fp8_columns: quantized(quantize_fp8_columns),
    fp8_wgrad: products(fp8_wgrad),
    linear: products(linear),
    head_linear: products(head_linear, **{"the neighbour's head": lambda x, weight: head_linear(x, weight.roll(1, 0))}),
    head_linear_fp8: products(head_linear_fp8, **quantized(head_linear_fp8)),
    grouped_linear: products(
        grouped_linear,
        **{"another expert's rows": lambda x, counts, *more: grouped_linear(x, of_neighbours(counts), *more)},
    ),
    mla_attention: products(
        mla_attention,
        **{
            "a stale row": stale_newest,
            "a position early": a_position_early,
            "keys in smaller blocks": patched(attention, mla_attention, KEY_BLOCK=32),
            "maxima that are no multiples": patched(attention, mla_attention, MAXIMUM_STEP=1),
        },
    ),
    head_attention: products(
        head_attention,
        **{
            "a key early": a_key_early,
            "the neighbour's values": the_neighbours_values,
            "keys in smaller blocks": patched(of_heads, head_attention, KEY_BLOCK=64),
            "maxima that are no multiples": patched(
                of_heads, head_attention, step_above=lambda x, y: attention.step_above(x, y / 8) * 8
            ),
        },
    ),
    permute: {"the neighbour's row": lambda x, rows: permute(x, rows.roll(1))},
    permute_fp8: {"the neighbour's scales": lambda x, s, rows: (permute_fp8(x, s, rows)[0], s[rows.roll(1)])},
    sort_by_expert: {"a swapped tie": sorted_backwards},
    quantize_fp8: quantized(quantize_fp8),
    rms_norm: {
        "a rounding more": norm_in_two_steps,
        "another eps": lambda x, weight, eps: rms_norm(x, weight, eps * 1.01),
    },
    rms_norm_gradient: {
        "the last row left out": lambda grad, x, *more: (
            rms_norm_gradient(grad, x, *more)[0],
            rms_norm_gradient(grad[:-1], x[:-1], *more)[1],
        ),
        "a constant factor": with_constant_factor,
        "another eps": lambda grad, x, weight, eps: rms_norm_gradient(grad, x, weight, eps * 1.01),
    },
    add_rms_norm: {
        "a residual that is not rounded": residual_in_fp32,
        "the sum of before": lambda x, addend, *more: (x, add_rms_norm(x, addend, *more)[1]),
    },
    rms_norm_fp8: quantized(rms_norm_fp8, **{"a rounding more": then_quantized(norm_in_two_steps)}),
    add_rms_norm_fp8: quantized(
        add_rms_norm_fp8, **{"a residual that is not rounded": then_quantized(residual_in_fp32, 2)}
    ),
    rope: {
        "a position late": lambda x, cos, sin: rope(x, cos.roll(1, 0), sin.roll(1, 0)),
        "pairs half a vector apart": halves_of_a_pair,
    },
    router_linear: products(router_linear, **{"smaller chunks": patched(router, router_linear, K_CHUNK=192)}),
    moe_router: products(
        moe_router,
        **{
            "a swapped tie": patched(router, moe_router, _descending=unordered_ties),
            "the bias in bf16": router_of(bias_in_bf16),
            "the bias in the weights": router_of(biased_weights),
        },
    ),
    route: {
        "a swapped tie": patched(router, route, _descending=unordered_ties),
        "the bias in bf16": bias_in_bf16,
        "the bias in the weights": biased_weights,
    },
    silu_and_mul: {
        "a rounding more": silu_rounded,
        "gate and up swapped": lambda x: silu_and_mul(x.roll(x.shape[1] // 2, 1)),
    },
    silu_and_mul_gradient: {
        "a rounding more": patched(swiglu, silu_and_mul_gradient, sigmoid=lambda x: sigmoid(x).bfloat16().float()),
        "gate and up swapped": lambda grad, x: silu_and_mul_gradient(grad, x.roll(x.shape[1] // 2, 1)),
    },
    silu_and_mul_fp8: quantized(silu_and_mul_fp8, **{"a rounding more": then_quantized(silu_rounded)}),
    sliced_linear: products(sliced_linear, **in_a_row(sliced_linear)),
    sliced_fp8_linear: products(sliced_fp8_linear, **in_a_row(sliced_fp8_linear)),
}


def _with_one_bit(op: str, faults: Mapping[str, Fault]) -> dict[str, Fault]:
    return {"one ulp": wrong_kernel(op).run, **faults}


SABOTEURS: dict[str, dict[str, Fault]] = {op.name: _with_one_bit(op.name, faults) for op, faults in _TABLE.items()}
"""By the operation's name, then by what is wrong."""


def without_saboteurs() -> set[str]:
    """Operations of the registry that are not in the table, or of which it knows no more than a turned bit."""
    return {name for name in operations() if len(SABOTEURS.get(name, {})) < 2}
