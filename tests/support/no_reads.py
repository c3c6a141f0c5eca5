"""Whether an adapter's step reads a number of a device: on torch's "meta" device nobody can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import PropertyMock, patch

import torch

from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.mla_attention import mla_attention, require_inputs
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.registry import Ops


def checked_only(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    batch: PagedBatch,
    keys: KeySelection = ALL_KEYS,
    *,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """`mla_attention` up to its launch."""
    require_inputs(q, latent_cache, batch, keys, scale)
    return q.new_empty(*q.shape[:2], kv_lora_rank)


def reads_nothing(ops: Ops, step: Callable[[], PagedBatch]) -> dict[str, Any]:
    """What became of a step on the "meta" device: whether it ran, what the host then knows of the requests' starts, and
    the twins: of a step whose batch is checked as on a CPU, and of a number that is read.
    """
    kernel = ops[mla_attention]
    ops.kernels[mla_attention] = checked_only  # type: ignore[index]
    try:
        batch = step()
        found: dict[str, Any] = {"ran": True, "host_query_start_loc": batch.host_query_start_loc}
        with patch.object(PagedBatch, "is_on_cpu", PropertyMock(return_value=True)):
            found["checked as on a CPU"] = outcome(step)
        found["seq_lens"] = outcome(batch.read_seq_lens)
    finally:
        ops.kernels[mla_attention] = kernel  # type: ignore[index]
    return found


def outcome(call: Callable[[], object]) -> str:
    """What it raises, in short."""
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        return "raises" if "meta" in str(error) else str(error)
    return "reads"
