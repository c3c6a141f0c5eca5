"""What random cases of the operations are drawn from: sizes, strides and scales as a model has them, and odder ones.

Numbers are drawn on torch's default device, so a case is made where `with torch.device(...)` says.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import torch

from dsv3_plugin.profile import ScaleFormat

MOST_PRODUCTS = 1 << 25
"""That the model may be asked for in one case, some ns each."""
SCALE_FORMATS: tuple[ScaleFormat, ...] = ("ue8m0", "float32")


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
    scale_formats: tuple[ScaleFormat, ...] = SCALE_FORMATS


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
    columns = min(rng.choice(at.columns), max(64, MOST_PRODUCTS // (rows * depth) // 64 * 64))
    return rows, columns, depth


def experts(rng: random.Random, at: Sizes, rows: int) -> torch.Tensor:
    """Rows of each expert: some have none, some have many."""
    groups = rng.choice(at.groups)
    favourites = rng.sample(range(groups), rng.randint(1, groups))
    counts = Counter(rng.choice(favourites) for _ in range(rows))
    return torch.tensor([counts[group] for group in range(groups)])
