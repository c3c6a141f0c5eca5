"""The vLLM testee, which also tells what each rank reads of the checkpoint: to `reads.json` in its result folder.

`WATCHED_VLLM=combine` makes a rank combine experts in another order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.vllm import VllmTestee
from dsv3_plugin.ops.combine import combine


class Watched(VllmTestee):
    def start_engine(self, num_speculative_tokens: int) -> None:
        reads: dict[str, Any] = {"ours": [], "numbers": 0, "theirs": []}
        watch_reader(reads)
        watch_vllm(reads)
        if os.environ.get("WATCHED_VLLM") == "combine":
            combine_in_another_order()
        super().start_engine(num_speculative_tokens)
        runner = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        reads["held"] = sum(parameter.numel() for parameter in runner.model.parameters())
        (Path(sys.argv[-1]) / "reads.json").write_text(json.dumps(reads))


def watch_reader(reads: dict[str, Any]) -> None:
    """What `CheckpointReader.tensors` reads; the checks of scales and biases are not counted."""
    tensors = CheckpointReader.tensors

    def watched(self: CheckpointReader, *args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors(self, *args):
            reads["ours"].append(name)
            reads["numbers"] += tensor.numel()
            yield name, tensor

    CheckpointReader.tensors = watched  # type: ignore[method-assign]


def watch_vllm(reads: dict[str, Any]) -> None:
    from vllm.model_executor.model_loader import default_loader

    iterator = default_loader.safetensors_weights_iterator

    def watched(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in iterator(*args, **kwargs):
            reads["theirs"].append(name)
            yield name, tensor

    default_loader.safetensors_weights_iterator = watched


def combine_in_another_order() -> None:
    from dsv3_plugin.vllm_backend import model

    bind_ops = model.bind_ops

    def backwards(out: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return combine(out, slots.flip(1), weights.flip(1), shared)

    model.bind_ops = lambda *args, **kwargs: bind_ops(*args, **kwargs).with_kernel(combine, backwards)


if __name__ == "__main__":
    program.main(Watched, Watched)
