"""Where the tests find what is not theirs alone."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
SUPPORT = Path(__file__).resolve().parent
"""Programs that tests start, and modules that several tests import."""
RECORDINGS = ROOT / "tests" / "kernels"
"""What an H200 printed."""
