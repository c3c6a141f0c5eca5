"""Puts the stand-ins in place when Megatron is about to be imported; Python imports this module when it starts."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Megatron(MetaPathFinder):
    """Notices the import, and finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called by Python for each import."""
        if name == "megatron":
            import megatron_cpu

            megatron_cpu.install()


sys.meta_path.insert(0, Megatron())
