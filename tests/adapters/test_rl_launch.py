"""Servers that the RL loop starts end with it, however it ends, with all their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from paths import ROOT
from processes import is_alive, until

from dsv3_plugin.conformance import keeper

EXAMPLE = ROOT / "examples" / "rl"

# A server with a process of its own, as engines have; with `--deaf` neither hears SIGTERM.
SERVER = """
import http.server, os, pathlib, signal, subprocess, sys
if "-c" in sys.argv:  # a question about its version
    sys.exit()
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
away = "--away" in sys.argv
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=away)
pathlib.Path(__file__).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
if "--silent" in sys.argv:
    child.wait()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""

# A training loop of two servers, in the order of grpo.py's `with` statements.
LOOP = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
sys.path.insert(0, sys.argv[1])
from launch import Launch, exit_on_sigterm, started
from dsv3_plugin.conformance import keeper
folder = Path(sys.argv[2])
keeper.__file__ = str(folder / "keeper.py")
launch = Launch(folder, True, 64, environments=folder, options=dict.fromkeys(("vllm", "sglang"), sys.argv[4:]))
exit_on_sigterm()
ending = Event()
def start(name):
    stack.enter_context(started(name, launch, folder / f"{name}.log", ending))
with ExitStack() as stack, ThreadPoolExecutor() as threads, ExitStack() as first:
    first.callback(ending.set)
    for future in [threads.submit(start, name) for name in ("vllm", "sglang")]:
        future.result()
    (folder / "running").touch()
    time.sleep(float(sys.argv[3]))
"""


def pids(folder: Path) -> list[int]:
    files = [folder / name / "bin/pids" for name in ("vllm", "sglang")]
    return [int(pid) for file in files if file.exists() for pid in file.read_text().split()]


def start(folder: Path, seconds: float, *more: str) -> subprocess.Popen[bytes]:
    """The loop, once its servers run."""
    for name in "vllm", "sglang":
        # As a script of the user's may start the Python of an environment.
        python = folder / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.with_name("server.py").write_text(SERVER)
        python.write_text(f'#!/bin/bash\nexec {sys.executable} "$(dirname "$0")/server.py" "$@"\n')
        python.chmod(0o755)
    impatient = Path(keeper.__file__).read_text().replace("PATIENCE_S = 30.0", "PATIENCE_S = 0.5")
    (folder / "keeper.py").write_text(impatient)
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, EXAMPLE, folder, str(seconds), *more],
        # A shell's background jobs ignore SIGINT, and so would what the tests start there.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    have_begun = (lambda: len(pids(folder)) == 4) if "--silent" in more else (folder / "running").exists
    until(lambda: have_begun() or process.poll() is not None, "the servers")
    assert len(pids(folder)) == 4 and all(map(is_alive, pids(folder)))
    return process


@pytest.mark.parametrize(
    ("sent", "status", "deaf"),
    [
        ((), 0, ["--deaf"]),
        ((signal.SIGINT,), -signal.SIGINT, []),
        ((signal.SIGTERM, signal.SIGTERM), 143, ["--deaf"]),
        ((signal.SIGKILL,), -signal.SIGKILL, []),
    ],
)
def test_nothing_of_a_loop_is_left(
    sent: tuple[signal.Signals, ...], status: int, deaf: list[str], tmp_path: Path
) -> None:
    process = start(tmp_path, 1000 if sent else 0.1, *deaf)
    for number in sent:
        process.send_signal(number)
    assert process.wait(60) == status
    if signal.SIGKILL not in sent:  # it has waited for the servers themselves
        assert not any(map(is_alive, pids(tmp_path)[::2]))
    until(lambda: not any(map(is_alive, pids(tmp_path))), "the servers' end")


def test_a_loop_that_ends_waits_for_no_server_that_starts(tmp_path: Path) -> None:
    process = start(tmp_path, 1000, "--silent")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    until(lambda: not any(map(is_alive, pids(tmp_path))), "the servers' end")


def test_a_process_that_left_is_seen(tmp_path: Path) -> None:
    """The twin: in a session of its own, where no keeper looks for it."""
    process = start(tmp_path, 0.1, "--away")
    assert process.wait(60) == 0
    left = [pid for pid in pids(tmp_path) if is_alive(pid)]
    assert left == pids(tmp_path)[1::2]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
