"""Work beside other work: in a CUDA graph on a second stream, so that small kernels fill what others leave idle.

Elsewhere it runs where it is written: without a graph the host is what a small batch waits for, and memory that passes
from stream to stream would be kept for longer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def beside(work: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Start `work` on `device`. The function that is returned waits for it and gives its result; until then the caller
    keeps what `work` reads, and starts nothing else.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        result = work()
        return lambda: result
    first, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        result = work()

    def join() -> T:
        first.wait_stream(second)
        return result

    return join


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
