"""What stands between attention's projections and attention itself, in its absorbed form.

Contract: by definition `head_linear` and `rope` of the two parts of the queries, `rms_norm` and `rope` of the two parts
of the latent vectors, each with its own rounding. A kernel saves launches and copies, never a rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, generator, numbers, size_of_numbers
from dsv3_plugin.ops.linear import head_linear
from dsv3_plugin.ops.operation import BoundKernels, matrix_operation
from dsv3_plugin.ops.products import Products
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope


@matrix_operation(version=1, summary="head_linear and rope of queries, rms_norm and rope of latent vectors")
def absorb(
    products: Products,
    heads: torch.Tensor,
    w_uk: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """heads [T, H, N + P], the queries; w_uk [H, R, N]; latent [T, R + P] before its norm, whose weight is [R]; cos and
    sin fp32 [T, P / 2]; to what attention reads: q [T, H, R + P], and the latent vectors as they are cached [T, R + P].
    """
    require_sizes(heads, w_uk, latent)
    return of_parts(head_linear.on(products), rms_norm, rope, heads, w_uk, latent, norm_weight, eps, cos, sin)


def require_sizes(heads: torch.Tensor, w_uk: torch.Tensor, latent: torch.Tensor) -> None:
    """Require queries, weight and latent vectors that agree on N, R and P."""
    rank, nope = w_uk.shape[1:]
    expected = heads.shape[0], rank + heads.shape[2] - nope
    fits = tuple(latent.shape) == expected and heads.shape[1] == len(w_uk)
    told = f"{tuple(w_uk.shape)}, latent of shape {tuple(latent.shape)}"
    require(fits, "absorb", f"heads of shape {tuple(heads.shape)} do not fit w_uk of shape {told}")


def of_parts(
    head_linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
    rope: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    heads: torch.Tensor,
    w_uk: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`absorb` of other operations' functions."""
    rank, nope = w_uk.shape[1:]
    rotary = heads.shape[2] - nope
    q_nope, q_pe = heads.split([nope, rotary], dim=-1)
    q = torch.cat((head_linear(q_nope, w_uk), rope(q_pe, cos, sin)), dim=-1)
    compressed, k_pe = latent.split([rank, rotary], dim=-1)
    compressed = rms_norm(compressed.contiguous(), norm_weight, eps)
    return q, torch.cat((compressed, rope(k_pe.unsqueeze(1), cos, sin).squeeze(1)), dim=-1)


@absorb.gradient
def _differentiable(
    ops: BoundKernels,
    heads: torch.Tensor,
    w_uk: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.is_grad_enabled():
        return ops[absorb](heads, w_uk, latent, norm_weight, eps, cos, sin)
    parts = head_linear.differentiable(ops), rms_norm.differentiable(ops), rope.differentiable(ops)
    return of_parts(*parts, heads, w_uk, latent, norm_weight, eps, cos, sin)


@absorb.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """V3's latent and others; the latent vectors are a view with gaps, as of a product that has other columns too."""
    rank, rotary = rng.choice(at.latents)
    count, nope = rng.choice(at.heads), rng.choice((32, 64, 128))
    rows = min(rng.choice(at.rows), max(1, MOST_PRODUCTS // (count * rank * nope)))
    size = size_of_numbers(rng)
    angles = torch.rand(rows, rotary // 2, generator=generator(rng)) * 7
    heads, w_uk = numbers(rng, rows, count, nope + rotary) * size, numbers(rng, count, rank, nope) * size
    latent = numbers(rng, rows, 64 + rank + rotary)[:, 64:]
    return absorb.case(heads, w_uk, latent, numbers(rng, rank), 1e-6, angles.cos(), angles.sin())
