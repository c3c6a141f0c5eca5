"""Ranks that make a measurement together, each in a process of its own.

Requests are dealt over the replicas of data parallelism. Such replicas make every pass together, also those that have
no request: so none leaves before all may. They ask each other every few turns, as servers do. Once all requests print,
all ranks count the same turns, and nobody asks while steps are timed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import distributed as dist

from dsv3_plugin.conformance.layouts import ALONE, RankOf
from dsv3_plugin.engine_bench.protocol import Start

TURNS = 8
"""Between two questions whether all requests have begun."""

Visited = tuple[frozenset[int], ...]
"""Of each layer that has experts, those that were visited."""

_T = TypeVar("_T")


class Ranks:
    """This rank among the others. One rank alone agrees with itself."""

    def __init__(self, place: RankOf = ALONE) -> None:
        self.place = place
        self.group: dist.ProcessGroup | None = None

    @property
    def replicas(self) -> int:
        """With requests of their own."""
        return self.place.layout.dp

    @property
    def is_first(self) -> bool:
        """Whether it speaks for all."""
        return self.place.rank == 0

    def meet(self) -> None:
        """Once the engine has made the processes' world."""
        if self.place.layout.ranks > 1:
            self.group = dist.new_group(backend="gloo")

    def own(self, requests: int) -> list[int]:
        """The numbers of this rank's requests."""
        return [request for request in range(requests) if self.place.has(request)]

    def dealt(self, requests: int) -> list[int]:
        """How many requests each replica has."""
        return [len(range(replica, requests, self.replicas)) for replica in range(self.replicas)]

    def all(self, flag: bool) -> bool:
        """Whether it is so on all ranks; each waits for the others."""
        if self.group is None:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MIN, self.group)
        return bool(flags)

    def told(self, value: _T) -> list[_T]:
        """What each rank says."""
        if self.group is None:
            return [value]
        found: list[_T | None] = [None] * self.place.layout.ranks
        dist.all_gather_object(found, value, self.group)
        return found  # type: ignore[return-value]

    def united(self, visited: Visited | None) -> Visited | None:
        """Experts that any rank visited; None where a rank did not see. A rank without tokens has no layer."""
        found = self.told(visited)
        seen = [of_rank for of_rank in found if of_rank is not None]
        if len(seen) < len(found):
            return None
        return tuple(
            frozenset().union(*of_layer) for of_layer in itertools.zip_longest(*seen, fillvalue=frozenset[int]())
        )


def most(requests: int, replicas: int) -> int:
    """Requests of the replica that has the most."""
    return math.ceil(requests / replicas)


def start_of_all(of_ranks: Sequence[Start]) -> Start:
    """What all ranks are: a card's memory is that of the fullest, its room that of the tightest."""
    first = of_ranks[0]
    memory = [start.memory_bytes for start in of_ranks if start.memory_bytes is not None]
    room = [start.cache_tokens for start in of_ranks if start.cache_tokens is not None]
    weights = [start.weight_bytes for start in of_ranks if start.weight_bytes is not None]
    return first.model_copy(
        update={
            "device": devices([start.device for start in of_ranks]),
            "import_seconds": max(start.import_seconds for start in of_ranks),
            "up_seconds": max(start.up_seconds for start in of_ranks),
            "memory_bytes": max(memory, default=None),
            "weight_bytes": max(weights, default=None),
            "cache_tokens": min(room, default=None),
        }
    )


def devices(names: Sequence[str]) -> str:
    """`2 x NVIDIA H200 1a2b, 3c4d` of names that begin alike; a CPU's ranks are on one."""
    different = list(dict.fromkeys(names))
    if len(different) == 1:
        return different[0]
    kinds = dict.fromkeys(name.rpartition(" ")[0] for name in different)
    if len(kinds) > 1:
        return ", ".join(different)
    return f"{len(different)} x {next(iter(kinds))} {', '.join(name.rpartition(' ')[2] for name in different)}"
