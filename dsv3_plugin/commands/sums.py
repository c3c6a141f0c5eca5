"""What a sum over tensor-parallel ranks costs, in the tree's order and as others add: a part of `dsv3 bench layouts`.

The sums are those of a row-parallel product of DeepSeek-V3, [tokens, 7168]: fp32 in the tree's order, as the contract
has it, and bf16 elsewhere, as engines add. On cards that NCCL serves, each is recorded in CUDA graphs, as a server
decodes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from rich.markup import escape
from rich.table import Table
from torch import distributed as dist

from dsv3_plugin.kernels.bench.all_reduce import all_reduces
from dsv3_plugin.layout import Group, GroupSlices

TOKENS = 1, 128, 4096
_COLUMNS = 7168
_CALLS = 20
"""In a graph."""


class Sums(TypedDict):
    """Of one way to add."""

    name: str
    times: list[list[float]]
    """Microseconds of a sum, of each of `TOKENS`; none of a size that it does not take."""


@dataclass(frozen=True)
class _Way:
    name: str
    dtype: torch.dtype
    run: Callable[[torch.Tensor], torch.Tensor | None]
    recording: Callable[[], AbstractContextManager[None]] = nullcontext


def measure(group: Group, device: torch.device, repeats: int) -> list[Sums]:
    """All ranks of `group` make this call."""
    in_graphs = dist.get_backend(group.process_group) == dist.Backend.NCCL
    measured = []
    for way in _ways(group, device):
        times: list[list[float]] = []
        for tokens in TOKENS:
            x = torch.randn(tokens, _COLUMNS, device=device).to(way.dtype)
            if way.run(x) is None:
                times.append([])
            else:
                times.append(_in_graph(way, x, repeats) if in_graphs else _eagerly(way, x, repeats, group))
        measured.append(Sums(name=way.name, times=times))
    return measured


def _ways(group: Group, device: torch.device) -> Iterable[_Way]:
    assert group.process_group is not None
    backend = dist.get_backend(group.process_group)
    if group.peers is not None:
        yield _Way("tree, peer memory, fp32", torch.float32, GroupSlices(1, group).fold)
    yield _Way(f"tree, {backend}, fp32", torch.float32, GroupSlices(1, replace(group, peers=None)).fold)

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=group.process_group)
        return x

    yield _Way(f"{backend} all-reduce, bf16", torch.bfloat16, all_reduce)
    if device.type == "cuda":
        ranks = dist.get_process_group_ranks(group.process_group)
        of_host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        found, missing = all_reduces(of_host, device)
        for engine, theirs in found.items():
            yield _Way(f"{engine} all-reduce, bf16", torch.bfloat16, theirs.run, theirs.recording)
        for engine, reason in missing.items() if group.rank == 0 else ():
            print(f"{engine}'s all-reduce is not measured: {reason}")


def _in_graph(way: _Way, x: torch.Tensor, repeats: int) -> list[float]:
    for _ in range(2):
        way.run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with way.recording(), torch.cuda.graph(graph):
        for _ in range(_CALLS):
            taken = way.run(x) is not None
    if not taken:  # some take other sizes in graphs
        return []
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / _CALLS)
    return times[1:]


def _eagerly(way: _Way, x: torch.Tensor, repeats: int, group: Group) -> list[float]:
    times = []
    for _ in range(repeats + 1):
        dist.barrier(group=group.process_group)
        begin = time.perf_counter()
        way.run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin))
    return times[1:]


def table(layout: str, of_ranks: list[list[Sums]]) -> Table:
    """Of each sum the median of the rank that has the largest."""
    shape = escape(f"[tokens, {_COLUMNS}]")  # else rich's markup
    drawn = Table(title=f"{layout}: a sum of all ranks, {shape}, median us", title_justify="left")
    drawn.add_column("added by")
    for tokens in TOKENS:
        drawn.add_column(f"{tokens:,} tokens", justify="right")
    for ways in zip(*of_ranks, strict=True):
        medians = [_slowest([way["times"][i] for way in ways]) for i in range(len(TOKENS))]
        drawn.add_row(ways[0]["name"], *medians)
    return drawn


def _slowest(of_ranks: list[list[float]]) -> str:
    return f"{max(map(statistics.median, of_ranks)):.3g}" if all(of_ranks) else "-"
