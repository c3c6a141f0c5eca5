"""All that this repository says of a card, as one list of jobs: `python tests/gpu/campaign.py OUT [--only NAME ...]`.

`campaign.toml` says what each job runs, what it needs, and for how many seconds at most. Jobs begin in the order of the
file as soon as there is room. Those whose times are compared have their cards alone, and every job has processors of
its own, so that none disturbs another's clock. `OUT/NAME.log` has what a job printed, `OUT/jobs.json` what became of
it. The same command goes on after an interruption: what has succeeded is left out.

Commands run in the repository's root, with `OUT` in their environment. They need the environments that their engines
are installed in, on a machine with Hopper cards, and `dsv3` on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_plugin.conformance import keeper

ROOT = Path(__file__).parents[2]
JOBS = Path(__file__).with_suffix(".toml")

Outcome = Literal["succeeded", "failed", "too long", "left out"]


class Job(BaseModel):
    """A command, and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    run: str
    """For bash."""
    seconds: float
    cards: int = 1
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the memory of each of its cards; 1: nobody else runs there."""
    processors: int = Field(default=4, ge=1)
    after: tuple[str, ...] = ()
    """Jobs that it needs the results of. It is left out where one of them did not succeed."""


class Place(NamedTuple):
    """Where a job runs."""

    cards: list[int]
    processors: list[int]


@dataclass
class Machine:
    """What is free of it."""

    cards: list[float]
    """Of each card's memory, a part of 1."""
    processors: list[int]

    def take(self, job: Job) -> Place | None:
        """Room for a job: on the emptiest cards, if there is any now."""
        emptiest = sorted(range(len(self.cards)), key=lambda card: -self.cards[card])[: job.cards]
        room = len(emptiest) == job.cards and all(self.cards[card] > job.share - 1e-6 for card in emptiest)
        if not room or len(self.processors) < job.processors:
            return None
        for card in emptiest:
            self.cards[card] -= job.share
        return Place(emptiest, [self.processors.pop() for _ in range(job.processors)])

    def give_back(self, job: Job, place: Place) -> None:
        """The job has ended."""
        for card in place.cards:
            self.cards[card] += job.share
        self.processors += place.processors


@dataclass
class Running:
    """A job that runs, by a keeper that ends all of it with this program."""

    job: Job
    place: Place
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def end(self) -> None:
        """Kill whatever is left of it."""
        keeper.end(self.process)


def read_jobs(file: Path, only: Sequence[str], cards: int, processors: int) -> list[Job]:
    """The jobs of these names, all without any, with those that they come after. Exits with what is wrong."""
    try:
        found = [Job.model_validate(each) for each in tomllib.loads(file.read_text())["job"]]
    except (OSError, KeyError, tomllib.TOMLDecodeError, ValidationError) as error:
        sys.exit(f"error: {file}: {error}")
    jobs = {job.name: job for job in found}
    wanted: set[str] = set()
    asked = list(only or jobs)
    while asked:
        name = asked.pop()
        if name not in jobs:
            sys.exit(f"error: {file} has no job {name}; it has {', '.join(jobs)}")
        if name not in wanted:
            wanted.add(name)
            asked += jobs[name].after
    for name in wanted:
        if jobs[name].cards > cards or jobs[name].processors > processors:
            sys.exit(
                f"error: {name} needs {jobs[name].cards} cards and {jobs[name].processors} processors, and here are"
                f" {cards} and {processors}: name others with --only"
            )
    return [job for job in found if job.name in wanted]


def start(job: Job, place: Place, out: Path) -> Running:
    """Begin a job on its cards and processors."""
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, place.cards)), "OUT": str(out)}
    command = ["taskset", "--cpu-list", ",".join(map(str, place.processors)), "bash", "-c", job.run]
    with (out / f"{job.name}.log").open("w") as log:
        process = keeper.start("run", *command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | visible)
    return Running(job, place, process)


def run(jobs: Sequence[Job], machine: Machine, out: Path) -> dict[str, Outcome]:
    """Run all of them; returns what became of each, of earlier runs too."""
    record = out / "jobs.json"
    known: dict[str, Outcome] = json.loads(record.read_text()) if record.exists() else {}
    done: dict[str, Outcome] = {name: outcome for name, outcome in known.items() if outcome == "succeeded"}
    running: list[Running] = []

    def ended(job: Job, outcome: Outcome, seconds: float) -> None:
        done[job.name] = outcome
        print(f"{job.name}: {outcome}, {seconds:.0f} s", flush=True)
        record.write_text(json.dumps(done, indent=1) + "\n")

    try:
        while waiting := [job for job in jobs if job.name not in done]:
            for each in list(running):
                status = each.process.poll()
                if status is None and each.seconds < each.job.seconds:
                    continue
                each.end()
                running.remove(each)
                machine.give_back(each.job, each.place)
                ended(each.job, "too long" if status is None else "failed" if status else "succeeded", each.seconds)
            begun = {each.job.name for each in running} | done.keys()
            for job in waiting:
                if job.name in begun or any(before not in done for before in job.after):
                    continue
                if any(done[before] != "succeeded" for before in job.after):
                    ended(job, "left out", 0)
                elif (place := machine.take(job)) is not None:
                    print(f"{job.name}: begins", flush=True)
                    running.append(start(job, place, out))
            time.sleep(0.2)
    finally:
        for each in running:
            each.end()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for logs and reports")
    parser.add_argument("--only", nargs="+", default=[], help="these jobs, and those that they need")
    parser.add_argument("--jobs", type=Path, default=JOBS, help="another list")
    options = parser.parse_args()
    cards, processors = torch.cuda.device_count(), sorted(os.sched_getaffinity(0))
    jobs = read_jobs(options.jobs, options.only, cards, len(processors))
    options.out.mkdir(parents=True, exist_ok=True)
    done = run(jobs, Machine([1.0] * cards, processors), options.out.resolve())
    return 0 if all(done[job.name] == "succeeded" for job in jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
