"""Random cases of every operation: sizes, strides, scales and page tables as a model has them, and odder ones.

Numbers are drawn on torch's default device, so a case is made where `with torch.device(...)` says.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv3_plugin.ops.fp8 import quantize_fp8, quantize_weight
from dsv3_plugin.profile import ScaleFormat

# Products that the model may be asked for in one case, some ns each.
_BUDGET = 1 << 25
_FORMATS: tuple[ScaleFormat, ...] = ("ue8m0", "float32")


class Sizes(NamedTuple):
    """What a case's sizes are drawn from."""

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    columns: tuple[int, ...]
    heads: tuple[int, ...]
    head_sizes: tuple[int, ...]
    groups: tuple[int, ...]
    latents: tuple[tuple[int, int], ...]
    """kv_lora_rank and qk_rope_head_dim; V3's come first in LARGE."""
    requests: tuple[int, ...]
    keys: int


LARGE = Sizes(
    rows=(1, 2, 3, 7, 8, 16, 17, 33, 64, 65, 100, 128, 129, 200, 257, 512, 1000, 4096),
    depths=(128, 256, 512, 1536, 2048, 7168),
    columns=(64, 128, 192, 256, 320, 576, 2112),
    heads=(1, 4, 16, 128),
    head_sizes=(64, 128, 512),
    groups=(1, 4, 8, 16, 24),
    latents=((512, 64), (128, 32), (64, 16)),
    requests=(1, 2, 3, 4, 5),
    keys=5000,
)
# The reference takes its time on a CPU.
ON_CPU = LARGE._replace(rows=LARGE.rows[:12], heads=(1, 4, 16), keys=500)
# A few kilobytes a case, for files that live in a repository.
SMALL = Sizes((1, 3, 5), (128, 256), (16,), (1, 4), (32,), (1, 3), ((64, 16),), (1, 2), 70)


class Case(NamedTuple):
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def in_fp32(case: Case) -> Case:
    """The same case with fp32 numbers in place of bf16 ones, with all bits of their fractions in use."""
    is_bf16 = [isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in case.args]
    args = (x.float() / 3 if wide else x for x, wide in zip(case.args, is_bf16, strict=True))
    return case._replace(args=tuple(args))


def generator(rng: random.Random) -> torch.Generator:
    """torch's generator on the default device, seeded by `rng`."""
    return torch.Generator(torch.get_default_device()).manual_seed(rng.getrandbits(48))


def numbers(rng: random.Random, *shape: int) -> torch.Tensor:
    """Normal bf16 numbers; each row has a magnitude of its own, some numbers are zero, some far above the rest."""
    drawn = generator(rng)
    x = torch.randn(shape, generator=drawn)
    rows = torch.randn((*shape[:-1], 1), generator=drawn)
    spikes = torch.rand(shape, generator=drawn)
    x = x * torch.exp2(2 * rows).where(torch.tensor(rng.random() < 0.5), torch.ones(()))
    x = torch.where(spikes < 0.01, x * 64, x)
    return torch.where(spikes > 0.98, torch.zeros(()), x).bfloat16()


def size_of_numbers(rng: random.Random) -> float:
    """Mostly one; else products, or the numbers themselves, are near the smallest one, where some are lost."""
    return 2.0 ** rng.choice((0,) * 14 + (-66, -130))


def sizes(rng: random.Random, at: Sizes) -> tuple[int, int, int]:
    """Rows, columns and depth of a product inside the budget."""
    rows, depth = rng.choice(at.rows), rng.choice(at.depths)
    columns = min(rng.choice(at.columns), max(64, _BUDGET // (rows * depth) // 64 * 64))
    return rows, columns, depth


def experts(rng: random.Random, at: Sizes, rows: int) -> torch.Tensor:
    """Rows of each expert: some have none, some have many."""
    groups = rng.choice(at.groups)
    favourites = rng.sample(range(groups), rng.randint(1, groups))
    counts = Counter(rng.choice(favourites) for _ in range(rows))
    return torch.tensor([counts[group] for group in range(groups)])


def linear_case(rng: random.Random, at: Sizes) -> Case:
    """Depths that are no multiple of an instruction, columns that fill no tile, both output dtypes."""
    rows, columns, depth = sizes(rng, at)
    depth -= rng.choice((0, 0, 8, 120))
    size = size_of_numbers(rng)
    weight = numbers(rng, columns - rng.choice((0, 0, 8)), depth) * size
    return Case((numbers(rng, rows, depth) * size, weight), {"out_dtype": rng.choice((None, torch.float32))})


def head_linear_case(rng: random.Random, at: Sizes) -> Case:
    """x is a view with gaps, as the layers pass it."""
    rows, heads, depth = rng.choice(at.rows), rng.choice(at.heads), rng.choice(at.head_sizes)
    columns = min(rng.choice(at.head_sizes), max(32, _BUDGET // (rows * heads * depth) // 32 * 32))
    size = size_of_numbers(rng)
    wide = numbers(rng, rows, heads, depth + 64) * size
    return Case((wide[..., :depth], numbers(rng, heads, columns, depth) * size), {})


def grouped_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Experts without rows, and one with all."""
    rows, columns, depth = sizes(rng, at)
    counts = experts(rng, at, rows)
    size = size_of_numbers(rng)
    return Case((numbers(rng, rows, depth) * size, counts, numbers(rng, len(counts), columns, depth) * size), {})


def quantize_case(rng: random.Random, at: Sizes) -> Case:
    """From subnormal to near overflow, both scale formats."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths))
    x = x * 2.0 ** rng.choice((-130, -20, 0, 0, 0, 20, 100))
    return Case((x if rng.random() < 0.8 else x.float(), rng.choice(_FORMATS)), {})


def fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats; columns that fill no scale block."""
    rows, columns, depth = sizes(rng, at)
    scale_format = rng.choice(_FORMATS)
    weight = quantize_weight(numbers(rng, columns - rng.choice((0, 0, 8)), depth), scale_format)
    return Case((*quantize_fp8(numbers(rng, rows, depth), scale_format), *weight), {})


def grouped_fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats; experts without rows, and one with all."""
    rows, columns, depth = sizes(rng, at)
    counts = experts(rng, at, rows)
    scale_format = rng.choice(_FORMATS)
    weights = [quantize_weight(numbers(rng, columns, depth), scale_format) for _ in counts]
    values, scales = (torch.stack(parts) for parts in zip(*weights, strict=True))
    return Case((*quantize_fp8(numbers(rng, rows, depth), scale_format), counts, values, scales), {})


def rms_norm_case(rng: random.Random, at: Sizes) -> Case:
    """Widths that fill no block of 128, and no power of two."""
    width = rng.choice(at.depths) + rng.choice((0, 64, 72))
    return Case((numbers(rng, rng.choice(at.rows), width), numbers(rng, width), 1e-6), {})


def add_rms_norm_case(rng: random.Random, at: Sizes) -> Case:
    """Widths that fill no block of 128, and no power of two."""
    (x, weight, eps), _ = rms_norm_case(rng, at)
    return Case((x, numbers(rng, *x.shape), weight, eps), {})


def rms_norm_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of whole scale blocks, no power of two; both scale formats."""
    width = rng.choice(at.depths) + rng.choice((0, 128))
    x, weight = numbers(rng, rng.choice(at.rows), width), numbers(rng, width)
    return Case((x, weight, 1e-6, rng.choice(_FORMATS)), {})


def add_rms_norm_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same behind a sum."""
    (x, *rest), _ = rms_norm_fp8_case(rng, at)
    return Case((x, numbers(rng, *x.shape), *rest), {})


def rope_case(rng: random.Random, at: Sizes) -> Case:
    """x is a view with gaps, as the layers pass it."""
    rows, heads, pairs = rng.choice(at.rows), rng.choice(at.heads), rng.choice((16, 32))
    angles = torch.rand(rows, pairs, generator=generator(rng)) * 7
    wide = numbers(rng, rows, heads, 128 + 2 * pairs)
    return Case((wide[..., 128:], angles.cos(), angles.sin()), {})


def silu_and_mul_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of an expert and of no power of two."""
    return Case((numbers(rng, rng.choice(at.rows), 2 * (rng.choice(at.depths) + rng.choice((0, 64)))),), {})


def silu_and_mul_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of whole scale blocks, both scale formats."""
    width = rng.choice(at.depths) + rng.choice((0, 128))
    return Case((numbers(rng, rng.choice(at.rows), 2 * width), rng.choice(_FORMATS)), {})


def permute_case(rng: random.Random, at: Sizes) -> Case:
    """Rows in any order, some never, some several times."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths) + rng.choice((0, 72)))
    drawn = generator(rng)
    return Case((x, torch.randint(len(x), (rng.choice(at.rows),), generator=drawn)), {})


def permute_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same with scales."""
    values, scales = quantize_fp8(numbers(rng, rng.choice(at.rows), rng.choice(at.depths)), rng.choice(_FORMATS))
    drawn = generator(rng)
    return Case((values, scales, torch.randint(len(values), (rng.choice(at.rows),), generator=drawn)), {})


def route_case(rng: random.Random, at: Sizes) -> Case:
    """Routers of V3, Kimi-K2 and Moonlight and a tiny one; half of the cases have ties."""
    experts_, n_group, topk_group, topk = rng.choice(((256, 8, 4, 8), (384, 1, 1, 8), (64, 1, 1, 6), (16, 4, 2, 4)))
    rows = rng.choice(at.rows)
    logits = numbers(rng, rows, experts_).float()
    if rng.random() < 0.5:  # ties
        logits = (logits * 4).round() / 4
    bias = torch.zeros(experts_) if rng.random() < 0.5 else numbers(rng, experts_).float() * 0.1
    return Case(
        (logits, bias),
        {
            "num_experts_per_tok": topk,
            "n_group": n_group,
            "topk_group": topk_group,
            "norm_topk_prob": rng.random() < 0.8,
            "routed_scaling_factor": 2.5,
        },
    )


def router_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Depths that fill no slice."""
    rows, columns, depth = sizes(rng, at)
    depth += rng.choice((0, 0, 8, 120))
    size = size_of_numbers(rng)
    return Case((numbers(rng, rows, depth) * size, numbers(rng, min(columns, 512), depth) * size), {})


def moe_router_case(rng: random.Random, at: Sizes) -> Case:
    """The routers of `route_case`, from hidden states."""
    (logits, bias), settings = route_case(rng, at)
    depth = min(rng.choice(at.depths), _BUDGET // logits.numel() // 8 * 8 + 8)
    weight = numbers(rng, logits.shape[1], depth) * depth**-0.5
    return Case((numbers(rng, len(logits), depth), weight, bias), settings)


def combine_case(rng: random.Random, at: Sizes) -> Case:
    """Experts in any order of rows."""
    rows, topk, width = rng.choice(at.rows), rng.choice((1, 4, 8)), rng.choice(at.depths) + rng.choice((0, 72))
    drawn = generator(rng)
    slots = torch.randperm(rows * topk, generator=drawn).view(rows, topk)
    weights = torch.rand(rows, topk, generator=drawn)
    return Case((numbers(rng, rows * topk, width), slots, weights, numbers(rng, rows, width)), {})


def mla_attention_case(rng: random.Random, at: Sizes) -> Case:
    """Requests of prefill, verify and decode together, shuffled pages, unwritten memory behind each."""
    heads, (rank, rotary) = rng.choice(at.heads), rng.choice(at.latents)
    block_size = rng.choice((1, 16, 32, 64))
    lengths, queries = [], []
    budget = _BUDGET // (heads * (2 * rank + rotary))
    for _ in range(rng.choice(at.requests)):
        count = min(rng.choice((1, 1, 2, 5, 70)), max(1, budget // 512), at.keys // 16)
        # Few are long: the model takes its time for each block of keys.
        length = count + int(max(0, min(at.keys, budget // count // 2 - count)) * rng.random() ** 3)
        if budget < count * length:
            break
        budget -= count * length
        queries.append(count)
        lengths.append(length)
    if not queries:
        queries, lengths = [1], [rng.randint(1, 64)]
    blocks = [-(-length // block_size) for length in lengths]
    pages = list(range(sum(blocks) + 3))
    rng.shuffle(pages)
    table = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for request, count in enumerate(blocks):
        table[request, :count] = torch.tensor([pages.pop() for _ in range(count)])
    cache = numbers(rng, sum(blocks) + 3, block_size, rank + rotary) * size_of_numbers(rng)
    # What no request has written yet may hold anything.
    for request, length in enumerate(lengths):
        if length % block_size:
            cache[table[request, blocks[request] - 1], length % block_size :] = math.nan
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    args = (
        numbers(rng, sum(queries), heads, rank + rotary) * 0.3,
        cache,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        starts,
    )
    return Case(args, {"kv_lora_rank": rank, "scale": (rank + rotary) ** -0.5})


CASES: dict[str, Callable[[random.Random, Sizes], Case]] = {
    "linear": linear_case,
    "head_linear": head_linear_case,
    "grouped_linear": grouped_linear_case,
    "quantize_fp8": quantize_case,
    "fp8_linear": fp8_linear_case,
    "grouped_fp8_linear": grouped_fp8_linear_case,
    "rms_norm": rms_norm_case,
    "rope": rope_case,
    "silu_and_mul": silu_and_mul_case,
    "router_linear": router_linear_case,
    "route": route_case,
    "moe_router": moe_router_case,
    "combine": combine_case,
    "mla_attention": mla_attention_case,
    "add_rms_norm": add_rms_norm_case,
    "rms_norm_fp8": rms_norm_fp8_case,
    "add_rms_norm_fp8": add_rms_norm_fp8_case,
    "silu_and_mul_fp8": silu_and_mul_fp8_case,
    "permute": permute_case,
    "permute_fp8": permute_fp8_case,
}
