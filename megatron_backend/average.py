"""The exponential moving average of the weights, in the CPU's memory (DeepSeek-V3 report, section 3.2.3).

After a step the new weights are copied to the CPU on a stream of their own, and a thread folds them into the average,
both while the next step's gradients are computed. Nothing of it reaches the model: a run with an average learns the
bits of one without. Where ranks gather the weights during the next forward pass (`--overlap-param-gather`), they are
whole when the next step begins, and are copied then: the step waits for the copy.

    average <- decay * average + (1 - decay) * weights        in fp32, each product and sum rounded once

The average has checkpoints of its own, Megatron's distributed ones under the keys of the model, one for each of the
model's: `dsv3 convert to-hf` reads them, and a run continues with equal bits in any layout. Biases of routers are not
averaged; a checkpoint has those of its iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import distributed as dist
from torch import nn

from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.convert import TRACKER


class WeightAverage:
    """Of this rank's part of a model, the list of its virtual pipeline stages without their wrappers."""

    @torch.no_grad()
    def __init__(self, chunks: Sequence[nn.Module], decay: float) -> None:
        """Begins with the weights as they are. Raises `EngineError` for a decay that averages nothing."""
        if not 0 < decay < 1:
            raise EngineError(f"--ema-decay {decay}: give a number between 0 and 1, such as 0.999")
        self.decay = decay
        self.chunks = chunks
        parameters = [dict(chunk.named_parameters()) for chunk in chunks]
        self.averages = [{name: p.to("cpu", torch.float32, copy=True) for name, p in of.items()} for of in parameters]
        self.parameters = [parameter for of in parameters for parameter in of.values()]
        self.arriving = [torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda) for p in self.parameters]
        self.stream = torch.cuda.Stream()
        self.thread = ThreadPoolExecutor(1, "weight average")
        self.folded: Future[None] | None = None
        self.is_behind = False

    def _catch_up(self) -> None:
        """Average the last step's weights if that has not begun."""
        if self.is_behind:
            self.update()
            self.is_behind = False

    def follow(self, optimizer: Any, *, late: bool = False) -> None:
        """From now on, average the weights that each step of Megatron's `optimizer` makes; `late`, if they are whole
        when the next step begins or a checkpoint is saved, and not before.
        """
        step = optimizer.step

        def step_and_average() -> Any:
            self._catch_up()
            torch.cuda.current_stream().wait_stream(self.stream)  # the last copies, of what the step overwrites
            done = step()
            self.is_behind = True
            if not late:
                self._catch_up()
            return done

        optimizer.step = step_and_average

    @torch.no_grad()
    def update(self) -> None:
        """Begin to fold the weights in; waits for the last time's."""
        self.wait()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for arriving, parameter in zip(self.arriving, self.parameters, strict=True):
                arriving.copy_(parameter, non_blocking=True)
        self.folded = self.thread.submit(self._fold, self.stream.record_event())

    @torch.no_grad()
    def _fold(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        averages = (average for of_chunk in self.averages for average in of_chunk.values())
        for average, arriving in zip(averages, self.arriving, strict=True):
            # Not `lerp`, whose last place depends on where a tensor is cut.
            average.mul_(self.decay).add_(arriving.float().mul_(1 - self.decay))

    def wait(self) -> None:
        """Until the weights of the last step are in the average. Raises what the thread raised."""
        if self.folded is not None:
            self.folded.result()
            self.folded = None

    def save(self, folder: Path, iteration: int) -> None:
        """Write a checkpoint, all ranks together."""
        self._catch_up()
        self.wait()
        latest = _of_iteration(folder, iteration)
        latest.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(self._sharded() | {"iteration": iteration}, str(latest))
        if dist.get_rank() == 0:
            (folder / TRACKER).write_text(str(iteration))

    @torch.no_grad()
    def load(self, folder: Path, iteration: int) -> bool:
        """Continue with the average of an iteration, all ranks together; False where there is none."""
        if not dist_checkpointing.check_is_distributed_checkpoint(str(_of_iteration(folder, iteration))):
            return False
        state = dist_checkpointing.load(self._sharded(), str(_of_iteration(folder, iteration)))
        for i, averages in enumerate(self.averages):
            for name, average in averages.items():
                average.copy_(state[_chunk(i)][name])
        return True

    def _sharded(self) -> dict[str, Any]:
        """The model's sharded tensors, with the averages as their data."""
        state = {}
        for i, (chunk, averages) in enumerate(zip(self.chunks, self.averages, strict=True)):
            of_chunk: dict[str, Any] = chunk.sharded_state_dict()  # type: ignore[operator]
            for name, average in averages.items():
                of_chunk[name].data = average
                if hasattr(of_chunk[name], "dtype"):  # which a factory asks of its data
                    of_chunk[name].dtype = average.dtype
            state[_chunk(i)] = of_chunk
        return state


def _of_iteration(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def _chunk(number: int) -> str:
    return f"model{number}"
