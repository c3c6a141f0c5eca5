"""What a contender is asked and what it answers.

    python -m dsv3_plugin.train_bench.contender JOB_DIR RESULT_DIR

`JOB_DIR/job.json` is a `Job`. The contender appends to `RESULT_DIR/answers.jsonl`, line by line as it goes: a `Start`,
a `Step` for each step, an `End`. So what was measured before a contender dies is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.contenders import Message

Layers = Literal["ours", "theirs"]
"""This package's in Megatron's places, or Megatron's own of TransformerEngine."""


class Job(Message):
    """What a contender is asked to do."""

    layers: Layers
    config: dict[str, Any]
    """A `config.json`. Theirs is trained as `settings` say, in FP8 or not."""
    device: Device
    tokens: str
    """A file of `text.write`."""
    sequence: int
    """Tokens of a step."""
    steps: int
    """Whose loss and time are taken."""
    profiled: int
    """Further steps, whose parts are timed."""
    learning_rate: float
    seed: int
    """Of the weights."""
    settings: dict[str, Any]
    """Megatron's, of its `TransformerConfig`."""
    variables: dict[str, str]
    """That its environment was given."""


class Start(Message):
    """A contender is about to train."""

    kind: Literal["start"] = "start"
    device: str
    versions: dict[str, str]
    model: str
    """Its class, and what computes in it."""
    optimizer: str
    weights: int
    """Numbers."""
    initial: str
    """A digest of the tensors that were filled: contenders with the same one began with the same weights."""


class Step(Message):
    """One step: forward, backward and optimizer."""

    kind: Literal["step"] = "step"
    seconds: float
    loss: float
    """Nats a token, without MTP's."""
    mtp_loss: float | None = None
    gradient_norm: float


class End(Message):
    """All steps were made."""

    kind: Literal["end"] = "end"
    held_bytes: int | None = None
    """Of the card, between steps: weights, gradients and optimizer."""
    peak_bytes: int | None = None
    """Of the card, in any step."""
    parts: dict[str, float]
    """Part of a step to its seconds, on average over the profiled steps."""
    profiled_seconds: float | None = None
    """Of such a step: their sum."""


class Answers(Message):
    """All that a contender said."""

    start: Start | None = None
    steps: tuple[Step, ...] = ()
    end: End | None = None


_LINE: TypeAdapter[Start | Step | End] = TypeAdapter(Annotated[Start | Step | End, Field(discriminator="kind")])


def _file(folder: Path) -> Path:
    return folder / "answers.jsonl"


def say(folder: Path, message: Start | Step | End) -> None:
    """Append to the answers."""
    with _file(folder).open("a") as file:
        file.write(message.model_dump_json() + "\n")


def heard(folder: Path) -> Answers:
    """What was said so far; a last line that was cut short is left out."""
    try:
        lines = _file(folder).read_text().splitlines()
    except OSError:
        return Answers()
    start: Start | None = None
    end: End | None = None
    steps = []
    for line in lines:
        try:
            message = _LINE.validate_json(line)
        except ValidationError:
            break
        if isinstance(message, Start):
            start = message
        elif isinstance(message, Step):
            steps.append(message)
        else:
            end = message
    return Answers(start=start, steps=tuple(steps), end=end)
