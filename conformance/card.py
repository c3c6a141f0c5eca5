"""Verification cards: what an engine's version was shown to do on a kind of device, beside what is claimed of it.

A card is made of reports (`--json`) of any number of runs, and of a claim file. Every claim has its line: verified,
with the rows, the date and the command; or failed; or not tested, which refuses the card. Reports of another day
complete it: of two lines of a claim the better evidence stays. What nobody claims has no line; `unclaimed` tells it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_plugin.conformance.claims import Claims
from dsv3_plugin.conformance.protocol import Claim, Device, first_mistake
from dsv3_plugin.conformance.verdicts import SPECIFICATION
from dsv3_plugin.errors import ConformanceError

FORMAT = 1


@dataclass(frozen=True)
class Line:
    """What became of a claim."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    profile: str
    layout: str
    promise: str
    status: Literal["verified", "failed", "not tested"]
    rows: int = 0
    """Equal to the specification's, over all cases; close ones where the promise is closeness."""
    log_probabilities: int = 0
    cases: tuple[str, ...] = ()
    unsupported: int = 0
    """Requests that the testee declined."""
    found: str = ""
    """The first thing that failed."""
    date: str = ""
    command: str = ""

    @property
    def claim(self) -> tuple[str, str, str]:
        """Which claim it is of."""
        return self.profile, self.layout, self.promise

    @property
    def weight(self) -> tuple[bool, int]:
        """As evidence: a failure before a pass, a pass with many rows before one with few."""
        return self.status == "failed", self.rows


@dataclass(frozen=True)
class Card:
    """Of one version of one engine on one kind of device."""

    testee: str
    package: str
    version: str
    device: str
    others: dict[str, str]
    """Versions of what served beside it."""
    lines: tuple[Line, ...]
    not_claimed: tuple[tuple[str, str], ...]

    @property
    def complete(self) -> bool:
        """Whether every claim was verified. Where nothing is claimed nothing is."""
        return bool(self.lines) and all(line.status == "verified" for line in self.lines)

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.testee}-{self.version}-{self.device}.yaml"

    def completing(self, file: Path) -> Card:
        """This card, with an earlier one's lines where they are better evidence, or the only one.

        Raises `ConformanceError` where the file holds no card, or one of other versions.
        """
        yaml = _yaml()
        try:
            earlier = _Earlier.model_validate(yaml.safe_load(file.read_text("utf-8")))
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise ConformanceError(f"{file}: is no card: {_first(error)}") from None
        if earlier.versions != self.others:
            raise ConformanceError(
                f"{file}: was made with {earlier.versions}, the reports with {self.others}: begin another"
            )
        known = {line.claim: line for line in earlier.claims}
        own = (max(line, known.get(line.claim, line), key=lambda evidence: evidence.weight) for line in self.lines)
        return replace(self, lines=tuple(own))

    def to_yaml(self) -> str:
        """The card's text. Raises `ConformanceError` where PyYAML is not installed."""
        yaml = _yaml()
        lines = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(x).items() if v} for x in self.lines]
        card = {
            "card": FORMAT,
            "testee": self.testee,
            self.package: self.version,
            "device": self.device,
            "versions": self.others,
            "complete": self.complete,
            "claims": lines,
            "not_claimed": [{"what": what, "reason": reason} for what, reason in self.not_claimed],
        }
        return str(yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=120))


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError:  # nothing else here needs it
        raise ConformanceError("cards need PyYAML: pip install 'dsv3-plugin[conformance]'") from None
    module: ModuleType = yaml
    return module


class _Earlier(BaseModel):
    """What is read of a card that is there."""

    card: Literal[1]
    versions: dict[str, str]
    claims: tuple[Line, ...]


class _Part(BaseModel):
    """What a card reads of a report; the rest is passed over."""

    model_config = ConfigDict(strict=True)


class _Testee(_Part):
    testee: str
    versions: dict[str, str]
    layout: str
    claim: Claim


class _Failure(_Part):
    testee: str
    case: str
    found: list[str] = Field(min_length=1)


class _Comparison(_Part):
    left: str
    right: str
    equal_rows: int = Field(ge=0)


class _Rows(_Part):
    rows: int = Field(ge=0)


class _Closeness(_Part):
    testee: str
    distance: _Rows


class _Logprobs(_Part):
    testee: str
    equal: int = Field(ge=0)


class _Case(_Part):
    name: str
    unsupported: dict[str, dict[str, Any]]
    comparisons: list[_Comparison]
    closeness: list[_Closeness]
    logprobs: list[_Logprobs]


class _Report(_Part):
    profile: str
    device: Device
    date: str
    command: str
    problems: list[str]
    failures: list[_Failure]
    testees: dict[str, _Testee]
    cases: list[_Case]


def read_report(file: Path) -> dict[str, Any]:
    """A report that `--json` wrote. Raises `ConformanceError` for anything else."""
    try:
        report: dict[str, Any] = json.loads(file.read_text("utf-8"))
        _Report.model_validate(report)
    except OSError as error:
        raise ConformanceError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConformanceError(f"{file}: not a report of dsv3 conformance run --json: {_first(error)}") from None
    return report


def _first(error: Exception) -> str:
    """What is wrong with a file, in one line: of many mistakes the first."""
    return first_mistake(error) if isinstance(error, ValidationError) else " ".join(str(error).split())


def cards(claims: Claims, reports: Sequence[dict[str, Any]]) -> list[Card]:
    """A card for each version and kind of device that some report is of.

    Raises `ConformanceError` where none is of the claims' testee.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for report in reports:
        for result in _of_testee(claims, report).values():
            version = result["versions"].get(claims.package)
            if version is None:
                raise ConformanceError(f"a report of {claims.testee} names no version of {claims.package}")
            if Path(version).name != version:
                raise ConformanceError(f"a report of {claims.testee} names {version!r} as {claims.package}'s version")
            others = {name: text for name, text in result["versions"].items() if name != claims.package}
            found.setdefault((version, report["device"]), others)
    if not found:
        raise ConformanceError(f"no report is of {claims.testee}")
    return [
        Card(
            claims.testee,
            claims.package,
            version,
            device,
            others,
            tuple(
                _line(claims, reports, version, device, setting.profile, setting.layout, promise)
                for setting, promise in claims.of(version, device)
            ),
            tuple((entry.what, entry.reason) for entry in claims.not_claimed),
        )
        for (version, device), others in sorted(found.items())
    ]


def unclaimed(claims: Claims, report: dict[str, Any]) -> Iterator[str]:
    """What a report shows of the claims' testee and no claim is of, in words."""
    for result in _of_testee(claims, report).values():
        version, device = result["versions"][claims.package], report["device"]
        profile, layout, promise = shown = _profile(report), result["layout"], result["claim"]
        if shown not in ((of.profile, of.layout, claimed) for of, claimed in claims.of(version, device)):
            what = f"{claims.testee} {version} on {device} in {profile}, layout {layout}, with {promise}"
            yield f"no claim is of {what}: it is on no card until a claim file names it"


def _profile(report: dict[str, Any]) -> str:
    """A report's, as claims name it: in how many slices it was computed, the layout says."""
    profile: str = report["profile"]
    return profile.partition(" in ")[0]


def _of_testee(claims: Claims, report: dict[str, Any]) -> dict[str, Any]:
    """The results of the claims' testee, by the names that they have in a report."""
    return {name: result for name, result in report["testees"].items() if result["testee"] == claims.testee}


def _line(
    claims: Claims,
    reports: Sequence[dict[str, Any]],
    version: str,
    device: str,
    profile: str,
    layout: str,
    promise: str,
) -> Line:
    """The best evidence of a claim."""
    lines = [
        _evidence(report, name, profile, layout, promise)
        for report in reports
        if report["device"] == device and _profile(report) == profile
        for name, result in _of_testee(claims, report).items()
        if (result["versions"].get(claims.package), result["layout"], result["claim"]) == (version, layout, promise)
    ]
    nothing = Line(profile, layout, promise, "not tested")
    return max(lines, key=lambda line: line.weight, default=nothing)


def _evidence(report: dict[str, Any], name: str, profile: str, layout: str, promise: str) -> Line:
    failures = [failure for failure in report["failures"] if failure["testee"] == name]
    # Of one that claims closeness the bound is one of the whole run's problems.
    problems = [text for text in report["problems"] if text.startswith(f"{name} ")]
    rows = logprobs = unsupported = 0
    cases = []
    for case in report["cases"]:
        ours = [c for c in case["comparisons"] if (c["left"], c["right"]) == (SPECIFICATION, name)]
        close = [c["distance"] for c in case["closeness"] if c["testee"] == name]
        count = sum(c["equal_rows"] for c in ours) + sum(distance["rows"] for distance in close)
        rows += count
        logprobs += sum(c["equal"] for c in case["logprobs"] if c["testee"] == name)
        unsupported += len(case["unsupported"].get(name, {}))
        cases += [case["name"]] if count else []
    found = [f"{failure['case']}: {failure['found'][0]}" for failure in failures] + problems
    status: Literal["verified", "failed", "not tested"] = "failed" if found else "verified" if rows else "not tested"
    date, command = report["date"], report["command"]
    first = found[0] if found else ""
    return Line(profile, layout, promise, status, rows, logprobs, tuple(cases), unsupported, first, date, command)
