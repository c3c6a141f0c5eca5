"""Running testees and judging what they returned."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.cases import BLOCK_SIZE, fit, make_cases
from dsv3_plugin.conformance.closeness import Closeness, distance, malformed, merge
from dsv3_plugin.conformance.compare import (
    Comparison,
    RowFile,
    compare_case,
    missing_rows,
    rows_alone,
    tokens_differ,
)
from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout
from dsv3_plugin.conformance.logprobs import LogprobComparison, judge
from dsv3_plugin.conformance.programs import Program, Progress, run_programs, work_folder
from dsv3_plugin.conformance.protocol import (
    Case,
    CaseResult,
    Device,
    Job,
    Request,
    RequestResult,
    Result,
    read_result,
    specification_file,
    tensor_file,
    write_message,
)
from dsv3_plugin.conformance.texts import real_text, tokenize
from dsv3_plugin.errors import ConformanceError

ENGINES = {"reference": None, "core": None, "vllm": "vllm", "sglang": "sglang", "megatron": "megatron"}
"""Testees that ship with the suite, and the module that their environment must have. They name themselves so in their
results, and must serve dsv3-plugin's model.
"""
REFERENCE = "reference"
SPECIFICATION = "specification"
_REPLAY = "replay"
_SPREAD = "spread"
# Many megabytes, of which the report has the counts.
_TOP_LOGPROBS = {"cases": {"__all__": {"requests": {"__all__": {"top_logprobs", "prompt_top_logprobs"}}}}}
OWN_ROWS_TOLERANCE = 1e-4
"""Between log-probabilities that a testee of closeness answers and those of its own rows: its softmax is its own."""
_PACKAGE = "dsv3_plugin.conformance.testees"


@dataclass(frozen=True)
class TesteeCommand:
    """A testee and how to start it; the job and result folders are appended."""

    name: str
    command: tuple[str, ...]
    layout: ParallelLayout = ONE_RANK

    def on(self, layout: ParallelLayout) -> TesteeCommand:
        """The same on several ranks."""
        if layout == ONE_RANK:
            return self
        return TesteeCommand(f"{self.name} {layout}", (*self.command, "--layout", str(layout)), layout)

    @classmethod
    def parse(cls, text: str, environments: Path) -> TesteeCommand:
        """`NAME`, a testee that ships with the suite, or `NAME=COMMAND`, any program that follows the protocol.

        A shipped testee runs with `environments/NAME/bin/python` if there is one, else with this Python.
        Raises `ConformanceError` where the engine is not installed.
        """
        name, separator, command = text.partition("=")
        if separator:
            words = tuple(shlex.split(command))
            if not words:
                raise ConformanceError(f"--testee {text}: no command after '='")
            return cls(name, words)
        if name not in ENGINES:
            raise ConformanceError(
                f"--testee {name}: unknown; the suite has {', '.join(ENGINES)}, or give NAME=COMMAND for your own"
            )
        environment = environments / name / "bin" / "python"
        python = str(environment) if environment.exists() else sys.executable
        module = ENGINES[name]
        if module is not None and subprocess.run([python, "-c", _IS_INSTALLED, module, _PACKAGE]).returncode:
            raise ConformanceError(
                f"--testee {name}: {name} and dsv3-plugin are not both installed for {python};"
                f" set up {environments}/{name} with both, or give {name}='PYTHON -m {_PACKAGE}.{name}'"
            )
        return cls(name, (python, "-m", f"{_PACKAGE}.{name}"))


_IS_INSTALLED = (
    "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))"
)


@dataclass(frozen=True)
class CaseVerdict:
    """One case: how the testees compare, and what was wrong beside the bits."""

    case: Case
    comparisons: tuple[Comparison, ...]
    """Of all testees that claim equality, with the specification and with each other."""
    closeness: tuple[Closeness, ...]
    """Of those that claim closeness, with the specification."""
    logprobs: tuple[LogprobComparison, ...]
    problems: tuple[str, ...]
    rows_alone: dict[str, int]
    """Rows of each testee that no other side computed; nothing is claimed of them."""
    unsupported: dict[str, dict[int, str]]
    """Of each testee, the requests that it cannot do and why; nothing is claimed of them."""

    @property
    def passed(self) -> bool:
        """Whether everything that the case claims holds."""
        return (
            not self.problems
            and bool(self.comparisons or self.closeness or self.declined)
            and all(comparison.equal for comparison in self.comparisons)
            and not any(comparison.different for comparison in self.logprobs)
        )

    @property
    def declined(self) -> bool:
        """Whether no testee can run the case."""
        return all(map(self.declined_by, self.unsupported))

    def declined_by(self, testee: str) -> bool:
        """Whether a testee can run no request of the case."""
        return len(self.unsupported[testee]) == len(self.case.requests)

    def between(self, left: str, right: str) -> Comparison | None:
        """How two sides compare, if they were compared."""
        return next((c for c in self.comparisons if (c.left, c.right) == (left, right)), None)


@dataclass
class Report:
    """A whole run."""

    checkpoint: str
    profile: str
    results: dict[str, Result]
    verdicts: list[CaseVerdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every case of every testee passed."""
        return not self.problems and all(verdict.passed for verdict in self.verdicts)

    @property
    def closeness(self) -> list[Closeness]:
        """Of each testee that claims closeness, over all cases."""
        of_testee: dict[str, list[Closeness]] = {}
        for verdict in self.verdicts:
            for closeness in verdict.closeness:
                of_testee.setdefault(closeness.testee, []).append(closeness)
        return [
            Closeness(
                name,
                merge(c.distance for c in cases),
                merge(c.spread for c in cases),
                next((c.first_difference for c in cases if c.first_difference is not None), None),
            )
            for name, cases in of_testee.items()
        ]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All sides that some case compares."""
        return list(dict.fromkeys((c.left, c.right) for verdict in self.verdicts for c in verdict.comparisons))

    def to_json(self) -> dict[str, Any]:
        """For `--json`: the verdicts with every comparison; the results of testees, without the likeliest tokens."""
        return {
            "passed": self.passed,
            "checkpoint": self.checkpoint,
            "profile": self.profile,
            "problems": self.problems,
            "closeness": [asdict(closeness) for closeness in self.closeness],
            "testees": {name: result.model_dump(exclude=_TOP_LOGPROBS) for name, result in self.results.items()},
            "cases": [
                {
                    "name": verdict.case.name,
                    "title": verdict.case.title,
                    "passed": verdict.passed,
                    "problems": verdict.problems,
                    "rows_alone": verdict.rows_alone,
                    "unsupported": verdict.unsupported,
                    "closeness": [asdict(c) for c in verdict.closeness],
                    "logprobs": [asdict(c) for c in verdict.logprobs],
                    "comparisons": [asdict(c) | {"equal": c.equal} for c in verdict.comparisons],
                }
                for verdict in self.verdicts
            ],
        }


def run(
    testees: Sequence[TesteeCommand],
    checkpoint: Path,
    progress: Progress,
    *,
    device: Device = "cpu",
    keep: Path | None = None,
    only: Sequence[str] = (),
) -> Report:
    """Run all testees side by side on one checkpoint and compare them, each pair and each against the specification.

    `keep` is a new folder for job, results and logs; without it they are deleted, unless a testee fails, whose error
    names its log. `only` selects cases by name.

    Raises `ConformanceError` or `CheckpointError` where a run cannot be carried out.
    """
    reader = CheckpointReader(checkpoint)
    reader.validate()
    config = reader.config
    for testee in testees:
        testee.layout.require_slices(reader.profile())
    cases = make_cases(tokenize(real_text(), checkpoint), with_mtp=config.num_nextn_predict_layers == 1)
    cases = fit(select(cases, only), config.max_position_embeddings)
    names = [testee.name for testee in testees]
    if len(set(names)) != len(names) or SPECIFICATION in names:
        raise ConformanceError(f"testees need different names, and none may be {SPECIFICATION!r}: {', '.join(names)}")
    with work_folder(keep) as work_dir:
        job = Job(checkpoint=str(checkpoint.resolve()), device=device, block_size=BLOCK_SIZE, cases=cases)
        write_message(job, work_dir)
        run_programs({t.name: Program(t.command, work_dir, work_dir / t.name) for t in testees}, progress)
        results = {testee.name: _read_complete_result(job, testee, work_dir / testee.name) for testee in testees}
        _replay(job, results, work_dir, progress)
        report = Report(str(checkpoint), str(reader.profile()), results)
        for case in cases:
            progress("suite", f"comparing {case.name}")
            report.verdicts.append(_judge(case, results, work_dir, job.device))
        report.problems += served_otherwise(results, report.profile)
        report.problems += [text for closeness in report.closeness for text in closeness.beyond()]
    return report


def select(cases: tuple[Case, ...], only: Sequence[str]) -> tuple[Case, ...]:
    """The cases named in `only`, or all. Raises `ConformanceError` for an unknown name."""
    unknown = set(only) - {case.name for case in cases}
    if unknown:
        known = ", ".join(case.name for case in cases)
        raise ConformanceError(f"--case {', '.join(sorted(unknown))}: unknown; this checkpoint has {known}")
    return tuple(case for case in cases if not only or case.name in only)


def _read_complete_result(job: Job, testee: TesteeCommand, result_dir: Path) -> Result:
    result = read_result(result_dir)
    if result.layout != str(testee.layout):
        raise ConformanceError(f"{result_dir}: layout {testee.layout} was asked for, {result.layout} came")
    asked, answered = [case.name for case in job.cases], [case.name for case in result.cases]
    if asked != answered:
        raise ConformanceError(f"{result_dir}: cases {', '.join(asked)} were asked for, {', '.join(answered)} came")
    for case, outcome in zip(job.cases, result.cases, strict=True):
        if len(outcome.requests) != len(case.requests):
            raise ConformanceError(
                f"{result_dir}: case {case.name} has {len(case.requests)} requests (one of n sequences counts n times),"
                f" {len(outcome.requests)} were answered"
            )
        if not tensor_file(result_dir, case.name).is_file():
            raise ConformanceError(f"{tensor_file(result_dir, case.name)}: missing; each case has a file of its rows")
    return result


def _replay(job: Job, results: dict[str, Result], work_dir: Path, progress: Progress) -> None:
    """Let the reference compute the sequences that testees answered, where its own run does not hold them; they are
    their specification. Those of a testee that claims closeness it computes in another precision too.
    """
    module = (sys.executable, "-m", f"{_PACKAGE}.reference", "--replays")
    programs = {}
    for name, result in results.items():
        cases = [_finished(case, result) for case in job.cases if _is_replayed(case, name, results)]
        if not cases:
            continue
        folder = work_dir / _REPLAY / name
        folder.mkdir(parents=True)
        write_message(job.model_copy(update={"cases": tuple(cases)}), folder)
        programs[f"{SPECIFICATION} of {name}"] = Program(module, folder, folder / SPECIFICATION)
        if result.claim == "closeness":
            precision = "bf16" if CheckpointReader(job.checkpoint).profile().dtype == torch.float32 else "fp32"
            command = (*module, "--precision", precision)
            programs[f"{precision} of {name}"] = Program(command, folder, folder / _SPREAD)
    run_programs(programs, progress)


def _is_replayed(case: Case, name: str, results: dict[str, Result]) -> bool:
    """Whether a testee's sequences are not those of the reference's own run: drawn, close ones, or there is no run."""
    if results[name].claim == "closeness":
        return True
    return results[name].testee != REFERENCE and (case.samples or _reference(results) is None)


def _reference(results: dict[str, Result]) -> str | None:
    """The testee whose own passes over whole sequences are the specification; nobody else's would be."""
    return next((name for name, result in results.items() if result.testee == REFERENCE), None)


def _finished(case: Case, result: Result) -> Case:
    """The sequences that a testee answered, as prompts; of one that it cannot do, the prompt that it was given."""
    return Case(
        name=case.name,
        title=case.title,
        rounds=tuple(
            (Request(prompt_token_ids=answer.token_ids or request.prompt_token_ids, max_tokens=0),)
            for request, answer in zip(case.requests, result.outcome_of(case).requests, strict=True)
        ),
    )


def _specification(case: Case, results: dict[str, Result], work_dir: Path) -> dict[str, RowFile]:
    """For each testee the rows of its sequences computed in one pass each."""

    def file_of(name: str) -> Path:
        if _is_replayed(case, name, results):
            return specification_file(work_dir / _REPLAY / name / SPECIFICATION, case.name)
        own = name if results[name].testee == REFERENCE else _reference(results)
        assert own is not None, "else it is replayed"
        return specification_file(work_dir / own, case.name)

    return {name: RowFile(file_of(name)) for name in results}


def _judge(case: Case, results: dict[str, Result], work_dir: Path, device: Device) -> CaseVerdict:
    """Compare all testees on one case."""
    problems: list[str] = []
    rows = {name: RowFile(tensor_file(work_dir / name, case.name)) for name in results}
    specification = _specification(case, results, work_dir)
    outcomes = {name: result.outcome_of(case) for name, result in results.items()}
    ran = [name for name, outcome in outcomes.items() if any(r.unsupported is None for r in outcome.requests)]
    equal = [name for name in ran if results[name].claim == "equality"]
    close = [name for name in ran if name not in equal]
    logprobs: list[LogprobComparison] = []
    for name, outcome in outcomes.items():
        if results[name].layout == str(ONE_RANK):
            problems += [f"{name}: {text}" for text in undue(case, outcome.requests)]
        if name not in ran:
            continue
        missing = missing_rows(case, outcome.requests, rows[name])
        if missing is not None:
            problems.append(f"{name}: {missing}")
        else:
            # Another arithmetic's log-probabilities are those of its own rows.
            of, tolerance = (specification, 0.0) if name in equal else (rows, OWN_ROWS_TOLERANCE)
            logits = dict(zip(of[name].keys("logits"), of[name].values("logits"), strict=True))
            logprobs.append(judge(name, case, outcome.requests, logits, device, tolerance))
            problems += [f"{name}: {text}" for text in logprobs[-1].problems]
        problems += [f"{name}: {text}" for text in _schedule_problems(case, results[name], outcome)]
    for left, right in () if case.samples else combinations(equal, 2):
        for index, (a, b) in enumerate(zip(outcomes[left].requests, outcomes[right].requests, strict=True)):
            position = tokens_differ(a, b)
            if position is not None:
                problems.append(f"{left} and {right} chose different tokens in request {index} at position {position}")
    comparisons = [compare_case(case.name, (SPECIFICATION, specification[n]), (n, rows[n])) for n in equal]
    comparisons += [compare_case(case.name, (a, rows[a]), (b, rows[b])) for a, b in combinations(equal, 2)]
    closeness = []
    for name in close:
        if (problem := malformed(specification[name], rows[name])) is not None:
            problems.append(f"{name}: {problem}")
        else:
            closeness.append(_closeness(case, name, specification[name], rows[name], work_dir))
    alone = {name: rows_alone(name, rows | {SPECIFICATION: specification[name]}) for name in outcomes}
    unsupported = {
        name: {i: result.unsupported for i, result in enumerate(outcome.requests) if result.unsupported is not None}
        for name, outcome in outcomes.items()
    }
    return CaseVerdict(case, tuple(comparisons), tuple(closeness), tuple(logprobs), tuple(problems), alone, unsupported)


def _schedule_problems(case: Case, result: Result, outcome: CaseResult) -> list[str]:
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
    return problems


def _closeness(case: Case, name: str, specification: RowFile, rows: RowFile, work_dir: Path) -> Closeness:
    spread = RowFile(specification_file(work_dir / _REPLAY / name / _SPREAD, case.name))
    return Closeness(
        name,
        distance(case.name, specification, rows),
        distance(case.name, specification, spread),
        compare_case(case.name, (SPECIFICATION, specification), (name, rows)).first_difference,
    )


def undue(case: Case, results: Sequence[RequestResult]) -> list[str]:
    """Requests that no testee may decline: those that ask nothing of a sampler."""
    return [
        f"request {index} is declared unsupported ({result.unsupported}), and asks for the most likely tokens only"
        for index, (request, result) in enumerate(zip(case.requests, results, strict=True))
        if result.unsupported is not None and not request.settings
    ]


def served_otherwise(results: dict[str, Result], profile: str) -> list[str]:
    """A testee of the suite that served another model or another arithmetic than asked must not pass by accident.

    Any other testee is judged by what it claims, whatever serves in it.
    """
    problems = []
    for name, result in results.items():
        if result.testee not in ENGINES:
            continue
        if not result.served.model_class.startswith("dsv3_plugin."):
            problems.append(f"{name} served {result.served.model_class}, which is not dsv3-plugin's model")
        elif result.served.profile != profile:
            problems.append(f"{name} ran the {result.served.profile} profile, the checkpoint's is {profile}")
    return problems
