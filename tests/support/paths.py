"""Where the tests find what is not theirs alone."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
TESTS = ROOT / "tests"
"""Also where `pretrain_on_cpu.py` lies, which users run as well."""
SUPPORT = Path(__file__).resolve().parent
"""Programs that tests start, and modules that several tests import."""
