"""What a run found: of each case how the testees compare, and of the whole run whether it passed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from dsv3_plugin.conformance.claims import Claims
from dsv3_plugin.conformance.closeness import Closeness, merge, merge_drifts
from dsv3_plugin.conformance.compare import Comparison
from dsv3_plugin.conformance.expectations import Expectation, Expectations
from dsv3_plugin.conformance.logprobs import LogprobComparison
from dsv3_plugin.conformance.protocol import Case, Device, Result
from dsv3_plugin.conformance.traps import Feature, Trap, guarded
from dsv3_plugin.profile import ATTENTION_VARIABLE, SLICES_VARIABLE

SPECIFICATION = "specification"
# Many megabytes, of which the report has the counts.
_TOP_LOGPROBS = {"cases": {"__all__": {"requests": {"__all__": {"top_logprobs", "prompt_top_logprobs"}}}}}


class Fault(NamedTuple):
    """Something wrong beside the bits, and whose it is."""

    testees: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        """For the report."""
        return f"{' and '.join(self.testees)}{':' if len(self.testees) == 1 else ''} {self.text}"


class Failure(NamedTuple):
    """What a testee failed in a case."""

    testee: str
    case: str
    found: tuple[str, ...]


@dataclass(frozen=True)
class CaseVerdict:
    """One case: how the testees compare, and what was wrong beside the bits."""

    case: Case
    comparisons: tuple[Comparison, ...]
    """Of all testees that claim equality, with the specification and with each other."""
    closeness: tuple[Closeness, ...]
    """Of those that claim closeness, with the specification."""
    logprobs: tuple[LogprobComparison, ...]
    faults: tuple[Fault, ...]
    rows_alone: dict[str, int]
    """Rows of each testee that no other side computed; nothing is claimed of them."""
    unsupported: dict[str, dict[int, str]]
    """Of each testee, the requests that it cannot do and why; nothing is claimed of them."""

    @property
    def problems(self) -> tuple[str, ...]:
        """All faults in words."""
        return tuple(map(str, self.faults))

    @property
    def passed(self) -> bool:
        """Whether everything that the case claims holds."""
        return (
            not self.faults
            and self.compares
            and all(comparison.equal for comparison in self.comparisons)
            and not any(comparison.different for comparison in self.logprobs)
        )

    @property
    def compares(self) -> bool:
        """Whether anything could be compared, if any testee can run the case."""
        return bool(self.comparisons or self.closeness or self.declined)

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

    def failures_of(self, testee: str) -> tuple[str, ...]:
        """What a testee failed. Two that differ from each other alone failed both."""
        texts = [fault.text for fault in self.faults if testee in fault.testees]
        for comparison in self.comparisons:
            sides = comparison.left, comparison.right
            if testee in sides and not comparison.equal and not any(map(self._differs, set(sides) - {testee})):
                other = sides[sides[0] == testee]
                texts.append(f"{other}: {comparison.describe()}")
        return (*texts, *(c.describe() for c in self.logprobs if c.testee == testee and c.different))

    def _differs(self, side: str) -> bool:
        """Whether a side differs from the specification."""
        own = self.between(SPECIFICATION, side)
        return own is not None and not own.equal


def _command() -> str:
    """This program's, with the variables that choose an arithmetic."""
    chosen = [f"{name}={os.environ[name]}" for name in (ATTENTION_VARIABLE, SLICES_VARIABLE) if name in os.environ]
    return shlex.join([*chosen, "dsv3", *sys.argv[1:]])


@dataclass
class Report:
    """A whole run."""

    checkpoint: str
    profile: str
    results: dict[str, Result]
    verdicts: list[CaseVerdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    expectations: Expectations = field(default_factory=Expectations)
    claims: tuple[Claims, ...] = ()
    """What is claimed of the testees, here and elsewhere."""
    features: frozenset[Feature] = frozenset()
    """Of the checkpoint."""
    device: Device = "cpu"
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When the report was begun."""
    command: str = field(default_factory=_command)
    """What to run for it again."""

    @property
    def passed(self) -> bool:
        """Whether every case of every testee passed, but for what is expected to fail, which did."""
        failing = {failure.case for failure in self._failures()}
        return (
            not self.problems
            and not self.unexpected
            and not self.overdue
            and all(verdict.passed or verdict.case.name in failing for verdict in self.verdicts)
            and all(verdict.compares for verdict in self.verdicts)
        )

    @property
    def unexpected(self) -> list[Failure]:
        """Failures that are not expected."""
        return [failure for failure in self._failures() if self._expectation(failure.testee, failure.case) is None]

    @property
    def expected(self) -> list[tuple[Failure, Expectation]]:
        """Those that are."""
        found = [(failure, self._expectation(failure.testee, failure.case)) for failure in self._failures()]
        return [(failure, entry) for failure, entry in found if entry is not None]

    @property
    def overdue(self) -> list[str]:
        """Failures that were expected and did not come."""
        failing = {(failure.testee, failure.case) for failure in self._failures()}
        return [
            f"{testee} passes {verdict.case.name}, which is expected to fail ({entry.reason}): remove the entry"
            for verdict in self.verdicts
            for testee in self.results
            if (testee, verdict.case.name) not in failing
            and (entry := self._expectation(testee, verdict.case.name)) is not None
        ]

    @property
    def untried(self) -> list[Expectation]:
        """Entries that speak of nothing that was run."""
        return self.expectations.untried(self.results, [verdict.case.name for verdict in self.verdicts])

    def _failures(self) -> Iterator[Failure]:
        for verdict in self.verdicts:
            for testee in self.results:
                if texts := verdict.failures_of(testee):
                    yield Failure(testee, verdict.case.name, texts)

    def _expectation(self, testee: str, case: str) -> Expectation | None:
        entry = self.expectations.of(testee, case)
        return entry if entry is not None and entry.outcome == "fails" else None

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
                merge_drifts(c.drift for c in cases),
                merge_drifts(c.spread_drift for c in cases),
            )
            for name, cases in of_testee.items()
        ]

    @property
    def guarded(self) -> list[tuple[Trap, tuple[str, ...]]]:
        """The known mistakes that would have shown in who claims equality, each with the cases."""
        return guarded([verdict.case.name for verdict in self.verdicts if verdict.comparisons], self.features)

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
            "device": self.device,
            "date": self.date,
            "command": self.command,
            "problems": [*self.problems, *self.overdue],
            "failures": [failure._asdict() for failure in self._failures()],
            "expected_failures": [
                {"testee": failure.testee, "case": failure.case, "reason": entry.reason, "found": failure.found}
                for failure, entry in self.expected
            ],
            "closeness": [asdict(c) | {"bounds": [asdict(bound) for bound in c.bounds]} for c in self.closeness],
            "known_mistakes": {trap.name: cases for trap, cases in self.guarded},
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
