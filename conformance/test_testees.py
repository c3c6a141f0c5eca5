"""Each case of each testee; see `conftest`."""

from __future__ import annotations

import pytest

from dsv3_plugin.conformance.verdicts import Report


def test_case(report: Report, testee: str, case: str) -> None:
    """Every row and log-probability is what it must be."""
    verdict = next(verdict for verdict in report.verdicts if verdict.case.name == case)
    failures = verdict.failures_of(testee)
    entry = report.expectations.of(testee, case)
    if failures and entry is not None:
        pytest.xfail(entry.reason)
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    if entry is not None and entry.outcome == "fails":
        pytest.fail(f"passes, and is expected to fail ({entry.reason}): remove the entry", pytrace=False)
    if verdict.declined_by(testee):
        pytest.skip(next(iter(verdict.unsupported[testee].values())))
    assert verdict.compares, "nothing was compared"


def test_run(report: Report) -> None:
    """What is no single case's: what served, how close a testee of closeness is, over all."""
    assert not report.problems
