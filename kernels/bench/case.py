"""A case of the scoreboard: the calls that compete, what bounds their time, and random inputs of V3's sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels import provider
from dsv3_plugin.kernels.bench.measure import Call, Rows
from dsv3_plugin.kernels.bench.scoreboard import Role
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import FP8_FLOAT32
from dsv3_plugin.registry import Ops, bind

# What an H200 was seen to reach.
_BYTES_PER_US = 4.3e6
_FP8_PER_US = 1580e6
_BF16_PER_US = 790e6

DEVICE = "cuda"
# DeepSeek-V3's sizes.
EXPERTS, TOPK, HIDDEN, EXPERT_SIZE = 256, 8, 7168, 2048
MOST_ROWS = 4096
"""Rows whose bits are compared over batches."""

ROUTING: dict[str, Any] = {
    "num_experts_per_tok": TOPK,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

Weight = tuple[torch.Tensor, torch.Tensor]
"""e4m3 [N, K], or [E, N, K] of experts, and its scales."""


@dataclass(frozen=True)
class Contenders:
    """The calls of one case, on buffers of their own. A text stands for a call that there is not, and says why."""

    ours: Call
    peers: dict[str, Call | str] = field(default_factory=dict)
    invariant: dict[str, Call | str] = field(default_factory=dict)
    """The peers' batch-invariant modes."""
    served: Call | None = None
    """What a model runs, where that may be another provider's kernel."""

    def all(self) -> Iterator[tuple[str, Role, Call | str]]:
        """Name, role and call of each, ours first."""
        yield "ours", "ours", self.ours
        if self.served:
            yield "served", "served", self.served
        for name, call in self.peers.items():
            yield name, "peer", call
        for name, call in self.invariant.items():
            yield name, "invariant", call


class Case(NamedTuple):
    """One row of the scoreboard."""

    name: str
    make: Callable[[], Contenders]
    bytes_moved: float
    fp8_operations: float = 0
    bf16_operations: float = 0
    rows: Callable[[], Rows] | None = None
    """Our operation on rows in any order and number, to compare their bits; once for all cases that share it."""

    @property
    def floor_us(self) -> float:
        """The time below which no kernel runs on an H200."""
        work = self.fp8_operations / _FP8_PER_US + self.bf16_operations / _BF16_PER_US
        return max(self.bytes_moved / _BYTES_PER_US, work)

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether moving the bytes takes longer than the operations."""
        return self.floor_us == self.bytes_moved / _BYTES_PER_US


def peer(build: Callable[..., Call], *arguments: Any) -> Call | str:
    """The call that `build` makes of a peer, or why there is none."""
    try:
        call = build(*arguments)
        call()
        return call
    except ImportError as error:
        return f"not installed: {error.name}"
    except Exception as error:  # a scoreboard goes on without a peer, and says so
        return why_not(error)


def why_not(error: Exception) -> str:
    """Why a peer was not timed, in a few words."""
    if "NOT_SUPPORTED" in str(error):
        return "does not take this shape"
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0][:100]


@functools.cache
def served() -> Ops:
    """The kernels that a model gets on this machine."""
    return bind(Setting("cuda", "sm90", FP8_FLOAT32, (9, 0)), "fast", provider.dsv3_kernels())


def fp8_weight(*shape: int) -> Weight:
    """A random e4m3 weight [..., N, K] and its scales."""
    values = torch.randint(-127, 127, shape, dtype=torch.int8, device=DEVICE)
    values = torch.where((values & 0x7F) == 0x7F, 0, values).view(E4M3)
    scales = torch.rand(*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128, device=DEVICE) + 0.5
    return values, scales


def bf16(*shape: int) -> torch.Tensor:
    """Normal bf16 numbers."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def random_experts(tokens: int) -> torch.Tensor:
    """Expert numbers int64 [tokens, 8], ascending, every set equally likely."""
    return torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOPK).indices.sort().values
