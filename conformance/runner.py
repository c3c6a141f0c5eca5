"""Running testees and judging what they returned."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.cases import (
    BLOCK_SIZE,
    crowd_cases,
    fit,
    long_cases,
    make_cases,
    planted_cases,
    without_hits,
)
from dsv3_plugin.conformance.claims import Claims
from dsv3_plugin.conformance.compare import RowFile
from dsv3_plugin.conformance.expectations import Expectations
from dsv3_plugin.conformance.judging import judge_case
from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout
from dsv3_plugin.conformance.programs import Program, Progress, run_programs, work_folder
from dsv3_plugin.conformance.protocol import (
    OWN_MODEL,
    OWN_MODEL_OPTION,
    Case,
    CaseResult,
    Device,
    Job,
    Request,
    RequestResult,
    Result,
    read_job,
    specification_file,
    tensor_file,
    write_message,
)
from dsv3_plugin.conformance.rows import RowRecorder
from dsv3_plugin.conformance.texts import real_text, tokenize
from dsv3_plugin.conformance.traps import features_of
from dsv3_plugin.conformance.validate import require_answers
from dsv3_plugin.conformance.verdicts import SPECIFICATION, Report
from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.variables import KILL_SWITCH

ENGINES = {"reference": None, "core": None, "vllm": "vllm", "sglang": "sglang", "megatron": "megatron"}
"""Testees that ship with the suite, and the module that their environment must have. They name themselves so in their
results, and must serve dsv3-plugin's model.
"""
_WITH_OWN_MODELS = ("vllm", "sglang")
"""Engines that have a DeepSeek-V3 of their own, which `vllm-own` serves; it claims closeness."""
_WITH_KERNELS_OF = {"megatron-te": "megatron"}
"""Programs of their own that serve an engine with other kernels: `megatron-te` with TransformerEngine's."""
REFERENCE = "reference"
_REPLAY = "replay"
_SPREAD = "spread"
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
            if name in ("", "..") or Path(name).name != name:
                raise ConformanceError(
                    f"--testee {text}: {name!r} cannot be a testee's name; it is one of a folder, too"
                )
            try:
                words = tuple(shlex.split(command))
            except ValueError as error:
                raise ConformanceError(f"--testee {text}: the command is no line of a shell: {error}") from None
            if not words:
                raise ConformanceError(f"--testee {text}: no command after '='")
            return cls(name, words)
        shipped = [*ENGINES, *_WITH_KERNELS_OF, *(engine + OWN_MODEL for engine in _WITH_OWN_MODELS)]
        if name not in shipped:
            raise ConformanceError(
                f"--testee {name}: unknown; the suite has {', '.join(shipped)}, or give NAME=COMMAND for your own"
            )
        engine = name.removesuffix(OWN_MODEL)
        program = cls._of_engine(_WITH_KERNELS_OF.get(engine, engine), engine, environments)
        if name == engine:
            return cls(name, program)
        return cls(name, ("env", f"{KILL_SWITCH}=off", *program, OWN_MODEL_OPTION))

    @staticmethod
    def _of_engine(engine: str, name: str, environments: Path) -> tuple[str, ...]:
        program = f"{_PACKAGE}.{name.replace('-', '_')}"
        try:
            return python_of(engine, environments), "-m", program
        except ConformanceError as error:
            raise ConformanceError(f"--testee {name}: {error}, or give {name}='PYTHON -m {program}'") from None


def python_of(engine: str, environments: Path) -> str:
    """The Python of an engine: `environments/ENGINE/bin/python` if there is one, else this one.

    Raises `ConformanceError` where the engine is not installed for it.
    """
    environment = environments / engine / "bin" / "python"
    python = str(environment) if environment.exists() else sys.executable
    module = ENGINES[engine]
    if module is not None and subprocess.run([python, "-c", _IS_INSTALLED, module, _PACKAGE]).returncode:
        raise ConformanceError(
            f"{engine} and dsv3-plugin are not both installed for {python}; set up {environments}/{engine} with both"
        )
    return python


_IS_INSTALLED = (
    "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))"
)


def run(
    testees: Sequence[TesteeCommand],
    checkpoint: Path,
    progress: Progress,
    *,
    device: Device = "cpu",
    keep: Path | None = None,
    only: Sequence[str] = (),
    expectations: Expectations | None = None,
    claims: Sequence[Claims] = (),
    timeout: float | None = None,
) -> Report:
    """Run all testees side by side on one checkpoint and compare them, each pair and each against the specification.

    `keep` is a new folder for job, results and logs; without it they are deleted, unless a testee fails, whose error
    names its log. `only` selects cases by name. A testee may take `timeout` seconds.

    Raises `ConformanceError` or `CheckpointError` where a run cannot be carried out.
    """
    reader = CheckpointReader(checkpoint)
    every_case = cases_of(reader, device)
    for testee in testees:
        testee.layout.require_possible(reader.config, reader.profile())
        _require_requests(testee.layout, every_case)
    cases = select(every_case, only)
    expectations = expectations or Expectations()
    expectations.require_cases(case.name for case in every_case)
    names = [testee.name for testee in testees]
    if len(set(names)) != len(names) or SPECIFICATION in names:
        raise ConformanceError(f"testees need different names, and none may be {SPECIFICATION!r}: {', '.join(names)}")
    with work_folder(keep) as work_dir:
        job = Job(checkpoint=str(checkpoint.resolve()), device=device, block_size=BLOCK_SIZE, cases=cases)
        write_message(job, work_dir)
        asked = [_Asked.of(testee, job, expectations, work_dir) for testee in testees]
        run_programs({each.testee.name: each.program for each in asked}, progress, timeout)
        results = {each.testee.name: each.result() for each in asked}
        _replay(job, results, work_dir, progress)
        report = Report(
            str(checkpoint),
            str(reader.profile()),
            results,
            expectations=expectations,
            claims=tuple(claims),
            features=features_of(reader),
            device=device,
        )
        for case in cases:
            progress("suite", f"comparing {case.name}")
            skipped = [each.testee.name for each in asked if case.name in each.skipped]
            files = _rows(results, work_dir, case), _specification(case, results, work_dir)
            spread = _spread(results, work_dir, case)
            report.verdicts.append(judge_case(case, results, *files, spread, job.device, skipped))
        report.problems += served_otherwise(results, report.profile)
        report.problems += [text for closeness in report.closeness for text in closeness.beyond()]
    return report


def cases_of(reader: CheckpointReader, device: Device = "cpu") -> tuple[Case, ...]:
    """All cases of a checkpoint on a kind of device, those of as many drafts together: engines fix that at their start.

    Raises `CheckpointError` where the checkpoint is broken, `ConformanceError` where it is too small for them.
    """
    reader.validate()
    config, text = reader.config, tokenize(real_text(), reader.path)
    with_mtp, longest = config.num_nextn_predict_layers == 1, config.max_position_embeddings
    cases = make_cases(text, with_mtp=with_mtp) + crowd_cases(text) + long_cases(text, device, config)
    if "traps" in features_of(reader):
        cases += planted_cases(text, config.vocab_size, with_mtp=with_mtp)
    if reader.profile().attention == "two_form":
        cases = without_hits(cases)
    return fit(sorted(cases, key=lambda case: case.num_speculative_tokens), longest)


def _require_requests(layout: ParallelLayout, cases: Sequence[Case]) -> None:
    """Raise `ConformanceError` where data-parallel ranks would never have a request."""
    most = max(len(requests) for case in cases for requests in case.rounds)
    if layout.dp > most:
        raise ConformanceError(
            f"--layout {layout}: no case has more than {most} requests at a time, and each of the ranks of dp has"
            f" requests of its own, so dp={most} at most"
        )


@dataclass(frozen=True)
class _Asked:
    """A testee and what it is asked: all of a job but the cases that are skipped for it."""

    testee: TesteeCommand
    job: Job
    program: Program
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, testee: TesteeCommand, job: Job, expectations: Expectations, work_dir: Path) -> _Asked:
        skipped = expectations.skipped(testee.name, [case.name for case in job.cases])
        result_dir, job_dir = work_dir / testee.name, work_dir
        if skipped:
            if testee.name == REFERENCE:
                raise ConformanceError(
                    f"--expect: the {REFERENCE}'s cases cannot be skipped: others are judged by them"
                )
            job_dir = work_dir / f"{testee.name}.job"
            job_dir.mkdir()
            cases = tuple(case for case in job.cases if case.name not in skipped)
            write_message(job.model_copy(update={"cases": cases}), job_dir)
        # The reference has a sequence at a time, and takes longest: all would wait for it.
        niceness = 0 if testee.name == REFERENCE else 5
        return cls(testee, job, Program(testee.command, job_dir, result_dir, niceness), skipped)

    def result(self) -> Result:
        """The answer, with what was skipped as unsupported. Raises `ConformanceError` where it is not whole."""
        job_dir, result_dir = self.program.job_dir, self.program.result_dir
        result = require_answers(read_job(job_dir), result_dir, self.testee.layout)
        if not self.skipped:
            return result
        answered = {case.name: case for case in result.cases}
        whole = [answered.get(case.name) or self._declined(case, result_dir) for case in self.job.cases]
        return result.model_copy(update={"cases": tuple(whole)})

    def _declined(self, case: Case, result_dir: Path) -> CaseResult:
        RowRecorder().save(tensor_file(result_dir, case.name))
        nothing = RequestResult(token_ids=(), num_cached_tokens=0, unsupported=f"skipped: {self.skipped[case.name]}")
        return CaseResult(
            name=case.name,
            requests=(nothing,) * len(case.requests),
            num_draft_tokens=0,
            num_accepted_tokens=0,
            seconds=0.0,
        )


def select(cases: tuple[Case, ...], only: Sequence[str]) -> tuple[Case, ...]:
    """The cases named in `only`, or all. Raises `ConformanceError` for an unknown name."""
    unknown = set(only) - {case.name for case in cases}
    if unknown:
        known = ", ".join(case.name for case in cases)
        raise ConformanceError(f"--case {', '.join(sorted(unknown))}: unknown; this checkpoint has {known}")
    return tuple(case for case in cases if not only or case.name in only)


def _replay(job: Job, results: dict[str, Result], work_dir: Path, progress: Progress) -> None:
    """Let the reference compute the sequences that testees answered, where its own run does not hold them; they are
    their specification. Those of a testee that claims closeness it computes in another precision too, on a CPU: no
    card's kernels serve fp32.
    """
    module = (sys.executable, "-m", f"{_PACKAGE}.reference", "--replays")
    programs = {}
    for name, result in results.items():
        cases = [_finished(case, result) for case in job.cases if _is_replayed(case, name, results)]
        if not cases:
            continue
        folder = work_dir / _REPLAY / name
        folder.mkdir(parents=True)
        replays = job.model_copy(update={"cases": tuple(cases)})
        write_message(replays, folder)
        programs[f"{SPECIFICATION} of {name}"] = Program(module, folder, folder / SPECIFICATION)
        if result.claim == "closeness":
            precision = "bf16" if CheckpointReader(job.checkpoint).profile().dtype == torch.float32 else "fp32"
            on_cpu = folder / f"{_SPREAD}.job"
            on_cpu.mkdir()
            write_message(replays.model_copy(update={"device": "cpu"}), on_cpu)
            programs[f"{precision} of {name}"] = Program((*module, "--precision", precision), on_cpu, folder / _SPREAD)
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
    """The sequences that a testee answered; of one that it cannot do, the prompt that it was given."""

    def finished(prompt: tuple[int, ...], answered: tuple[int, ...]) -> Request:
        return Request(prompt_token_ids=prompt, max_tokens=0, generated_token_ids=answered[len(prompt) :])

    answers = zip(case.requests, result.outcome_of(case).requests, strict=True)
    rounds = tuple((finished(request.prompt_token_ids, answer.token_ids),) for request, answer in answers)
    return Case(name=case.name, title=case.title, rounds=rounds)


def _specification(case: Case, results: dict[str, Result], work_dir: Path) -> dict[str, RowFile]:
    """For each testee the rows of its sequences computed in one pass each."""

    def file_of(name: str) -> Path:
        if _is_replayed(case, name, results):
            return specification_file(work_dir / _REPLAY / name / SPECIFICATION, case.name)
        own = name if results[name].testee == REFERENCE else _reference(results)
        assert own is not None, "else it is replayed"
        return specification_file(work_dir / own, case.name)

    return {name: RowFile(file_of(name)) for name in results}


def _rows(results: dict[str, Result], work_dir: Path, case: Case) -> dict[str, RowFile]:
    """What each testee computed."""
    return {name: RowFile(tensor_file(work_dir / name, case.name)) for name in results}


def _spread(results: dict[str, Result], work_dir: Path, case: Case) -> dict[str, RowFile]:
    """For each testee that claims closeness, the specification of its sequences in another precision."""
    close = [name for name, result in results.items() if result.claim == "closeness"]
    return {name: RowFile(specification_file(work_dir / _REPLAY / name / _SPREAD, case.name)) for name in close}


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
