"""The suite's options for pytest, which reads those of an installed package by an entry point only.

They are those of `dsv3 conformance run`, behind `--testee`: every pytest of the environment has them. Nothing else is
imported here.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """See `conftest`."""
    group = parser.getgroup("dsv3-plugin conformance")
    group.addoption("--testee", action="append", default=[], help="NAME or NAME=COMMAND; repeat it")
    group.addoption("--testee-checkpoint", type=Path, help="a DeepSeek-V3 checkpoint folder")
    group.addoption("--testee-device", choices=("cpu", "cuda"), default="cpu", help="where all run the model")
    group.addoption("--testee-layout", action="append", default=[], help="run spread over ranks; repeat it")
    group.addoption("--testee-case", action="append", default=[], help="run only this case; repeat it")
    group.addoption(
        "--testee-environments", type=Path, default=Path(".envs"), help="folder with an environment for each"
    )
    group.addoption("--testee-expect", type=Path, help="a TOML file of known failures and skips, with reasons")
    group.addoption("--testee-timeout", type=float, help="seconds that a testee may take")
    group.addoption("--testee-keep", type=Path, help="keep job, results and logs in this new folder")
