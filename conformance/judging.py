"""Judging one case: every row and log-probability, and whether the case tested what it says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

from dsv3_plugin.conformance.closeness import Closeness, distance, drift, malformed
from dsv3_plugin.conformance.compare import RowFile, compare_case, missing_rows, rows_alone, tokens_differ
from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout
from dsv3_plugin.conformance.logprobs import LogprobComparison, judge
from dsv3_plugin.conformance.protocol import Case, CaseResult, Device, RequestResult, Result
from dsv3_plugin.conformance.verdicts import SPECIFICATION, CaseVerdict, Fault

OWN_ROWS_TOLERANCE = 1e-4
"""Between log-probabilities that a testee of closeness answers and those of its own rows: its softmax is its own."""


def judge_case(
    case: Case,
    results: Mapping[str, Result],
    rows: Mapping[str, RowFile],
    specification: Mapping[str, RowFile],
    spread: Mapping[str, RowFile],
    device: Device,
    skipped: Collection[str] = (),
) -> CaseVerdict:
    """Compare all testees on one case.

    Args:
        case: what they were asked.
        results: their answers.
        rows: what they computed.
        specification: for each, the rows of its sequences computed in one pass each.
        spread: for those that claim closeness, the same in another precision.
        device: where they ran.
        skipped: those that were not asked, by the user's word.
    """
    faults: list[Fault] = []
    outcomes = {name: result.outcome_of(case) for name, result in results.items()}
    ran = [name for name, outcome in outcomes.items() if any(r.unsupported is None for r in outcome.requests)]
    equal = [name for name in ran if results[name].claim == "equality"]
    close = [name for name in ran if name not in equal]
    logprobs: list[LogprobComparison] = []
    for name, outcome in outcomes.items():
        if results[name].layout == str(ONE_RANK) and name not in skipped:
            faults += [Fault((name,), text) for text in undue(case, outcome.requests)]
        if name not in ran:
            continue
        missing = missing_rows(case, outcome.requests, rows[name])
        if missing is not None:
            faults.append(Fault((name,), missing))
        else:
            # Another arithmetic's log-probabilities are those of its own rows.
            of, tolerance = (specification, 0.0) if name in equal else (rows, OWN_ROWS_TOLERANCE)
            logits = dict(zip(of[name].keys("logits"), of[name].values("logits"), strict=True))
            logprobs.append(judge(name, case, outcome.requests, logits, device, tolerance))
            faults += [Fault((name,), text) for text in logprobs[-1].problems]
        faults += [Fault((name,), text) for text in _schedule_problems(case, results[name], outcome, rows[name])]
    for left, right in () if case.samples else combinations(equal, 2):
        for index, (a, b) in enumerate(zip(outcomes[left].requests, outcomes[right].requests, strict=True)):
            position = tokens_differ(a, b)
            if position is not None:
                text = f"chose different tokens in request {index} at position {position}"
                faults.append(Fault((left, right), text))
    comparisons = [compare_case(case.name, (SPECIFICATION, specification[n]), (n, rows[n])) for n in equal]
    comparisons += [compare_case(case.name, (a, rows[a]), (b, rows[b])) for a, b in combinations(equal, 2)]
    closeness = []
    for name in close:
        if (problem := malformed(specification[name], rows[name])) is not None:
            faults.append(Fault((name,), problem))
        else:
            closeness.append(_closeness(case, name, specification[name], rows[name], spread[name]))
    alone = {name: rows_alone(name, {**rows, SPECIFICATION: specification[name]}) for name in outcomes}
    unsupported = {
        name: {i: result.unsupported for i, result in enumerate(outcome.requests) if result.unsupported is not None}
        for name, outcome in outcomes.items()
    }
    return CaseVerdict(case, tuple(comparisons), tuple(closeness), tuple(logprobs), tuple(faults), alone, unsupported)


def _schedule_problems(case: Case, result: Result, outcome: CaseResult, rows: RowFile) -> list[str]:
    """Why a case did not test what it says of caches and drafts."""
    if result.schedule_not_followed:
        return []
    problems = []
    last_round = outcome.requests[-len(case.single_rounds[-1]) :]
    # A data-parallel rank finds what its own requests left.
    least = max if ParallelLayout.parse(result.layout).dp > 1 else min
    cached = least((r.num_cached_tokens for r in last_round if r.unsupported is None), default=0)
    if cached < case.min_cached_tokens:
        problems.append(f"{cached} tokens came from the prefix cache, {case.min_cached_tokens} should have")
    if outcome.num_accepted_tokens < case.min_accepted_tokens:
        problems.append(
            f"{outcome.num_accepted_tokens} of {outcome.num_draft_tokens} draft tokens were accepted,"
            f" at least {case.min_accepted_tokens} should have been"
        )
    drafts = sum(len(rows.keys(stream)) for stream in rows.streams if stream.startswith("mtp."))
    if drafts < outcome.num_draft_tokens:
        problems.append(f"{drafts} rows of the draft for {outcome.num_draft_tokens} draft tokens that were verified")
    return problems


def _closeness(case: Case, name: str, specification: RowFile, rows: RowFile, spread: RowFile) -> Closeness:
    return Closeness(
        name,
        distance(case.name, specification, rows),
        distance(case.name, specification, spread),
        compare_case(case.name, (SPECIFICATION, specification), (name, rows)).first_difference,
        drift(specification, rows),
        drift(specification, spread),
    )


def undue(case: Case, results: Sequence[RequestResult]) -> list[str]:
    """Requests that no testee may decline: those that ask nothing of a sampler."""
    return [
        f"request {index} is declared unsupported ({result.unsupported}), and asks for the most likely tokens only"
        for index, (request, result) in enumerate(zip(case.requests, results, strict=True))
        if result.unsupported is not None and not request.settings
    ]
