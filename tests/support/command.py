"""`dsv3` in the test's own process."""

from __future__ import annotations

import sys

import pytest

from dsv3_plugin.commands import cli


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `dsv3 ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["dsv3", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)
