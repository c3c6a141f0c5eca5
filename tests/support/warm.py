"""Programs in forks of a Python that has imported what they need (`warm_python.py`).

Run as `warm.py SOCKET WORDS...` it is `python WORDS...` in such a fork: what can be started where a command is asked
for, and ends with it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SUPPORT = Path(__file__).parent


class WarmPython:
    """A Python with `modules` imported. It ends with this process, when its stdin closes."""

    def __init__(self, python: str, modules: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._python, self._socket = python, Path(self._folder.name) / "socket"
        command = [python, "-W", "ignore", str(SUPPORT / "warm_python.py"), str(self._socket), *modules]
        path = os.pathsep.join([str(SUPPORT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._log = Path(self._folder.name) / "log.txt"
        with self._log.open("w") as log:
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)

    def _ready(self) -> str:
        """The socket's path, once there is one."""
        while not self._socket.exists():
            assert self._server.poll() is None, self._log.read_text()
            time.sleep(0.05)
        return str(self._socket)

    def run(
        self, command: Sequence[object], environments: Sequence[Mapping[str, str]]
    ) -> subprocess.CompletedProcess[str]:
        """Run `python COMMAND` once in each of the environments, all at a time; the status is the first bad one."""
        words = [str(word) for word in command]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
            outputs = out.fileno(), error.fileno()
            status = ask(self._ready(), words, environments, outputs, [self._python, *words])
            for file in out, error:
                file.seek(0)
            return subprocess.CompletedProcess(words, status, out.read(), error.read())

    def command(self, *words: str) -> tuple[str, ...]:
        """A command that is `python WORDS`."""
        return self._python, __file__, self._ready(), *words


def ask(
    path: str,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    outputs: tuple[int, int],
    started_as: Sequence[str],
) -> int:
    """The exit status of `python COMMAND`, run by the warm Python at a socket, with these output and error files."""
    request = {"command": command, "environments": [dict(each) for each in environments], "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"\0"], outputs)
        connection.sendall(f"{json.dumps(request | {'started_as': started_as})}\n".encode())
        return int(connection.makefile().readline() or 1)


if __name__ == "__main__":
    status = ask(sys.argv[1], sys.argv[2:], [os.environ], (1, 2), sys.orig_argv)
    sys.exit(status if status >= 0 else 128 - status)
