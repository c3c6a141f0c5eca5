"""How long each part of a step takes, forward and backward.

At any moment a step is in the part that it entered last; entering another one costs a mark in the stream, no waiting.
So the parts of a step add up to the step. A part is a module of Megatron's tree: its forward pass begins and ends with
its call. Its backward pass begins when autograd reaches what computed its output, and ends when the gradient of its
input is complete.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

REST = "rest"


class Stopwatch:
    """The marks of the steps that were timed."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.running = False
        self.current = REST
        self.marks: list[tuple[str, Any]] = []

    def enter(self, part: str) -> None:
        """From now on it is time of `part`."""
        if not self.running or part == self.current:
            return
        self.current = part
        self.marks.append((part, self._now()))

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """It is time of `part` inside."""
        before = self.current
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what is inside, and nothing outside."""
        self.running, self.current = True, REST
        self.marks.append((REST, self._now()))
        try:
            yield
        finally:
            self.marks.append(("", self._now()))
            self.running = False

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """By part, of all steps together."""
        if self.on_gpu:
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        for (part, began), (_, ended) in zip(self.marks, self.marks[1:], strict=False):
            if part:
                total[part] += began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began
        return dict(total)

    def watch(self, module: nn.Module, part: str, around: str = REST) -> None:
        """Time the calls of a module, which may lie in the part `around`, and their backward passes."""
        forward, backward = f"{part}, forward", f"{part}, backward"
        outside = (REST, REST) if around == REST else (f"{around}, forward", f"{around}, backward")

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.enter(forward)
            given = next((x for x in (*args, *kwargs.values()) if _has_gradient(x)), None)
            if self.running and given is not None:
                given.register_hook(lambda _: self.enter(outside[1]))

        def end(_: nn.Module, args: Any, output: Any) -> None:
            made = next((x for x in (output if isinstance(output, tuple) else (output,)) if _has_gradient(x)), None)
            if self.running and made is not None:
                made.grad_fn.register_prehook(lambda _: self.enter(backward))
            self.enter(outside[0])

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and x.grad_fn is not None
