"""Programs in forks of a Python that has imported what they need (`warm_python.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from paths import SUPPORT, TESTS


class WarmPython:
    """A Python with `modules` imported. It ends with this process, when its stdin closes."""

    def __init__(self, python: str, modules: Sequence[str]) -> None:
        command = [python, "-W", "ignore", str(SUPPORT / "warm_python.py"), *modules]
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(
        self, command: Sequence[object], environments: Sequence[Mapping[str, str]]
    ) -> subprocess.CompletedProcess[str]:
        """Run `python COMMAND` once in each of the environments, all at a time; the status is the first bad one."""
        words = [str(word) for word in command]
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, error = Path(folder) / "out", Path(folder) / "error"
            request = {"command": words, "environments": environments, "stdout": str(out), "stderr": str(error)}
            print(json.dumps(request), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(words, status, out.read_text(), error.read_text())
