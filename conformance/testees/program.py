"""What every testee program has in common: read the job, run its cases, write the result."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout, RankOf
from dsv3_plugin.conformance.protocol import (
    OWN_MODEL,
    OWN_MODEL_OPTION,
    Case,
    CaseResult,
    Job,
    RequestResult,
    Result,
    Served,
    call_file,
    read_job,
    specification_file,
    tell_progress,
    tensor_file,
    write_message,
)
from dsv3_plugin.conformance.rows import RowRecorder
from dsv3_plugin.conformance.sampling import Answer
from dsv3_plugin.conformance.testees import ranks
from dsv3_plugin.errors import ConformanceError, DSV3Error
from dsv3_plugin.registry import Ops
from dsv3_plugin.version import __version__


@dataclass
class Outcome:
    """What a testee knows after a case."""

    recorder: RowRecorder = field(default_factory=RowRecorder)
    """All rows."""
    specification: RowRecorder | None = None
    """The same sequences, each computed in one pass; only the reference has it."""
    requests: list[RequestResult] = field(default_factory=list)
    """Each request's tokens, in order."""
    num_draft_tokens: int = 0
    """Draft tokens that were verified."""
    num_accepted_tokens: int = 0
    """Draft tokens that were accepted."""

    @classmethod
    def declined(cls, case: Case, reason: str) -> Outcome:
        """Of a case that the engine cannot run in its layout; the report names the reason."""
        nothing = RequestResult(token_ids=(), num_cached_tokens=0, unsupported=reason)
        return cls(requests=[nothing] * len(case.requests))


class Testee(Protocol):
    """An engine under test. One that claims closeness has `claim = "closeness"`, see `Result.claim`; one that has a
    DeepSeek-V3 of its own has `own_model_devices`, where that runs.
    """

    name: str

    @property
    def schedule_not_followed(self) -> str | None:
        """See `Result.schedule_not_followed`."""

    def versions(self) -> dict[str, str]:
        """Versions beside ours, torch's and Python's."""

    def served(self) -> Served:
        """Which class and kernels ran; asked for after the cases."""

    def run(self, case: Case) -> Outcome:
        """Run one case from an empty cache."""


MakeTestee = Callable[[Job], Testee]


def main(
    make_testee: MakeTestee,
    make_rank: Callable[[Job, RankOf], Testee] | None = None,
    require: Callable[[ParallelLayout], None] = lambda layout: None,
) -> None:
    """Run as `python -m ... [--layout LAYOUT] JOB_DIR RESULT_DIR`. Errors meant for the user end with status 2.

    Args:
        make_testee: the testee on one rank.
        make_rank: one rank of it, in a process of its own; None: it runs on one rank only.
        require: raises `ConformanceError` for a layout that it does not run in, before any rank starts.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", default="one")
    parser.add_argument(OWN_MODEL_OPTION, action="store_true", help="the engine's own model, which claims closeness")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", default="", help=argparse.SUPPRESS)
    parser.add_argument("job_dir", type=Path)
    parser.add_argument("result_dir", type=Path)
    options = parser.parse_args()
    make = partial(_with_own_model, make_testee) if options.own_model else make_testee
    try:
        layout, job = ParallelLayout.parse(options.layout), read_job(options.job_dir)
        if layout == ONE_RANK:
            run_job(make, job, options.result_dir)
        elif options.own_model:
            raise ConformanceError(f"--layout {layout}: an engine's own model runs on one rank only")
        elif job.operations:
            raise ConformanceError(f"--layout {layout}: operations are recorded on one rank only")
        elif make_rank is None:
            raise ConformanceError(f"--layout {layout}: this testee runs on one rank only")
        elif options.rank is None:
            require(layout)
            ranks.run_ranks(ranks.this_program(), layout, job, options.job_dir, options.result_dir)
        else:
            rank = RankOf.parse(options.layout, options.rank, options.ports)
            run_job(lambda job: make_rank(job, rank), job, options.result_dir)
    except DSV3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _with_own_model(make_testee: MakeTestee, job: Job) -> Testee:
    testee = make_testee(job)
    if job.device not in (devices := getattr(testee, "own_model_devices", ())):
        where = f"runs on {', '.join(devices)}, not on {job.device}" if devices else "is none"
        raise ConformanceError(f"{OWN_MODEL_OPTION}: {testee.name}'s own model {where}")
    testee.name += OWN_MODEL
    testee.claim = "closeness"  # type: ignore[attr-defined]
    return testee


def run_job(make_testee: MakeTestee, job: Job, result_dir: Path) -> None:
    """Run every case of `job` and write the result folder."""
    result_dir.mkdir(parents=True, exist_ok=True)
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ConformanceError("the job asks for a GPU, and torch finds none here")
    with _progress("starting"):
        testee = make_testee(job)
    cases = []
    for case in job.cases:
        started = time.monotonic()
        with _progress(case.name), torch.inference_mode():
            outcome = testee.run(case)
        seconds = time.monotonic() - started
        outcome.recorder.save(tensor_file(result_dir, case.name))
        if outcome.recorder.call is not None and job.capture is not None and job.capture.case == case.name:
            outcome.recorder.call.save(call_file(result_dir))
        if outcome.specification is not None:
            outcome.specification.save(specification_file(result_dir, case.name))
        cases.append(
            CaseResult(
                name=case.name,
                requests=tuple(outcome.requests),
                num_draft_tokens=outcome.num_draft_tokens,
                num_accepted_tokens=outcome.num_accepted_tokens,
                seconds=seconds,
            )
        )
    versions = {"dsv3-plugin": __version__, "torch": torch.__version__, "python": platform.python_version()}
    result = Result(
        testee=testee.name,
        versions=versions | testee.versions(),
        served=testee.served(),
        cases=tuple(cases),
        claim=getattr(testee, "claim", "equality"),
        schedule_not_followed=testee.schedule_not_followed,
    )
    write_message(result, result_dir)


def request_result(
    token_ids: Sequence[int],
    generated: Sequence[Answer],
    prompt: Sequence[Answer] = (),
    *,
    num_cached_tokens: int = 0,
) -> RequestResult:
    """What became of a request, from what was said of its generated tokens and, where it asks, of its prompt's."""
    return RequestResult(
        token_ids=tuple(token_ids),
        num_cached_tokens=num_cached_tokens,
        logprobs=tuple(answer.logprob for answer in generated),
        top_logprobs=tuple(answer.top for answer in generated),
        prompt_logprobs=tuple(answer.logprob for answer in prompt),
        prompt_top_logprobs=tuple(answer.top for answer in prompt),
    )


def kernels_of(ops: Ops) -> dict[str, str]:
    """Operation to provider, version and implementations, as bound."""
    return {choice.op: str(choice) for choice in ops.provenance}


@contextmanager
def _progress(what: str) -> Iterator[None]:
    tell_progress(what)
    yield
