"""What the engines' programs have in common: making the measurements of a job, pass by pass.

The engine runs its own loop; after each turn it tells a `Turns` what was printed. A prefill ends when every request has
its first token. A decode is timed once all requests have one: some steps that are looked at, then the timed ones, from
token to token by the clock of the process, since a token that a caller has is a step that is over.

On several ranks the program starts itself once a rank. Each runs its engine and its turns; the first one writes what
came of all.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.layouts import ALONE, ONE_RANK, ParallelLayout, RankOf
from dsv3_plugin.conformance.protocol import tell_progress
from dsv3_plugin.conformance.testees.ranks import start_ranks, this_program, wait_for_ranks
from dsv3_plugin.contenders import read_job, run_rank
from dsv3_plugin.engine_bench.contenders.ranks import TURNS, Ranks, Visited, most, start_of_all
from dsv3_plugin.engine_bench.contenders.watch import Watch, kept_logits, save_logits
from dsv3_plugin.engine_bench.protocol import (
    LOOKED_AT,
    UNTIMED,
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

New = Mapping[int, Sequence[int]]
"""Request to the tokens that it has printed since the last turn."""


class Engine(Protocol):
    """An engine that is up."""

    start: Start
    watch: Watch
    ranks: Ranks
    max_batched_tokens: int
    """Tokens of a pass, if a measurement says nothing."""

    def run(self, prompts: Sequence[list[int]], max_tokens: int, chunk: int, turn: Callable[[New], bool]) -> None:
        """Submit prompts to an empty engine and run until they are done, or `turn` says that it is enough. Where
        replicas run together only `turn` ends it, which is called after each pass, and a replica without requests goes
        along.
        """

    def experts(self, rows: Sequence[int]) -> Visited | None:
        """Different experts in each layer for the tokens of the latest pass, of which the replicas have `rows`."""


@dataclass(frozen=True)
class Pass:
    """What a rank says of a pass."""

    requests: int
    seconds: float
    """From the arrival to the last token."""
    first: tuple[float, ...]
    """Seconds until each request's first token."""
    step_ms: tuple[float, ...]
    printed: tuple[int, int] | None
    """Tokens until the first timed step, and until the end of the last one."""
    experts: tuple[Visited, ...]
    as_forced: bool
    fault: str | None
    """Why it ended before it was measured."""


@dataclass
class Turns:
    """One pass of a measurement."""

    engine: Engine
    measurement: Measurement
    steps: int
    watch_logits: bool
    own: Sequence[int]
    """The numbers of this rank's requests."""
    decoding: bool = False
    """Whether all requests print, those of other ranks too."""
    turns: int = 0
    printed: list[list[int]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    """Of each decode step's end, from the last one that is looked at on."""
    counts: list[int] = field(default_factory=list)
    """Tokens printed until each of them."""
    experts: list[Visited] = field(default_factory=list)
    looked: int = 0

    def begin(self) -> None:
        """Requests arrive."""
        self.printed = [[] for _ in self.own]
        self.engine.watch.keeping = self.watch_logits and self.measurement.kind == "prefill"
        self.engine.watch.looking = self.measurement.kind == "decode"
        self.engine.ranks.all(True)
        self.began = self.ended = time.perf_counter()

    def turn(self, new: New) -> bool:
        """After a turn of the engine's loop; returns whether it is to go on."""
        now = time.perf_counter()
        ranks = self.engine.ranks
        for request, tokens in new.items():
            self.first.setdefault(request, now)
            self.printed[request] += tokens
            self.ended = now
        self.turns += 1
        if ranks.replicas > 1:
            if self.decoding:
                return self._decoded(now)
            if self.turns % TURNS == 0:
                self.decoding = ranks.all(len(self.first) == len(self.own))
        elif not new:
            return True
        elif self.decoding:
            return self._decoded(now)
        else:
            self.decoding = len(self.first) == len(self.own)
        return not self.decoding or self.measurement.kind == "decode"

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
        self.engine.watch.looking = self.looked < LOOKED_AT
        self.engine.watch.keeping = self.watch_logits and self.engine.watch.looking
        rows = [count * (self.measurement.drafts + 1) for count in self.engine.ranks.dealt(self.measurement.requests)]
        visited = self.engine.ranks.united(self.engine.experts(rows) if self.own else ())
        if visited is not None:
            self.experts.append(visited)

    def done(self) -> Pass:
        """What came of it."""
        requests, circle = self.measurement.requests, self.engine.watch.circle
        return Pass(
            requests=len(self.own),
            seconds=self.ended - self.began,
            first=tuple(after - self.began for after in self.first.values()),
            step_ms=tuple((after - before) * 1e3 for before, after in itertools.pairwise(self.times)),
            printed=(self.counts[0], self.counts[-1]) if self.counts else None,
            experts=tuple(self.experts),
            as_forced=all(
                printed == circle.continuation(request, requests, len(printed))
                for request, printed in zip(self.own, self.printed, strict=True)
            ),
            fault=self._fault(),
        )

    def _fault(self) -> str | None:
        if len(self.first) < len(self.own):
            return f"{len(self.first)} of {len(self.own)} requests got a token"
        if self.measurement.kind == "decode" and len(self.times) < 3:
            return "the first requests were done before the last ones had begun"
        return None


def longest(measurement: Measurement, steps: int, max_batched_tokens: int, replicas: int) -> int:
    """Tokens that a request may print while the others' prompts are computed and the steps are timed."""
    if measurement.kind == "prefill":
        return 1
    chunk = min(measurement.chunk or max_batched_tokens, max_batched_tokens)
    requests = most(measurement.requests, replicas)
    # Of those that a pass takes from beginning to end, beside a token or more of each request that prints.
    whole = (chunk - requests * (measurement.drafts + 1)) // measurement.tokens
    prompts = math.ceil(requests / whole) if whole > 0 else math.ceil(requests * measurement.tokens / chunk) + requests
    return (prompts + (TURNS if replicas > 1 else 0) + steps + UNTIMED) * (measurement.drafts + 1)


def measure(engine: Engine, measurement: Measurement, job: Job, file: Path) -> Row:
    """Make one measurement; what goes wrong is why it is absent. All ranks return the same."""
    ranks, circle = engine.ranks, engine.watch.circle
    own = ranks.own(measurement.requests)
    prompts = circle.prompts(measurement.requests, measurement.tokens)
    max_tokens = longest(measurement, job.steps, engine.max_batched_tokens, ranks.replicas)
    room = engine.start.cache_tokens
    need = most(measurement.requests, ranks.replicas) * (measurement.tokens + max_tokens)
    if room is not None and need > room:
        return Row(measurement=measurement, absent=f"needs room for {need:,} tokens, the cache has {room:,}")
    engine.watch.forced = measurement.forced
    engine.watch.force_drafts_right(measurement.drafts, measurement.acceptance)
    chunk = min(measurement.chunk or engine.max_batched_tokens, engine.max_batched_tokens)
    made: list[list[Pass]] = []
    kept = None
    keeps = measurement.forced and job.keeps_logits
    for number in range(job.passes):
        turns = Turns(engine, measurement, job.steps, watch_logits=keeps and number == 0, own=own)
        turns.begin()
        try:
            engine.run([prompts[request] for request in own], max_tokens, chunk, turns.turn)
        finally:
            engine.watch.keeping = False
        if number == 0:
            printed = {request: len(tokens) for request, tokens in zip(own, turns.printed, strict=True)}
            kept = ranks.told(kept_logits(engine.watch.take(), circle, measurement.requests, printed))
        made.append([of_rank for of_rank in ranks.told(turns.done()) if of_rank.requests])
        if faults := [of_rank.fault for of_rank in made[-1] if of_rank.fault]:
            return Row(measurement=measurement, absent=faults[0])
    finite = save_logits(kept or [], measurement.tokens, file) if ranks.is_first else None
    return _row(measurement, made, finite)


def _row(measurement: Measurement, made: Sequence[Sequence[Pass]], finite: bool | None) -> Row:
    """Of the best pass, by the slowest rank, but for the time of each, and what was looked at in any."""
    known: dict[str, object] = {
        "measurement": measurement,
        "pass_seconds": tuple(map(_seconds, made)),
        "finite": finite,
        "as_forced": all(rank.as_forced for ranks in made for rank in ranks) if measurement.forced else None,
    }
    best = min(made, key=_seconds)
    if measurement.kind == "decode":
        best = min(made, key=lambda ranks: statistics.median(_slowest(ranks).step_ms))
        steps = _slowest(best).step_ms
        deciles = statistics.quantiles(steps, n=10) if len(steps) > 1 else steps
        # Ranks that share a replica's requests count them alike.
        requests = sum(rank.requests for rank in best)
        begun, ended = (sum(counts) for counts in zip(*(rank.printed or (0, 0) for rank in best), strict=True))
        known |= {
            "step_ms": (statistics.median(steps), deciles[0], deciles[-1]),
            "tokens_per_step": (ended - begun) / len(steps) / requests,
            "cached_tokens": measurement.tokens + (begun + ended) / 2 / requests,
            "experts": _mean_experts([visited for ranks in made for visited in ranks[0].experts]),
        }
    first = [seconds for rank in best for seconds in rank.first]
    known["first_token_seconds"] = (statistics.fmean(first), max(first))
    return Row.model_validate(known)


def _seconds(of_ranks: Sequence[Pass]) -> float:
    return max(rank.seconds for rank in of_ranks)


def _slowest(of_ranks: Sequence[Pass]) -> Pass:
    return max(of_ranks, key=lambda rank: statistics.median(rank.step_ms))


def _mean_experts(visited: Sequence[Visited]) -> tuple[float, ...] | None:
    """Of each layer, over the steps that were looked at."""
    counts = [[len(experts) for experts in of_step] for of_step in visited]
    return tuple(statistics.fmean(of_layer) for of_layer in zip(*counts, strict=True)) if counts else None


def started(engine_versions: Mapping[str, str], **known: object) -> Start:
    """A `Start` with what this process knows of itself."""
    versions = {"dsv3-plugin": __version__, "torch": torch.__version__, "python": platform.python_version()}
    device, memory = "cpu", None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = f"{properties.name} {str(getattr(properties, 'uuid', ''))[:8]}".strip()
        free, total = torch.cuda.mem_get_info()
        memory = total - free
    return Start.model_validate(
        {"device": device, "memory_bytes": memory, "versions": versions | dict(engine_versions), **known}
    )


def main(make_engine: Callable[[Job, Circle, int, Ranks], Engine]) -> None:
    """See `run_rank`; `make_engine` takes the job, the tokens, how long a request gets, and the ranks."""
    run_rank(partial(_answer, make_engine))


def _answer(
    make_engine: Callable[[Job, Circle, int, Ranks], Engine], job_dir: Path, result_dir: Path, place: RankOf | None
) -> None:
    job = read_job(Job, job_dir)
    layout = ParallelLayout.parse(job.layout)
    if job.device == "cuda" and (cards := torch.cuda.device_count()) < layout.ranks:
        raise EngineError(f"--device cuda: a card for each of {layout.ranks} ranks, and torch finds {cards} here")
    if layout != ONE_RANK and place is None:
        folders = [str(job_dir), str(result_dir)]
        sys.exit(wait_for_ranks(start_ranks(this_program(), layout, [folders] * layout.ranks)))
    ranks = Ranks(place or ALONE)
    tell = tell_progress if ranks.is_first else lambda what: None
    tell("starting")
    engine = make_engine(job, *_needs(job, ranks.replicas), ranks)
    engine.start = start_of_all(ranks.told(engine.start))
    if ranks.is_first:
        say(result_dir, engine.start)
    for number, measurement in enumerate(job.measurements):
        tell(str(measurement))
        row = measure(engine, measurement, job, logits_file(result_dir, number))
        if ranks.is_first:
            say(result_dir, row)
    tell("measured")
    ranks.all(True)
    _leave()


def _needs(job: Job, replicas: int) -> tuple[Circle, int]:
    """The tokens, and the longest request with what it may print."""
    config = DeepseekV3Config.from_pretrained(job.checkpoint)
    # SGLang's replicas share the tokens of a pass.
    chunk = MAX_BATCHED_TOKENS // replicas
    lengths = [m.tokens + longest(m, job.steps, chunk, replicas) for m in job.measurements]
    return Circle(config.vocab_size, job.seed), min(max(lengths) + 64, config.max_position_embeddings)


def _leave() -> None:
    """Without waiting for the threads that engines keep."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
