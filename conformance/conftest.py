"""The suite as tests of whoever runs it:

    pytest --pyargs dsv3_plugin.conformance --testee-checkpoint DIR --testee reference --testee NAME=COMMAND

A test is a case of a testee. All run once, side by side, before the first test reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.cli import testee_commands
from dsv3_plugin.conformance.expectations import Expectations
from dsv3_plugin.conformance.protocol import Case
from dsv3_plugin.conformance.verdicts import Report
from dsv3_plugin.errors import DSV3Error


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    checkpoint: Path
    testees: list[runner.TesteeCommand]
    cases: tuple[Case, ...]
    expectations: Expectations

    @classmethod
    def of(cls, config: pytest.Config) -> Asked:
        """Raises `pytest.UsageError` where it cannot be done."""
        checkpoint, names = config.getoption("--testee-checkpoint"), config.getoption("--testee")
        if checkpoint is None or not names:
            raise pytest.UsageError("the conformance suite needs --testee-checkpoint DIR and at least one --testee")
        try:
            layouts, environments = config.getoption("--testee-layout"), config.getoption("--testee-environments")
            testees = testee_commands(names, layouts, environments)
            cases = runner.select(
                runner.cases_of(CheckpointReader(checkpoint), config.getoption("--testee-device")),
                config.getoption("--testee-case"),
            )
            file = config.getoption("--testee-expect")
            return cls(checkpoint, testees, cases, Expectations.read(file) if file else Expectations())
        except DSV3Error as error:
            raise pytest.UsageError(str(error)) from None


_ASKED = pytest.StashKey[Asked]()


def asked(config: pytest.Config) -> Asked:
    """The same, read once."""
    if _ASKED not in config.stash:
        config.stash[_ASKED] = Asked.of(config)
    return config.stash[_ASKED]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each testee and case."""
    if {"testee", "case"} <= set(metafunc.fixturenames):
        run = asked(metafunc.config)
        pairs = [(testee.name, case.name) for testee in run.testees for case in run.cases]
        metafunc.parametrize(("testee", "case"), pairs, ids=[f"{testee}-{case}" for testee, case in pairs])


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    """The run; a testee that crashes or takes too long fails every test."""
    config, run = request.config, asked(request.config)
    try:
        return runner.run(
            run.testees,
            run.checkpoint,
            lambda testee, what: None,
            device=config.getoption("--testee-device"),
            keep=config.getoption("--testee-keep"),
            only=config.getoption("--testee-case"),
            expectations=run.expectations,
            timeout=config.getoption("--testee-timeout"),
        )
    except DSV3Error as error:
        pytest.fail(str(error), pytrace=False)
