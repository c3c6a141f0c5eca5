"""The reference: logits of the core's model, each sequence in one pass, at the positions that contenders have kept.

A job names files of logits, with the requests and positions of their rows. Forced tokens are known, so that a sequence
needs no engine. One pass goes as far as the last position that anyone asks for.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.protocol import Device, tell_progress
from dsv3_plugin.contenders import Message, read_job, run_program
from dsv3_plugin.engine_bench.protocol import Measurement
from dsv3_plugin.engine_bench.tokens import Circle
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.paged_batch import whole_sequence
from dsv3_plugin.ops.prompt_batch import with_prompts


class Asked(Message):
    """Logits that a contender has kept."""

    measurement: Measurement
    file: str


class ReferenceJob(Message):
    """What the reference is asked."""

    checkpoint: str
    device: Device
    seed: int
    asked: tuple[Asked, ...]


Place = tuple[int, int]
"""Request and position."""


def answer(job: ReferenceJob, file: Path) -> None:
    """Write each asked file's logits under its number, in the order of its rows."""
    reader = CheckpointReader(Path(job.checkpoint))
    device = torch.device(job.device)
    ops = bind_ops(reader.config, reader.profile(), device)
    model = load_model(reader, ops)
    circle = Circle(reader.config.vocab_size, job.seed)
    by_prompts: dict[tuple[int, int], list[tuple[int, list[Place]]]] = defaultdict(list)
    for number, asked in enumerate(job.asked):
        places = places_in(Path(asked.file))
        by_prompts[asked.measurement.requests, asked.measurement.tokens].append((number, places))
    found: dict[str, torch.Tensor] = {}
    for (requests, length), of_files in by_prompts.items():
        tell_progress(f"{requests} x {length}")
        prompts = circle.prompts(requests, length)
        logits: dict[Place, torch.Tensor] = {}
        wanted = sorted({place for _, places in of_files for place in places})
        for request in sorted({request for request, _ in wanted}):
            positions = [position for of, position in wanted if of == request]
            tokens = prompts[request] + circle.continuation(request, requests, max(0, positions[-1] + 1 - length))
            sequence = with_prompts(whole_sequence(len(tokens), device), (length,))
            attend = WholeSequences(ops, reader.config, sequence)
            hidden = model(torch.tensor(tokens, device=device), torch.arange(len(tokens), device=device), attend)
            rows = model.lm_head(hidden[positions]).float().cpu()
            logits |= {(request, position): row for position, row in zip(positions, rows, strict=True)}
        for number, places in of_files:
            found[str(number)] = torch.stack([logits[place] for place in places])
    save_file(found, file)


def places_in(file: Path) -> list[Place]:
    """Of each row of a file of logits."""
    with safe_open(file, "pt") as opened:
        requests, positions = opened.get_tensor("request").tolist(), opened.get_tensor("position").tolist()
    return list(zip(requests, positions, strict=True))


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Between rows of logits [rows, vocab_size]: of each row the length of the difference over that of the reference's
    own deviations, and the median of those; NaN where a logit is.
    """
    logits, reference = logits.double(), reference.double()
    deviations = (reference - reference.mean(1, keepdim=True)).norm(dim=1)
    return float(((logits - reference).norm(dim=1) / deviations).median())


def main() -> None:
    """See `run_program`."""

    def answer_job(job_dir: Path, result_dir: Path) -> None:
        with torch.inference_mode():
            answer(read_job(ReferenceJob, job_dir), result_dir / "reference.safetensors")

    run_program(answer_job)


if __name__ == "__main__":
    main()
