"""Whether a result folder follows the protocol: for whoever writes a testee, before anything is compared.

What a run needs, `require_answers` requires, and the first thing wrong ends the run. `problems` looks further, and
tells everything that it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dsv3_plugin.conformance.compare import RowFile, missing_rows
from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.conformance.protocol import Case, CaseResult, Job, RequestResult, Result, read_result, tensor_file
from dsv3_plugin.conformance.taps import operation_of
from dsv3_plugin.errors import ConformanceError


def require_answers(job: Job, result_dir: Path, layout: ParallelLayout | None = None) -> Result:
    """The result, which answers every case and request of a job, in the layout that was asked for.

    Raises `ConformanceError` where it does not.
    """
    result = read_result(result_dir)
    if layout is not None and result.layout != str(layout):
        raise ConformanceError(f"{result_dir}: layout {layout} was asked for, {result.layout} came")
    asked, answered = [case.name for case in job.cases], [case.name for case in result.cases]
    if asked != answered:
        raise ConformanceError(f"{result_dir}: cases {', '.join(asked)} were asked for, {', '.join(answered)} came")
    for case, outcome in zip(job.cases, result.cases, strict=True):
        if len(outcome.requests) != len(case.requests):
            raise ConformanceError(
                f"{result_dir}: case {case.name} has {len(case.requests)} requests (one of n sequences counts n times),"
                f" {len(outcome.requests)} were answered"
            )
        for index, request in enumerate(outcome.requests):
            if wrong := [token for token in request.token_ids if not 0 <= token < 1 << 31]:
                raise ConformanceError(f"{result_dir}: case {case.name}, request {index}: {wrong[0]} is no token id")
        if not tensor_file(result_dir, case.name).is_file():
            raise ConformanceError(f"{tensor_file(result_dir, case.name)}: missing; each case has a file of its rows")
    return result


def problems(job: Job, result_dir: Path) -> list[str]:
    """Everything in which a result folder does not follow the protocol."""
    try:
        result = require_answers(job, result_dir)
        ParallelLayout.parse(result.layout)
    except ConformanceError as error:
        return [str(error)]
    found: list[str] = []
    for case, outcome in zip(job.cases, result.cases, strict=True):
        try:
            rows = RowFile(tensor_file(result_dir, case.name))
            missing = missing_rows(case, outcome.requests, rows) if _is_answered(outcome) else None
            told = [*([missing] if missing else []), *_of_requests(case, outcome), *_of_rows(case, rows)]
        except ConformanceError as error:
            told = [str(error)]
        found += [f"{case.name}: {text}" for text in told]
    return found


def _is_answered(outcome: CaseResult) -> bool:
    return any(request.unsupported is None for request in outcome.requests)


def _of_requests(case: Case, outcome: CaseResult) -> Iterator[str]:
    """How many log-probabilities there must be, and which numbers they are."""
    for index, (request, answer) in enumerate(zip(case.requests, outcome.requests, strict=True)):
        if answer.unsupported is not None:
            continue
        generated = request.max_tokens if request.logprobs else 0
        prompt = len(request.prompt_token_ids) - 1 if request.prompt_logprobs else 0
        for name, count in ("logprobs", generated), ("prompt_logprobs", prompt):
            if len(getattr(answer, name)) != count:
                yield f"request {index} has {len(getattr(answer, name))} {name}, {count} were asked for"
        yield from _of_top(index, answer, request.top_logprobs)
    if outcome.num_accepted_tokens > outcome.num_draft_tokens:
        yield f"{outcome.num_accepted_tokens} drafts were accepted, {outcome.num_draft_tokens} were verified"


def _of_top(index: int, answer: RequestResult, least: int) -> Iterator[str]:
    for name in "logprobs", "prompt_logprobs":
        values = getattr(answer, name)
        top = answer.top_logprobs if name == "logprobs" else answer.prompt_top_logprobs
        if least and len(top) != len(values):
            yield f"request {index} has the likeliest tokens beside {len(top)} of {len(values)} {name}"
        if any(value != value or value > 0 for value in values):
            yield f"request {index} has {name} that are none: NaN, or above 0"


def _of_rows(case: Case, rows: RowFile) -> Iterator[str]:
    """Rows that no request can have."""
    for stream in rows.streams:
        values = rows.values(stream)
        kinds = [torch.float32, torch.bfloat16]
        if operation_of(stream) is not None:
            kinds += [torch.int64, torch.int32, torch.uint8]
        if values.dtype not in kinds or values.dim() != 2:
            yield f"{stream} is {values.dtype} of shape {tuple(values.shape)}, expected fp32 or bf16 [rows, width]"
        requests = {request for request, _ in rows.keys(stream)}
        if wrong := sorted(request for request in requests if not 0 <= request < len(case.requests)):
            yield f"{stream} has rows of request {wrong[0]}, the case has {len(case.requests)}"
        if len(values) and int(rows.positions(stream).min()) < 0:
            yield f"{stream} has rows at negative positions"
