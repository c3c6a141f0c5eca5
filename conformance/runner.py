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

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.cases import BLOCK_SIZE, fit, make_cases
from dsv3_plugin.conformance.compare import (
    Comparison,
    RowFile,
    compare_case,
    missing_rows,
    rows_alone,
    sampling_problems,
    tokens_differ,
)
from dsv3_plugin.conformance.programs import Progress, run_programs, work_folder
from dsv3_plugin.conformance.protocol import (
    Case,
    Device,
    Job,
    Request,
    Result,
    read_result,
    specification_file,
    tensor_file,
    write_message,
)
from dsv3_plugin.conformance.texts import real_text, tokenize
from dsv3_plugin.errors import ConformanceError

ENGINES = {"reference": None, "vllm": "vllm", "sglang": "sglang", "megatron": "megatron"}
"""Testees that ship with the suite, and the module that their environment must have."""
SPECIFICATION = "specification"
_REPLAY = "replay"
_PACKAGE = "dsv3_plugin.conformance.testees"


@dataclass(frozen=True)
class TesteeCommand:
    """A testee and how to start it; the job and result folders are appended."""

    name: str
    command: tuple[str, ...]

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
    problems: tuple[str, ...]
    rows_alone: dict[str, int]
    """Rows of each testee that no other side computed; nothing is claimed of them."""

    @property
    def passed(self) -> bool:
        """Whether everything that the case claims holds."""
        return not self.problems and all(comparison.equal for comparison in self.comparisons)

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
    def pairs(self) -> list[tuple[str, str]]:
        """All sides that some case compares."""
        return list(dict.fromkeys((c.left, c.right) for verdict in self.verdicts for c in verdict.comparisons))

    def to_json(self) -> dict[str, Any]:
        """For `--json`: the verdicts with every comparison, and each testee's own result."""
        return {
            "passed": self.passed,
            "checkpoint": self.checkpoint,
            "profile": self.profile,
            "problems": self.problems,
            "testees": {name: result.model_dump() for name, result in self.results.items()},
            "cases": [
                {
                    "name": verdict.case.name,
                    "title": verdict.case.title,
                    "passed": verdict.passed,
                    "problems": verdict.problems,
                    "rows_alone": verdict.rows_alone,
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
    cases = make_cases(tokenize(real_text(), checkpoint), with_mtp=config.num_nextn_predict_layers == 1)
    cases = fit(select(cases, only), config.max_position_embeddings)
    names = [testee.name for testee in testees]
    if len(set(names)) != len(names) or SPECIFICATION in names:
        raise ConformanceError(f"testees need different names, and none may be {SPECIFICATION!r}: {', '.join(names)}")
    with work_folder(keep) as work_dir:
        job = Job(checkpoint=str(checkpoint.resolve()), device=device, block_size=BLOCK_SIZE, cases=cases)
        write_message(job, work_dir)
        run_programs({testee.name: testee.command for testee in testees}, work_dir, progress)
        results = {name: _read_complete_result(job, work_dir / name) for name in names}
        _replay(job, results, work_dir, progress)
        report = Report(str(checkpoint), str(reader.profile()), results)
        for case in cases:
            progress("suite", f"comparing {case.name}")
            report.verdicts.append(_judge(case, results, work_dir, job.device))
        report.problems += _served_otherwise(results, report.profile)
    return report


def select(cases: tuple[Case, ...], only: Sequence[str]) -> tuple[Case, ...]:
    """The cases named in `only`, or all. Raises `ConformanceError` for an unknown name."""
    unknown = set(only) - {case.name for case in cases}
    if unknown:
        known = ", ".join(case.name for case in cases)
        raise ConformanceError(f"--case {', '.join(sorted(unknown))}: unknown; this checkpoint has {known}")
    return tuple(case for case in cases if not only or case.name in only)


def _read_complete_result(job: Job, result_dir: Path) -> Result:
    result = read_result(result_dir)
    asked, answered = [case.name for case in job.cases], [case.name for case in result.cases]
    if asked != answered:
        raise ConformanceError(f"{result_dir}: cases {', '.join(asked)} were asked for, {', '.join(answered)} came")
    return result


def _replay(job: Job, results: dict[str, Result], work_dir: Path, progress: Progress) -> None:
    """Let the reference compute the sequences that each testee drew; they are its specification.

    Greedy testees choose the same tokens as the reference, whose own run holds the specification.
    """
    replay_dir = work_dir / _REPLAY
    cases = [
        Case(
            name=_replay_name(case.name, name),
            title=f"{case.title}: the tokens of {name}",
            rounds=tuple((Request(prompt_token_ids=r.token_ids[:-1], max_tokens=1),) for r in outcome.requests),
        )
        for name, result in results.items()
        for case, outcome in zip(job.cases, result.cases, strict=True)
        if case.samples and not specification_file(work_dir / name, case.name).exists()
    ]
    if cases:
        replay_dir.mkdir()
        write_message(job.model_copy(update={"cases": tuple(cases)}), replay_dir)
        reference = TesteeCommand(SPECIFICATION, (sys.executable, "-m", f"{_PACKAGE}.reference"))
        run_programs({reference.name: reference.command}, replay_dir, progress)


def _replay_name(case_name: str, testee: str) -> str:
    return f"{case_name}.{testee}"


def _specification(case: Case, names: Sequence[str], work_dir: Path) -> dict[str, RowFile]:
    """For each testee the rows of its sequences computed in one pass each, where there are any."""
    files = {name: specification_file(work_dir / name, case.name) for name in names}
    own = {name: RowFile(file) for name, file in files.items() if file.exists()}
    if not case.samples:
        return dict.fromkeys(names, next(iter(own.values()))) if own else {}
    replayed = work_dir / _REPLAY / SPECIFICATION
    return {
        name: own.get(name) or RowFile(specification_file(replayed, _replay_name(case.name, name))) for name in names
    }


def _judge(case: Case, results: dict[str, Result], work_dir: Path, device: Device) -> CaseVerdict:
    """Compare all pairs on one case."""
    problems: list[str] = []
    rows = {name: RowFile(tensor_file(work_dir / name, case.name)) for name in results}
    specification = _specification(case, list(results), work_dir)
    outcomes = {name: result.outcome_of(case) for name, result in results.items()}
    for name, outcome in outcomes.items():
        missing = missing_rows(case, outcome.requests, rows[name])
        if missing is not None:
            problems.append(f"{name}: {missing}")
        elif case.samples:
            found = sampling_problems(case, outcome.requests, specification[name], device)
            problems += [f"{name}: {text}" for text in found]
        if results[name].schedule_not_followed:
            continue
        cached = min(r.num_cached_tokens for r in outcome.requests[-len(case.rounds[-1]) :])
        if cached < case.min_cached_tokens:
            problems.append(f"{name}: {cached} tokens came from the prefix cache, {case.min_cached_tokens} should have")
        if outcome.num_accepted_tokens < case.min_accepted_tokens:
            problems.append(
                f"{name}: {outcome.num_accepted_tokens} of {outcome.num_draft_tokens} draft tokens were accepted,"
                f" at least {case.min_accepted_tokens} should have been"
            )
    for left, right in () if case.samples else combinations(outcomes, 2):
        for index, (a, b) in enumerate(zip(outcomes[left].requests, outcomes[right].requests, strict=True)):
            position = tokens_differ(a, b)
            if position is not None:
                problems.append(f"{left} and {right} chose different tokens in request {index} at position {position}")
    comparisons = [compare_case(case.name, (SPECIFICATION, specification[n]), (n, rows[n])) for n in specification]
    comparisons += [compare_case(case.name, (a, rows[a]), (b, rows[b])) for a, b in combinations(rows, 2)]
    alone = {
        name: rows_alone(name, rows | ({SPECIFICATION: specification[name]} if specification else {}))
        for name in outcomes
    }
    return CaseVerdict(case, tuple(comparisons), tuple(problems), alone)


def _served_otherwise(results: dict[str, Result], profile: str) -> list[str]:
    """A testee that served another model or another arithmetic than asked must not pass by accident."""
    problems = []
    for name, result in results.items():
        if not result.served.model_class.startswith("dsv3_plugin."):
            problems.append(f"{name} served {result.served.model_class}, which is not dsv3-plugin's model")
        elif result.served.profile != profile:
            problems.append(f"{name} ran the {result.served.profile} profile, the checkpoint's is {profile}")
    return problems
