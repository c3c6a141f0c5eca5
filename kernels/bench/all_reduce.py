"""The all-reduces of vLLM and SGLang, to be timed beside sums in the tree's order: custom kernels over peer memory.

Theirs add bf16 in an order of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed as dist


@dataclass(frozen=True)
class AllReduce:
    """One engine's."""

    run: Callable[[torch.Tensor], torch.Tensor | None]
    """bf16 to the sum of all ranks; None for a size that it leaves to others."""
    recording: Callable[[], AbstractContextManager[None]]
    """Around the recording of a CUDA graph."""


def all_reduces(process_group: dist.ProcessGroup, device: torch.device) -> tuple[dict[str, AllReduce], dict[str, str]]:
    """Of each engine that is installed its own, and of others why not. All ranks of the default group make this call,
    each with a group of one host, whose backend is not NCCL.
    """
    found, missing = {}, {}
    for engine, make in ("vLLM", _of_vllm), ("SGLang", _of_sglang):
        try:
            made = make(process_group, device)
        except Exception as error:  # an engine's import, or its own look at the machine
            missing[engine] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if made.disabled:
            missing[engine] = "it is switched off on this machine"
            continue
        found[engine] = AllReduce(partial(_run, made), made.capture)
    return found, missing


def _of_vllm(process_group: dist.ProcessGroup, device: torch.device) -> Any:
    module = importlib.import_module("vllm.distributed.device_communicators.custom_all_reduce")
    return module.CustomAllreduce(process_group, device)


def _of_sglang(process_group: dist.ProcessGroup, device: torch.device) -> Any:
    """The one of several that SGLang takes on this machine. Its look at the cards needs SGLang's group of all ranks."""
    state = importlib.import_module("sglang.srt.distributed.parallel_state")
    state.init_distributed_environment(local_rank=device.index or 0, backend="gloo")
    module = importlib.import_module("sglang.srt.distributed.device_communicators.custom_all_reduce")
    return module.dispatch_custom_allreduce(process_group, device)(process_group, device)


def _run(made: Any, x: torch.Tensor) -> torch.Tensor | None:
    total: torch.Tensor | None = made.custom_all_reduce(x) if made.should_custom_ar(x) else None
    return total
