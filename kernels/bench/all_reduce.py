"""The all-reduces of vLLM and SGLang, to be timed beside sums in the tree's order: custom kernels over peer memory.

Theirs add bf16 in an order of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import distributed as dist

_ENGINES = {
    "vLLM": "vllm.distributed.device_communicators.custom_all_reduce",
    "SGLang": "sglang.srt.distributed.device_communicators.custom_all_reduce",
}


@dataclass(frozen=True)
class AllReduce:
    """One engine's."""

    run: Callable[[torch.Tensor], torch.Tensor | None]
    """bf16 to the sum of all ranks; None for a size that it leaves to others."""
    recording: Callable[[], AbstractContextManager[None]]
    """Around the recording of a CUDA graph."""


def all_reduces(process_group: dist.ProcessGroup, device: torch.device) -> tuple[dict[str, AllReduce], dict[str, str]]:
    """Of each engine that is installed its own, and of others why not. All ranks of a group of one host, whose backend
    is not NCCL, make this call.
    """
    found, missing = {}, {}
    for engine, module in _ENGINES.items():
        try:
            made = importlib.import_module(module).CustomAllreduce(process_group, device)
        except Exception as error:  # an engine's import, or its own look at the machine
            missing[engine] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if made.disabled:
            missing[engine] = "it is switched off on this machine"
            continue
        found[engine] = AllReduce(made.custom_all_reduce, made.capture)
    return found, missing
