"""Where a run is, and its checkpoints: Megatron's, with the answers that wait."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from record import forget_from
from rollout import Sample
from trainer import Trainer

from dsv3_plugin.errors import InputError


@dataclass
class Progress:
    """Where a run is: the next step, and with `--one-step-off` the answers that wait for it."""

    step: int = 0
    reference: int = 0
    """The step whose weights a KL divergence is measured to."""
    waiting: list[Sample] | None = None
    differences: dict[str, float] | None = None
    """Of their log-probabilities, under the weights that sampled them."""


def save(trainer: Trainer, progress: Progress, run: Path) -> None:
    """Write a checkpoint, whole or not at all, in place of the one before."""
    folder = run / "checkpoints" / f"{progress.step:05d}"
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    trainer.save(part)
    (part / "progress.json").write_text(json.dumps(asdict(progress)))
    part.rename(folder)
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old)


def resume(trainer: Trainer, run: Path) -> Progress:
    """Continue from the checkpoint of a run; what it recorded of later steps is forgotten."""
    folders = sorted(folder for folder in (run / "checkpoints").glob("*") if not folder.suffix)
    if not folders:
        raise InputError(f"{run}: holds no checkpoint to resume from")
    file = folders[-1] / "progress.json"
    try:
        saved = json.loads(file.read_text("utf-8"))
        waiting = None if saved["waiting"] is None else [Sample(**sample) for sample in saved["waiting"]]
        progress = Progress(**saved | {"waiting": waiting})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: does not say where the run is: {error}") from None
    trainer.load(folders[-1])
    forget_from(run, progress.step)
    return progress
