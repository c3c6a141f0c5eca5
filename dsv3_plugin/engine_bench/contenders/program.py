"""What the engines' programs have in common: making the measurements of a job, pass by pass.

The engine runs its own loop; after each turn it tells a `Turns` what was printed. A prefill ends when every request has
its first token. A decode is timed once all requests have one: some steps that are looked at, then the timed ones, from
token to token by the clock of the process, since a token that a caller has is a step that is over.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.protocol import tell_progress
from dsv3_plugin.contenders import read_job, run_program
from dsv3_plugin.engine_bench.contenders.watch import Watch, save_logits
from dsv3_plugin.engine_bench.protocol import (
    Job,
    Measurement,
    Row,
    Start,
    logits_file,
    say,
)
from dsv3_plugin.engine_bench.tokens import Circle
from dsv3_plugin.errors import EngineError
from dsv3_plugin.version import __version__

MAX_BATCHED_TOKENS = 8192
"""Tokens of a pass, of every engine."""
LOOKED_AT = 4
"""Decode steps before the timed ones, in which experts are counted and logits kept."""

New = Mapping[int, Sequence[int]]
"""Request to the tokens that it has printed since the last turn."""


class Engine(Protocol):
    """An engine that is up."""

    start: Start
    watch: Watch
    max_batched_tokens: int
    """Tokens of a pass, if a measurement says nothing."""

    def run(self, prompts: Sequence[list[int]], max_tokens: int, chunk: int, turn: Callable[[New], bool]) -> None:
        """Submit prompts to an empty engine and run until they are done, or `turn` says that it is enough."""

    def experts(self, rows: int) -> tuple[int, ...] | None:
        """Different experts in each layer for the first `rows` tokens of the latest pass."""


@dataclass
class Turns:
    """One pass of a measurement."""

    engine: Engine
    measurement: Measurement
    steps: int
    watch_logits: bool
    printed: list[list[int]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    """Of each decode step's end, from the last one that is looked at on."""
    counts: list[int] = field(default_factory=list)
    """Tokens printed until each of them."""
    experts: list[tuple[int, ...]] = field(default_factory=list)
    looked: int = 0

    def begin(self) -> None:
        """Requests arrive."""
        self.printed = [[] for _ in range(self.measurement.requests)]
        self.engine.watch.keeping = self.watch_logits and self.measurement.kind == "prefill"
        self.began = time.perf_counter()

    def turn(self, new: New) -> bool:
        """After a turn of the engine's loop; returns whether it is to go on."""
        now = time.perf_counter()
        if not new:
            return True
        was_decoding = len(self.first) == self.measurement.requests
        for request, tokens in new.items():
            self.first.setdefault(request, now)
            self.printed[request] += tokens
        self.ended = now
        if self.measurement.kind == "prefill":
            return len(self.first) < self.measurement.requests
        return not was_decoding or self._decoded(now)

    def _decoded(self, now: float) -> bool:
        """After a step of all requests."""
        if self.looked < LOOKED_AT:
            self._look()
            return True
        self.times.append(now)
        self.counts.append(sum(map(len, self.printed)))
        return len(self.times) <= self.steps

    def _look(self) -> None:
        self.looked += 1
        # An engine may be a pass ahead of what it has told.
        self.engine.watch.keeping = self.watch_logits and self.looked < LOOKED_AT
        visited = self.engine.experts(self.measurement.requests * (self.measurement.drafts + 1))
        if visited is not None:
            self.experts.append(visited)

    @property
    def seconds(self) -> float:
        """From the arrival to the last token."""
        return self.ended - self.began

    @property
    def step_ms(self) -> list[float]:
        """Of each timed step."""
        return [(after - before) * 1e3 for before, after in zip(self.times, self.times[1:], strict=False)]

    def require_whole(self) -> None:
        """Raise `EngineError` where the pass ended before it was measured."""
        if len(self.first) < self.measurement.requests:
            raise EngineError(f"{len(self.first)} of {self.measurement.requests} requests got a token")
        if self.measurement.kind == "decode" and len(self.times) < 3:
            raise EngineError("the first requests were done before the last ones had begun")


def longest(measurement: Measurement, steps: int, max_batched_tokens: int) -> int:
    """Tokens that a request may print while the others' prompts are computed and the steps are timed."""
    if measurement.kind == "prefill":
        return 1
    chunk = min(measurement.chunk or max_batched_tokens, max_batched_tokens)
    prompts = math.ceil(measurement.requests * measurement.tokens / chunk) + measurement.requests
    return (prompts + LOOKED_AT + steps + 8) * (measurement.drafts + 1)


def measure(engine: Engine, measurement: Measurement, job: Job, file: Path) -> Row:
    """Make one measurement; what goes wrong is why it is absent."""
    circle = engine.watch.circle
    prompts = circle.prompts(measurement.requests, measurement.tokens)
    max_tokens = longest(measurement, job.steps, engine.max_batched_tokens)
    room, need = engine.start.cache_tokens, measurement.requests * (measurement.tokens + max_tokens)
    if room is not None and need > room:
        return Row(measurement=measurement, absent=f"needs room for {need:,} tokens, the cache has {room:,}")
    engine.watch.forced = measurement.forced
    engine.watch.force_drafts_right(measurement.drafts, measurement.acceptance)
    chunk = measurement.chunk or engine.max_batched_tokens
    made: list[Turns] = []
    try:
        for number in range(job.passes):
            turns = Turns(engine, measurement, job.steps, watch_logits=measurement.forced and number == 0)
            turns.begin()
            engine.run(prompts, max_tokens, chunk, turns.turn)
            turns.require_whole()
            made.append(turns)
    except EngineError as error:
        return Row(measurement=measurement, absent=str(error))
    finally:
        engine.watch.keeping = False
        seen = engine.watch.take()
    finite = save_logits(seen, circle, measurement, max_tokens, file)
    return _row(measurement, circle, made, finite)


def _row(measurement: Measurement, circle: Circle, made: Sequence[Turns], finite: bool | None) -> Row:
    """Of the best pass, but for the time of each, and what was looked at in any."""

    def as_forced(turns: Turns) -> bool:
        return all(
            printed == circle.continuation(request, measurement.requests, len(printed))
            for request, printed in enumerate(turns.printed)
        )

    known: dict[str, object] = {
        "measurement": measurement,
        "pass_seconds": tuple(turns.seconds for turns in made),
        "finite": finite,
        "as_forced": all(map(as_forced, made)) if measurement.forced else None,
    }
    best = min(made, key=lambda turns: turns.seconds)
    if measurement.kind == "decode":
        best = min(made, key=lambda turns: statistics.median(turns.step_ms))
        steps = best.step_ms
        deciles = statistics.quantiles(steps, n=10) if len(steps) > 1 else steps
        begun, ended = best.counts[0], best.counts[-1]
        known |= {
            "step_ms": (statistics.median(steps), deciles[0], deciles[-1]),
            "tokens_per_step": (ended - begun) / len(steps) / measurement.requests,
            "cached_tokens": measurement.tokens + (begun + ended) / 2 / measurement.requests,
            "experts": _mean_experts([visited for turns in made for visited in turns.experts]),
        }
    first = [after - best.began for after in best.first.values()]
    known["first_token_seconds"] = (statistics.fmean(first), max(first))
    return Row.model_validate(known)


def _mean_experts(visited: Sequence[tuple[int, ...]]) -> tuple[float, ...] | None:
    """Of each layer, over the steps that were looked at."""
    return tuple(statistics.fmean(of_layer) for of_layer in zip(*visited, strict=True)) if visited else None


def started(engine_versions: Mapping[str, str], **known: object) -> Start:
    """A `Start` with what this process knows of itself."""
    versions = {"dsv3-plugin": __version__, "torch": torch.__version__, "python": platform.python_version()}
    device, memory = "cpu", None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name} {str(getattr(properties, 'uuid', ''))[:8]}".strip()
        free, total = torch.cuda.mem_get_info()
        memory = total - free
    return Start.model_validate(
        {"device": device, "memory_bytes": memory, "versions": versions | dict(engine_versions), **known}
    )


def main(make_engine: Callable[[Job, Circle, int], Engine]) -> None:
    """See `run_program`; `make_engine` takes the job, the tokens, and how long a request gets."""

    def answer(job_dir: Path, result_dir: Path) -> None:
        job = read_job(Job, job_dir)
        if job.device == "cuda" and not torch.cuda.is_available():
            raise EngineError("the measurement is of a GPU, and torch finds none here")
        tell_progress("starting")
        engine = make_engine(job, *_needs(job))
        say(result_dir, engine.start)
        for number, measurement in enumerate(job.measurements):
            tell_progress(str(measurement))
            say(result_dir, measure(engine, measurement, job, logits_file(result_dir, number)))

    run_program(answer)
    _leave()


def _needs(job: Job) -> tuple[Circle, int]:
    """The tokens, and the longest request with what it may print."""
    config = DeepseekV3Config.from_pretrained(job.checkpoint)
    lengths = [m.tokens + longest(m, job.steps, MAX_BATCHED_TOKENS) for m in job.measurements]
    return Circle(config.vocab_size, job.seed), min(max(lengths) + 64, config.max_position_embeddings)


def _leave() -> None:
    """Without waiting for the threads that engines keep."""
    tell_progress("measured")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
