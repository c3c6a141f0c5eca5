"""Runs `main` of a script that calls Megatron's `pretrain`, on a CPU.

    python tests/pretrain_on_cpu.py SCRIPT ARGUMENTS

The loop asks for a GPU, its memory and its properties, compiles what the wheel brings compiled, and needs Python 3.12
for a decorator. The stand-ins for all that are put in place here; those for the model itself are megatron_cpu's.
"""

from __future__ import annotations

import os
import runpy
import sys
import typing
from functools import partial
from types import SimpleNamespace
from typing import Any

import megatron.core  # noqa: F401 - puts megatron_cpu's stand-ins in place
import torch

if not hasattr(typing, "override"):
    typing.override = lambda function: function  # type: ignore[attr-defined]

torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
torch.cuda.get_device_properties = lambda *args: SimpleNamespace(
    name="CPU", major=9, minor=0, multi_processor_count=1, total_memory=1 << 34
)
torch.cuda.memory_stats = lambda *args: {}
for name in (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_peak_memory_stats",
    "empty_cache",
):
    setattr(torch.cuda, name, lambda *args: 0)


def stay(self: torch.nn.Module, *args: Any) -> torch.nn.Module:
    """`Module.cuda`."""
    return self


torch.nn.Module.cuda = stay  # type: ignore[method-assign]


class Event(torch.cuda.Event):
    """An event that has happened, of the schedules that overlap communication."""

    def record(self, stream: Any) -> None:
        """It has happened."""

    def wait(self, stream: Any) -> None:
        """It has happened."""


torch.cuda.Event = Event  # type: ignore[misc]
torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: 0  # type: ignore[assignment]

from megatron.core.datasets import utils  # noqa: E402
from megatron.training import training  # noqa: E402

utils.compile_helpers = lambda: None
training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
training.set_jit_fusion_options = lambda **kwargs: None

# Megatron's checkpoint writers import this file again.
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="script")["main"]()
