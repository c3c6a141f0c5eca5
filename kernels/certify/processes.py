"""The random cases of all operations, shared among processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from dsv3_plugin.kernels.certify.findings import ALL, Broken, Finding, together

# Cases of one operation that a process takes at a time.
SHARE = 32
# Each process holds a context on the card.
_MOST_PROCESSES = 16


class Share(NamedTuple):
    """Some of the random cases of an operation."""

    op: str
    numbers: range


def shares(ops: list[str], cases: int) -> list[Share]:
    """All operations' cases; first some of each."""
    starts = range(0, cases, SHARE)
    return [Share(op, range(start, min(cases, start + SHARE))) for start in starts for op in ops]


def in_processes(
    work: Callable[[Share], list[Finding]], shares: Iterable[Share]
) -> Iterator[tuple[Share, list[Finding]]]:
    """What `work` finds for each share, in a few processes, as they end. An operation's first share goes ahead: it
    compiles what the others find compiled. A process that dies is a finding, and where a kernel broke the next share
    gets a new process.
    """
    # Last in, first out: a process that is there is taken before another is started.
    idle: queue.LifoQueue[ProcessPoolExecutor | None] = queue.LifoQueue()
    count = min(_MOST_PROCESSES, os.cpu_count() or 1)
    for _ in range(count):
        idle.put(None)

    def run(share: Share) -> tuple[Share, list[Finding]]:
        process = idle.get() or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            found = process.submit(work, share).result()
        except BrokenProcessPool:
            found = [Broken(share.op, ALL, ALL, "the process died")]
        if any(isinstance(finding, Broken) for finding in found):
            process.shutdown()
            idle.put(None)
        else:
            idle.put(process)
        return share, found

    waiting: dict[str, list[Share]] = {}
    for share in shares:
        waiting.setdefault(share.op, []).append(share)
    with ThreadPoolExecutor(count) as threads:
        running = {threads.submit(run, of_op.pop(0)) for of_op in waiting.values()}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                share, found = future.result()
                running |= {threads.submit(run, next_one) for next_one in waiting.pop(share.op, ())}
                yield share, found
    for _ in range(count):
        if process := idle.get():
            process.shutdown()


def by_operation(found: Iterable[tuple[Share, list[Finding]]], shares: int) -> Iterator[list[Finding]]:
    """The findings of each operation as soon as all its shares are there, one a kernel."""
    waiting: dict[str, dict[int, list[Finding]]] = {}
    for share, findings in found:
        parts = waiting.setdefault(share.op, {})
        parts[share.numbers.start] = findings
        if len(parts) == shares:
            yield together([finding for start in sorted(parts) for finding in parts[start]])
