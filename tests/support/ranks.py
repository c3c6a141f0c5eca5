"""Several ranks on this machine, each a process, with gloo between them."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

import torch
from torch import distributed as dist

from dsv3_plugin.layout import Group

T = TypeVar("T")
SECONDS = 60
# A new process imports and compiles.
_SECONDS_WITH_A_GPU = 240


def on_ranks(count: int, work: Callable[[int], T], start: Literal["fork", "spawn"] = "fork") -> list[T]:
    """What `work(rank)` returns on each of `count` ranks, which are forks of this process, or new ones where it uses a
    GPU. Raises what one raised.
    """
    context, seconds = get_context(start), SECONDS if start == "fork" else _SECONDS_WITH_A_GPU
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        ranks = [
            context.Process(target=_rank, args=(rank, count, f"{folder}/store", seconds, work, sender))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        for _, sender in pipes:  # else one that ends is waited for
            sender.close()
        try:
            answers = [_answer(receiver, seconds) for receiver, _ in pipes]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
    if errors := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error is not None]:
        raise RuntimeError("\n".join(errors))
    return [answer for answer, _ in answers]


def _answer(receiver: Connection, seconds: int) -> Any:
    if not receiver.poll(seconds):
        return None, "no answer"
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return None, "it ended without an answer"


def group(ranks: Sequence[int]) -> Group:
    """The group of some ranks. Every rank makes this call, with its own ranks; all groups are of one size."""
    everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, tuple(ranks))
    groups = {members: dist.new_group(list(members)) for members in sorted(set(everyone))}
    return Group(ranks.index(dist.get_rank()), len(ranks), groups[tuple(ranks)])


def _rank(rank: int, count: int, store: str, seconds: int, work: Callable[[int], T], sender: Connection) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=seconds)
        )
        # Pickled here, because multiprocessing would send a tensor as a place in this process's memory.
        sender.send_bytes(pickle.dumps((work(rank), None)))
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
    # No clean-up: a rank that waits for another, which has failed, would not end.
    os._exit(0)
