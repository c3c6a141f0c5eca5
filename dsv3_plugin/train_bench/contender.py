"""A contender's program: takes a job, trains for its steps, and says what came of each."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from dsv3_plugin.conformance.protocol import tell_progress
from dsv3_plugin.contenders import read_job, run_program
from dsv3_plugin.errors import EngineError
from dsv3_plugin.train_bench import text
from dsv3_plugin.train_bench.protocol import Job, say


def train(job: Job, folder: Path) -> None:
    """Raises `EngineError` where a GPU or TransformerEngine is asked for and missing."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("the measurement is of a GPU, and torch finds none here")
    if job.layers == "theirs" and find_spec("transformer_engine") is None:
        raise EngineError(f"Megatron's own layers need TransformerEngine, which is not installed for {sys.executable}")
    tell_progress("starting")
    from dsv3_plugin.train_bench import trainer  # Megatron takes seconds to import

    training = trainer.Trainer(job, trainer.start())
    say(folder, training.describe())
    tokens = text.read(Path(job.tokens))
    of_steps = (tokens[n * job.sequence : (n + 1) * job.sequence + 1] for n in range(job.steps + job.profiled))
    for number in range(job.steps):
        step = training.step(number, next(of_steps))
        say(folder, step)
        if number in (0, job.steps - 1) or (number + 1) % 20 == 0:
            tell_progress(f"step {number + 1}: loss {step.loss:.4f}, {step.seconds:.2f} s")
    say(folder, training.profile_steps(job.steps, of_steps))


def main() -> None:
    """See `run_program`."""
    run_program(lambda job_dir, result_dir: train(read_job(Job, job_dir), result_dir))


if __name__ == "__main__":
    main()
