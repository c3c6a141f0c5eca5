"""Known failures and skips: they do not fail a run, and nothing else hides behind them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from engines import REFERENCE, in_fork
from paths import SUPPORT
from rich.console import Console

from dsv3_plugin.conformance import report as reports
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.expectations import Expectations
from dsv3_plugin.errors import ConformanceError

BAD = runner.TesteeCommand("bad", (sys.executable, str(SUPPORT / "sabotaged_testee.py"), "ulp:norm"))


def expectations(*entries: tuple[str, str, str]) -> Expectations:
    return Expectations.model_validate(
        {"expected": [{"testee": t, "case": c, "outcome": o, "reason": f"why {c} {o}"} for t, c, o in entries]}
    )


@pytest.fixture
def run(tiny_checkpoint: Callable[[str], Path]) -> Callable[[Expectations], runner.Report]:
    """Two cases of the reference and of a testee that is wrong in both."""

    def get(expected: Expectations) -> runner.Report:
        return runner.run(
            [in_fork(REFERENCE), in_fork(BAD)],
            tiny_checkpoint("bf16"),
            lambda *_: None,
            only=("decode", "batch"),
            expectations=expected,
        )

    return get


def text_of(report: runner.Report) -> str:
    console = Console(record=True, width=200)
    reports.print_report(report, console)
    return console.export_text()


def test_what_is_expected_does_not_fail_and_is_told(run: Callable[[Expectations], runner.Report]) -> None:
    report = run(expectations(("bad", "dec*", "fails"), ("b*", "batch", "skipped"), ("bad", "prefill", "fails")))
    assert report.passed
    ((failure, entry),) = report.expected
    assert (failure.testee, failure.case, entry.reason) == ("bad", "decode", "why dec* fails")
    assert failure.found[0].startswith("specification: first difference in norm, request 0, position 0")
    by_name = {verdict.case.name: verdict for verdict in report.verdicts}
    assert set(by_name["batch"].unsupported["bad"].values()) == {"skipped: why batch skipped"}
    assert by_name["batch"].failures_of("bad") == () and by_name["batch"].failures_of("reference") == ()
    printed, page = text_of(report), reports.to_html(report)
    assert "1 case failed as expected; nothing is known of 8 requests declined as unsupported." in printed
    for said in "why dec* fails", "Not in this run, though expected: bad, prefill fails (why prefill fails)":
        assert said in printed and said in page
    suite = ElementTree.fromstring(reports.to_junit(report))
    assert suite.get("failures") == "0"
    skipped = [element.get("message") or "" for element in suite.iter("skipped")]
    assert sum(text.startswith("fails as expected (why dec* fails): ") for text in skipped) == 3
    assert report.to_json()["expected_failures"][0]["case"] == "decode"


def test_nothing_else_hides_behind_it(run: Callable[[Expectations], runner.Report]) -> None:
    """Twins: a failure that no entry speaks of, and an entry whose failure is gone."""
    report = run(expectations(("bad", "decode", "fails"), ("reference", "decode", "fails")))
    assert not report.passed
    assert [(failure.testee, failure.case) for failure in report.unexpected] == [("bad", "batch")]
    assert report.overdue == ["reference passes decode, which is expected to fail (why decode fails): remove the entry"]
    assert report.overdue[0] in text_of(report) and report.overdue[0] in report.to_json()["problems"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[expected]]\ntestee = "a"\ncase = "b"\noutcome = "fails"\nreason = ""', "expected.0.reason: String should"),
        ('[[expected]]\ntestee = "a"\ncase = "b"\noutcome = "wrong"\nreason = "x"', "expected.0.outcome: Input should"),
        ('[[expected]]\ncase = "b"\noutcome = "fails"\nreason = "x"', "expected.0.testee: Field required"),
        ("[[expect]]", "expect: Extra inputs are not permitted"),
        ("[[expected]", "Expected"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "expect.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConformanceError, match=f"--expect {file}: {message}"):
        Expectations.read(file)


def test_entries_that_can_never_hold(run: Callable[[Expectations], runner.Report]) -> None:
    with pytest.raises(
        ConformanceError, match=r"bad, decoed fails .*: this checkpoint has no such case; it has prefill"
    ):
        run(expectations(("bad", "decoed", "fails")))
    with pytest.raises(ConformanceError, match="reference's cases cannot be skipped"):
        run(expectations(("*", "decode", "skipped")))


def test_a_testee_that_takes_too_long_is_ended(tiny_checkpoint: Callable[[str], Path]) -> None:
    sleeps = runner.TesteeCommand("sleeps", (sys.executable, "-c", "import time; time.sleep(600)"))
    began = time.monotonic()
    with pytest.raises(ConformanceError, match="testee sleeps was ended after 1 s, its --timeout"):
        runner.run([sleeps], tiny_checkpoint("bf16"), lambda *_: None, only=("decode",), timeout=1)
    assert time.monotonic() - began < 60


def test_as_tests_of_somebody_else(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """`pytest --pyargs`: a pass, a known failure, a skip; without the file, failures that name the module."""
    file = tmp_path / "expect.toml"
    entry = '[[expected]]\ntestee = "bad"\ncase = "{}"\noutcome = "{}"\nreason = "on purpose"\n'
    file.write_text(entry.format("decode", "fails") + entry.format("batch", "skipped"))

    def pytest_told(*more: object) -> str:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--pyargs",
            "dsv3_plugin.conformance",
            "-rA",
            "-p",
            "no:cacheprovider",
        ]
        command += ["--rootdir", tmp_path, "--testee-checkpoint", tiny_checkpoint("bf16"), "--testee", "reference"]
        command += ["--testee", f"bad={' '.join(BAD.command)}", "--testee-case", "decode", "--testee-case", "batch"]
        return subprocess.run(
            [*map(str, command), *map(str, more)], capture_output=True, text=True, cwd=tmp_path
        ).stdout

    told = pytest_told("--testee-expect", file)
    assert "3 passed, 1 skipped, 1 xfailed" in told, told
    assert "skipped: on purpose" in told and "test_case[bad-decode] - on purpose" in told
    told = pytest_told()
    assert "3 passed" in told and "2 failed" in told, told
    assert "specification: first difference in norm, request 0, position 0" in told
