"""Clears up after the suite when it goes away, however that happens.

    python keeper.py run COMMAND...    runs a program; then ends it, with everything that it started
    python keeper.py serve COMMAND...  runs a server, which may then shut down by itself before it is ended so
    python keeper.py delete FOLDER     deletes a folder then

Whoever starts it (`start`) holds the other end of this program's standard input. A killed process closes its files, so
the input ends after SIGKILL, too, when nobody else is left. The file is run by its path and imports nothing of the
package: it starts at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

NO_LONGER_WANTED = b"k"
"""Written by the suite before it closes the input: the folder is to stay."""

PATIENCE_S = 30.0
"""For a server to shut down in."""


def start(*words: str, **options: Any) -> subprocess.Popen[Any]:
    """This program in a session of its own: a terminal's Ctrl-C reaches who starts it, who then ends it.

    words: of the command line above. options: of `subprocess.Popen`.
    """
    words = (sys.executable, __file__, *words)
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, **options)


def end(keeper: subprocess.Popen[Any]) -> None:
    """End what it keeps; returns when that is gone."""
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait()


def run(command: list[str], patience_s: float = 0.0) -> None:
    """Run a program in a session of its own, and exit as it does, death by a signal included."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        sys.exit(f"error: {command[0]}: cannot be started: {error.strerror}")

    def end_all() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def wait_for_the_suite() -> None:
        os.read(0, 1)
        if patience_s:
            process.terminate()
            time.sleep(patience_s)  # or until it has ended, which ends this program
        end_all()

    threading.Thread(target=wait_for_the_suite, daemon=True).start()
    status = process.wait()
    end_all()  # what it started and left behind holds its output open
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def delete(folder: str) -> None:
    """Delete a folder once the input ends, unless the suite said otherwise."""
    if os.read(0, 1) == NO_LONGER_WANTED:
        return
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)  # programs that are just being ended may still have made a file


if __name__ == "__main__":
    match sys.argv[1]:
        case "run":
            run(sys.argv[2:])
        case "serve":
            run(sys.argv[2:], PATIENCE_S)
        case _:
            delete(sys.argv[2])
