"""What a check finds of one implementation: how many of its cases were equal, or where it broke."""

from __future__ import annotations

from typing import NamedTuple

from dsv3_plugin.kernels.certify.targets import Target

MODEL_ON_CPU = "model on the CPU"
ALL = "all"


class Result(NamedTuple):
    """What checking one kernel showed."""

    op: str
    provider: str
    implementation: str = ""
    cases: int = 0
    outputs: int = 0
    wrong_cases: int = 0
    wrong_outputs: int = 0
    first_wrong: str = ""
    seconds: float = 0.0
    """Of its calls and the comparison, in all processes together."""
    exact: bool = True
    """Whether the kernel is meant to print the contract's bits."""
    refused_cases: int = 0
    """Cases whose shapes the kernel does not take."""
    largest_difference: float = 0.0
    """Of an output from the expected one, by the largest expected one of its case."""
    dtypes: frozenset[str] = frozenset()
    """Profiles' dtypes of its cases."""
    page_sizes: frozenset[int] = frozenset()
    """Keys of a page in its cases."""
    full_card: bool = False
    """Whether the cases are requests of `check_full_card`."""

    @property
    def failed(self) -> bool:
        """Whether bits differ that may not."""
        return self.exact and self.wrong_cases > 0

    @property
    def is_of_model(self) -> bool:
        """Whether the model on the CPU was compared with the model on the card."""
        return self.implementation == MODEL_ON_CPU

    def and_then(self, other: Result) -> Result:
        """Of both results' cases."""
        return self._replace(
            cases=self.cases + other.cases,
            outputs=self.outputs + other.outputs,
            wrong_cases=self.wrong_cases + other.wrong_cases,
            wrong_outputs=self.wrong_outputs + other.wrong_outputs,
            first_wrong=self.first_wrong or other.first_wrong,
            seconds=self.seconds + other.seconds,
            refused_cases=self.refused_cases + other.refused_cases,
            largest_difference=max(self.largest_difference, other.largest_difference),
            dtypes=self.dtypes | other.dtypes,
            page_sizes=self.page_sizes | other.page_sizes,
        )

    def __str__(self) -> str:
        """One line for a terminal."""
        if not self.wrong_cases:
            verdict = "equal" if self.cases else "-"
        elif self.exact:
            verdict = f"{self.wrong_cases} cases differ; {self.first_wrong}"
        else:
            verdict = (
                f"no certificate: {self.wrong_cases} cases and {self.wrong_outputs / self.outputs:.4%} of the outputs"
                f" differ, by {self.largest_difference:.1e} of a case's largest at the most; {self.first_wrong}"
            )
        refused = f", {self.refused_cases} refused" if self.refused_cases else ""
        who = _who(self.op, self.provider, self.implementation) + ", full" * self.full_card
        count = f"{self.cases:5} cases{refused} {self.outputs:14,} outputs"
        return f"{self.op:20} {who:22} {count} {self.seconds:6.1f} s  {verdict}"


class Broken(NamedTuple):
    """A kernel that was not checked to the end, or all of an operation's."""

    op: str
    provider: str
    implementation: str
    why: str

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.op:20} {_who(self.op, self.provider, self.implementation):22} broke: {self.why}"


Finding = Result | Broken


def broke(target: Target, error: Exception) -> Broken:
    """An implementation in which something raised."""
    return Broken(target.kernel.op, target.kernel.provider, target.part.name, f"{type(error).__name__}: {error}")


def together(findings: list[Finding]) -> list[Finding]:
    """One result a kernel, and what broke, once."""
    results: dict[tuple[str, str, bool], Result] = {}
    broken: list[Finding] = []
    for finding in findings:
        if isinstance(finding, Broken):
            broken.append(finding)
            continue
        key = finding.provider, finding.implementation, finding.full_card
        results[key] = results[key].and_then(finding) if key in results else finding
    return [*results.values(), *dict.fromkeys(broken)]


def _who(op: str, provider_name: str, implementation: str) -> str:
    if implementation in (MODEL_ON_CPU, ALL):
        return implementation
    return provider_name if implementation in (op, "") else f"{provider_name} {implementation}"
