"""What a contender is asked and what it answers.

    python -m dsv3_plugin.engine_bench.contenders.NAME JOB_DIR RESULT_DIR

`JOB_DIR/job.json` is a `Job`. The contender appends to `RESULT_DIR/rows.jsonl`, line by line as it goes: first a
`Start`, then a `Row` for each measurement. So what was measured before a contender dies is there. Beside it lies
`{number}.safetensors` for the logits of the measurement of that number in the job: `logits` fp32 [rows, vocab_size],
`request` int64 [rows], and `position` int64 [rows], that of the last token which the row saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.contenders import Message

Kind = Literal["prefill", "decode"]

LOOKED_AT = 4
"""Decode steps before the timed ones, in which experts are counted and logits kept."""
UNTIMED = LOOKED_AT + 8
"""Decode steps of a pass, beside the timed ones, that an engine may be ahead."""


class Measurement(Message):
    """One line of the report: requests that arrive together at an engine whose cache is empty."""

    kind: Kind
    requests: int
    tokens: int
    """Of each prompt."""
    chunk: int | None = None
    """Tokens that a pass may process; None: as the engine is started."""
    drafts: int = 0
    """Tokens that MTP proposes a step, which an engine is started with."""
    acceptance: float | None = None
    """Part of the drafts that are right, drafts and tokens being forced. None: nothing is forced where there are
    drafts, and the layer's own guesses are accepted as they happen to be.
    """

    @property
    def forced(self) -> bool:
        """Whether the tokens are those of `tokens`."""
        return not self.drafts or self.acceptance is not None

    def order(self) -> tuple[object, ...]:
        """In which a report has them."""
        acceptance = 2.0 if self.acceptance is None else self.acceptance
        return self.kind != "prefill", self.drafts, self.tokens, self.requests, self.chunk or 0, acceptance

    def __str__(self) -> str:
        """`prefill 8 x 4096`, `decode 32 at 1024, 3 drafts, 85 % right`."""
        if self.kind == "prefill":
            text = f"prefill {self.requests} x {self.tokens}"
        else:
            text = f"decode {self.requests} at {self.tokens}"
        if self.chunk is not None:
            text += f", passes of {self.chunk}"
        if self.drafts:
            right = "its own" if self.acceptance is None else f"{self.acceptance:.0%} right"
            text += f", {self.drafts} {'draft' if self.drafts == 1 else 'drafts'}, {right}"
        return text


class Job(Message):
    """What a contender is asked to do."""

    checkpoint: str
    device: Device
    measurements: tuple[Measurement, ...]
    """All with the same number of drafts."""
    steps: int
    """Decode steps that are timed in each pass."""
    passes: int
    """How often each measurement is made; the first shows what is compiled while serving."""
    seed: int
    layout: str = "one"
    """Ranks of this machine, in the words of `conformance.layouts`."""
    eager: bool = False
    """Without compilers and CUDA graphs, for its logits alone."""
    keeps_logits: bool = True
    """Of the first pass, for the reference."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the engine, beside what the contender needs."""

    @property
    def drafts(self) -> int:
        """Draft tokens a step."""
        return self.measurements[0].drafts


class Start(Message):
    """A contender is up."""

    device: str
    """Name and, of a card, its identity; of several ranks all of them."""
    versions: dict[str, str]
    served: str
    """The model's class."""
    import_seconds: float
    up_seconds: float
    """From the imported engine until it would take a request."""
    memory_bytes: int | None = None
    """What is taken of the card, here and below of the rank that has the most."""
    weight_bytes: int | None = None
    cache_bytes_per_token: float | None = None
    cache_tokens: int | None = None
    """Tokens that the cache has room for, of the rank with the least room."""


class Row(Message):
    """What came of a measurement."""

    measurement: Measurement
    absent: str | None = None
    """Why it was not made; then the rest is empty."""
    pass_seconds: tuple[float, ...] = ()
    """Of each pass, from the arrival of the requests to its end."""
    first_token_seconds: tuple[float, ...] = ()
    """Of the best pass: the mean over requests, and the last."""
    step_ms: tuple[float, ...] = ()
    """Of the best pass's decode steps: median, 10th and 90th percentile. Of several ranks the slowest one's, here and
    above.
    """
    tokens_per_step: float | None = None
    """Of each request; more than one where drafts are accepted."""
    cached_tokens: float | None = None
    """Of each request, on average over the timed steps."""
    experts: tuple[float, ...] | None = None
    """Different experts that a decode step visited in each layer that has them, counted over all ranks."""
    finite: bool | None = None
    """Whether all logits were, of the passes that were looked at."""
    as_forced: bool | None = None
    """Whether every token was the forced one."""


class Answers(Message):
    """All that a contender said, with what went wrong at its end."""

    start: Start | None = None
    rows: tuple[Row, ...] = ()
    failure: str | None = None


def rows_file(folder: Path) -> Path:
    """Where a contender answers."""
    return folder / "rows.jsonl"


def logits_file(folder: Path, number: int) -> Path:
    """Where the logits of a job's measurement are."""
    return folder / f"{number}.safetensors"


def say(folder: Path, message: Start | Row) -> None:
    """Append to the answers."""
    with rows_file(folder).open("a") as file:
        file.write(message.model_dump_json() + "\n")


def heard(folder: Path) -> Answers:
    """What was said so far; a last line that was cut short is left out."""
    try:
        lines = rows_file(folder).read_text().splitlines()
    except OSError:
        return Answers()
    start: Start | None = None
    rows = []
    for line in lines:
        try:
            if start is None:
                start = Start.model_validate_json(line)
            else:
                rows.append(Row.model_validate_json(line))
        except ValidationError:
            break
    return Answers(start=start, rows=tuple(rows))
