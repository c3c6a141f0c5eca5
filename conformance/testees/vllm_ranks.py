"""Ranks of vLLM, each an engine in a process that we have started: what vLLM calls an external launcher."""

from __future__ import annotations

import os
from typing import Any

from dsv3_plugin.conformance.layouts import RankOf


def join(rank: RankOf, port: int) -> dict[str, Any]:
    """Make this process's next engine one of several ranks that meet at a port; returns what else `LLM` is told."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    # vLLM takes the data-parallel rank from there.
    os.environ["RANK"] = str(rank.rank)
    # Not torchrun's variables: by them the shared memory of all engines of a CPU has one name.
    place = f"tcp://127.0.0.1:{port}", rank.rank, rank.rank
    ExecutorWithExternalLauncher._distributed_args = lambda executor: place
    layout = rank.layout
    return {
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": layout.tp,
        "data_parallel_size": layout.dp,
        "pipeline_parallel_size": layout.pp,
        "enable_expert_parallel": layout.ep > 1,
    }
