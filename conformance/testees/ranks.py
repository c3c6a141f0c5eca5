"""A testee on several ranks: it starts itself once a rank, and puts together what the ranks wrote.

Each rank is a process that writes a result folder as one rank would, with the requests that are its own. All rows of
all ranks are kept, so that ranks that compute the same rows are compared each. A rank that fails ends the others.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.conformance.protocol import (
    CaseResult,
    Job,
    RequestResult,
    Result,
    read_result,
    tensor_file,
    write_message,
)
from dsv3_plugin.errors import ConformanceError

GRACE = 20.0
"""Seconds in which the other ranks may end by themselves after one has failed: their last words may say more."""
_PORTS = 8
_QUIET_PORTS = range(10_000, 32_000)


def run_ranks(command: Sequence[str], layout: ParallelLayout, job: Job, job_dir: Path, result_dir: Path) -> None:
    """Run `command --layout L --rank R --ports P JOB_DIR RESULT_DIR/rank-R` for each rank, and merge their results.

    Raises `ConformanceError` where ranks disagree about what they served or answered, or one is killed. Exits with the
    status of a rank that fails.
    """
    folders = [result_dir / f"rank-{rank}" for rank in range(layout.ranks)]
    if status := wait_for_ranks(start_ranks(command, layout, [[str(job_dir), str(folder)] for folder in folders])):
        sys.exit(status)
    write_message(merge(job, folders, layout, result_dir), result_dir)


def this_program() -> list[str]:
    """How this program was started, without its arguments."""
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]]


def start_ranks(
    command: Sequence[str], layout: ParallelLayout, arguments: Sequence[Sequence[str]]
) -> list[subprocess.Popen[bytes]]:
    """Start `command --layout L --rank R --ports P ARGUMENTS` for each rank."""
    ports = ",".join(map(str, _free_ports()))
    return [
        subprocess.Popen([*command, "--layout", str(layout), "--rank", str(rank), "--ports", ports, *own])
        for rank, own in enumerate(arguments)
    ]


def _free_ports() -> list[int]:
    """All different, and free. Ranks may listen there minutes later: so none is among those that a system deals out to
    whoever asks for any.
    """
    with ExitStack() as held:
        ports: list[int] = []
        for port in random.SystemRandom().sample(_QUIET_PORTS, 1000):
            candidate = held.enter_context(socket.socket())
            with suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == _PORTS:
                return ports
    raise ConformanceError(f"no {_PORTS} free ports between {_QUIET_PORTS.start} and {_QUIET_PORTS.stop}")


def wait_for_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit status of the first that fails, 0 if none does. None runs on.

    Raises `ConformanceError` that names a rank which was killed: it has said nothing itself, and what the others say
    is of a connection.
    """
    failed, deadline = dict[int, int](), float("inf")
    try:
        # Each is asked: one that ends behind one that runs must be seen.
        while None in [process.poll() for process in processes] and time.monotonic() < deadline:
            if not failed and (failed := _failed(processes)):
                deadline = time.monotonic() + GRACE
            time.sleep(0.1)
        failed = failed or _failed(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, status in failed.items():
        if status < 0:
            raise ConformanceError(f"rank {rank} of {len(processes)} was killed by {signal.Signals(-status).name}")
    return next(iter(failed.values()), 0)


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """The ranks that have failed, and their exit statuses."""
    return {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}


def merge(job: Job, folders: Sequence[Path], layout: ParallelLayout, result_dir: Path) -> Result:
    """The result of all ranks; writes their rows to `result_dir`. Raises `ConformanceError` where ranks disagree."""
    results = [read_result(folder) for folder in folders]
    served = {(r.served.model_class, r.served.profile, tuple(r.served.kernels.items())) for r in results}
    if len(served) > 1:
        raise ConformanceError(f"ranks served different things: {'; '.join(sorted(map(str, served)))}")
    for case in job.cases:
        rows: dict[str, list[torch.Tensor]] = {}
        for folder in folders:
            for name, tensor in load_file(tensor_file(folder, case.name)).items():
                rows.setdefault(name, []).append(tensor)
        save_file({name: torch.cat(tensors) for name, tensors in rows.items()}, tensor_file(result_dir, case.name))
    cases = tuple(_case([result.outcome_of(case) for result in results], layout) for case in job.cases)
    drafting = next((r.served for r in results if r.served.draft_class is not None), results[0].served)
    return results[0].model_copy(update={"served": drafting, "cases": cases, "layout": str(layout)})


def _case(outcomes: Sequence[CaseResult], layout: ParallelLayout) -> CaseResult:
    """One case: each request from the ranks that had it; drafts are counted once a data-parallel replica."""
    size = layout.ranks // layout.dp
    replicas = [outcomes[i : i + size] for i in range(0, len(outcomes), size)]
    return CaseResult(
        name=outcomes[0].name,
        requests=tuple(_request(replicas, index, layout) for index in range(len(outcomes[0].requests))),
        num_draft_tokens=sum(max(outcome.num_draft_tokens for outcome in replica) for replica in replicas),
        num_accepted_tokens=sum(max(outcome.num_accepted_tokens for outcome in replica) for replica in replicas),
        seconds=max(outcome.seconds for outcome in outcomes),
    )


def _request(replicas: Sequence[Sequence[CaseResult]], index: int, layout: ParallelLayout) -> RequestResult:
    """What the last stage of a replica answered; the stages before it know the tokens, not always what is told of them.

    Raises `ConformanceError` where ranks disagree.
    """
    case = replicas[0][0].name
    for replica in replicas:
        answers = [outcome.requests[index] for outcome in replica]
        *others, answer = answers
        if not answer.token_ids and answer.unsupported is None:  # another replica's
            continue
        same = all(of_stage == answer for of_stage in answers[-layout.tp :])
        if not same or any(other.token_ids != answer.token_ids for other in others):
            raise ConformanceError(f"case {case}: ranks answered request {index} differently")
        return answer
    raise ConformanceError(f"case {case}: no rank has request {index}")
