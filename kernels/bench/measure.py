"""Measuring a kernel on this machine's card: its time, its workspace, and whether a row's bits depend on other rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name")

_TURNS, _REST_SECONDS = 3, 0.01
_COUNTS = (1, 2, 3, 8, 16, 17, 64, 65, 128, 200, 1000)


class Time(NamedTuple):
    """Microseconds of one call."""

    median: float
    low: float
    high: float


class Rows(NamedTuple):
    """An operation on any rows of a fixed set."""

    total: int
    of: Callable[[torch.Tensor], torch.Tensor]
    """Row numbers int64 [M] to results [M, ...]."""
    together: Callable[[], torch.Tensor] | None = None
    """All rows in another way, where there is one."""


class RowBits(NamedTuple):
    """What `compare_rows` found."""

    compared: int
    """Outputs."""
    differ: int


def capture(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`, each on other buffers."""
    calls[0]()
    torch.cuda.synchronize()  # the other stream does not wait for inputs that are still being made
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    return graph


def time_in_turns(graphs: Mapping[Name, torch.cuda.CUDAGraph], calls: int, replays: int = 5) -> dict[Name, Time]:
    """The time of one of so many calls in each graph, over three turns of `replays`.

    The card lowers its clock under load, so that what is measured later in one go would look slower: before its burst
    of replays a graph finds a rested card, and each turn begins with another one.
    """
    times: dict[Name, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for turn in range(_TURNS):
        first = turn * len(names) // _TURNS
        for name in names[first:] + names[:first]:
            torch.cuda.synchronize()
            time.sleep(_REST_SECONDS)
            times[name] += _burst(graphs[name], calls, replays)
    found = {}
    for name, taken in times.items():
        deciles = statistics.quantiles(taken, n=10)
        found[name] = Time(statistics.median(taken), deciles[0], deciles[-1])
    return found


def _burst(graph: torch.cuda.CUDAGraph, calls: int, replays: int) -> list[float]:
    """Microseconds of one call in each replay but the first."""
    times = []
    for _ in range(replays + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return times[1:]


def workspace_bytes(call: Call) -> int:
    """The most memory that a first call holds besides its inputs and results, as torch's allocator counts it."""

    def peak_and_kept() -> tuple[int, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return found

    peak, _ = peak_and_kept()
    # What a second call keeps is its result alone: buffers that are made once are there by then.
    _, result_bytes = peak_and_kept()
    return max(0, peak - result_bytes)


def differing_bits(ours: Any, other: Any) -> int | None:
    """How many outputs differ in a bit; None where the results are not of one shape and dtype."""
    if isinstance(ours, tuple) and isinstance(other, tuple) and len(ours) == len(other):
        found = [differing_bits(*pair) for pair in zip(ours, other, strict=True)]
        return None if None in found else sum(n for n in found if n)
    if not (isinstance(ours, torch.Tensor) and isinstance(other, torch.Tensor)):
        return None
    if ours.shape != other.shape or ours.dtype != other.dtype:
        return None
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    return int((ours.contiguous().view(as_integer) != other.contiguous().view(as_integer)).sum())


def compare_rows(rows: Rows) -> RowBits:
    """Compare all rows in one batch with batches of 1 to all, in order and shuffled, and with other batch mates."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    order = torch.arange(rows.total, device=device)
    shuffled = torch.randperm(rows.total, generator=generator, device=device)
    expected = rows.of(order)
    batches = [order[:count] for count in _COUNTS if count < rows.total]
    batches += [shuffled[:count] for count in (5, 300) if count < rows.total] + [shuffled]
    # Each alone, and the last rows without the first.
    batches += [shuffled[i : i + 1] for i in range(min(4, rows.total))] + [order[rows.total // 2 :]]
    compared = differ = 0
    for batch in batches:
        differ += _differ(expected[batch], rows.of(batch))
        compared += expected[batch].numel()
    if rows.together:
        differ += _differ(expected, rows.together())
        compared += expected.numel()
    return RowBits(compared, differ)


def _differ(expected: torch.Tensor, actual: torch.Tensor) -> int:
    found = differing_bits(expected, actual)
    if found is None:
        raise ValueError(f"a batch of rows gives {tuple(actual.shape)}, the same rows of the whole {expected.shape}")
    return found
