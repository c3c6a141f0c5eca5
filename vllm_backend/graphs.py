"""CUDA graphs in pieces, for passes that are no uniform decode: drafts, and chunks of prompts beside decodes.

Attention's kernels depend on the batch, so such a graph ends where attention begins, and another one begins behind it.
vLLM knows two ways to cut it (its mode PIECEWISE): it compiles a model, which ours is not, or it breaks off the
recording (`vllm/compilation/breakable_cudagraph.py`). The latter is used here, for our models alone: vLLM's own switch
for it, `VLLM_USE_BREAKABLE_CUDAGRAPH`, is the whole process's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture, BreakableCUDAGraphWrapper
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import weak_ref_tensors

Forward = Callable[..., Any]


def in_pieces(forward: Forward, vllm_config: VllmConfig, has_prompts: Callable[[], bool]) -> Forward:
    """A model's `forward`, recorded in pieces for the passes that vLLM records and replays so. `has_prompts` says
    whether a pass takes a path of its own, which no graph holds.
    """
    if vllm_config.device_config.device_type != "cuda":
        return forward
    recorded = BreakableCUDAGraphWrapper(forward, vllm_config)

    def call(**inputs: Any) -> Any:
        as_graph = is_forward_context_available() and _mode() == CUDAGraphMode.PIECEWISE
        return (recorded if as_graph and not has_prompts() else forward)(**inputs)

    return call


def is_recording() -> bool:
    """Whether the pass is being recorded in pieces."""
    return BreakableCUDAGraphCapture.current() is not None and _mode() == CUDAGraphMode.PIECEWISE


def fill_between(fill: Callable[..., None], out: torch.Tensor, *args: Any) -> torch.Tensor:
    """`out`, which between two pieces `fill` of it and of `args` fills: now, and in each replay.

    Where `out` and tensors of `args` are is all that is kept, as vLLM does: their memory is the graph's.
    """
    capture = BreakableCUDAGraphCapture.current()
    assert capture is not None
    tensors = [weak_ref_tensors(x) if isinstance(x, torch.Tensor) else x for x in (out, *args)]
    capture.add_eager(lambda: fill(*tensors))
    return out


def _mode() -> CUDAGraphMode:
    return get_forward_context().cudagraph_runtime_mode
