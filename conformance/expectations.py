"""What is known to fail or not to be tried, each with a reason: a TOML file beside whoever runs the suite in their CI.

    [[expected]]
    testee = "hf*"               # as --testee names it; * stands for anything
    case = "prefix_cache"
    outcome = "fails"            # or "skipped"
    reason = "no prefix cache in this version; see our issue 12"

A failure that is expected does not fail the run, and one that does not come any more does: the entry is to go. What is
skipped is not asked of the testee, and counts as unsupported. An entry that names no case of the suite is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dsv3_plugin.conformance.toml_file import read_toml
from dsv3_plugin.errors import ConformanceError


class Expectation(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    testee: str
    case: str
    outcome: Literal["fails", "skipped"]
    reason: str = Field(min_length=1)

    def is_of(self, testee: str, case: str) -> bool:
        """Whether the entry speaks of a testee's case."""
        return fnmatchcase(testee, self.testee) and fnmatchcase(case, self.case)

    def __str__(self) -> str:
        """For messages."""
        return f"{self.testee}, {self.case} {self.outcome} ({self.reason})"


class Expectations(BaseModel):
    """A whole file; of two entries that speak of the same the first holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expected: tuple[Expectation, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Expectations:
        """Raises `ConformanceError` where the file is none."""
        return read_toml(cls, file, "--expect")

    def of(self, testee: str, case: str) -> Expectation | None:
        """The entry that speaks of a testee's case."""
        return next((entry for entry in self.expected if entry.is_of(testee, case)), None)

    def skipped(self, testee: str, cases: Iterable[str]) -> dict[str, str]:
        """Of `cases` those that are not asked of a testee, each with the reason."""
        found = {case: self.of(testee, case) for case in cases}
        return {case: entry.reason for case, entry in found.items() if entry is not None and entry.outcome == "skipped"}

    def require_cases(self, cases: Iterable[str]) -> None:
        """Raise `ConformanceError` for an entry that speaks of none of all the suite's cases."""
        names = list(cases)
        for entry in self.expected:
            if not any(fnmatchcase(name, entry.case) for name in names):
                raise ConformanceError(
                    f"--expect: {entry}: this checkpoint has no such case; it has {', '.join(names)}"
                )

    def untried(self, testees: Iterable[str], cases: Iterable[str]) -> list[Expectation]:
        """Entries that speak of nothing that was run."""
        run = [(testee, case) for testee in testees for case in cases]
        return [entry for entry in self.expected if not any(entry.is_of(*each) for each in run)]
