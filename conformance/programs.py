"""Running testees as programs: their folder, their output, and their end, which comes with ours at the latest."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dsv3_plugin.conformance import keeper
from dsv3_plugin.conformance.protocol import PROGRESS_PREFIX
from dsv3_plugin.errors import ConformanceError

Progress = Callable[[str, str], None]
"""Called with a testee's name and what it does now."""

_LAST_LINES = 10_000


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """A folder for job, results and logs.

    Without `keep`, the name of a new folder, it is temporary: it stays only where an error names a log in it.
    Raises `ConformanceError` where the disk is full.
    """
    if keep is not None:
        keep.mkdir(parents=True)
    folder = keep or Path(tempfile.mkdtemp(prefix="dsv3-conformance-"))
    clearing = keeper.start("delete", str(folder), stdout=subprocess.DEVNULL) if keep is None else None
    stays = keep is not None
    try:
        yield folder
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = "" if stays else "; it is deleted"
            raise ConformanceError(f"{folder}: cannot be written: {error.strerror}{where}") from None
        stays = True
        raise
    except BaseException as error:
        error.add_note(f"the testees are ended, {folder} is {'left as it is' if stays else 'deleted'}")
        raise
    finally:
        if clearing is not None:
            assert clearing.stdin is not None
            if stays:
                clearing.stdin.write(keeper.NO_LONGER_WANTED)
            keeper.end(clearing)


_STANDING_BACK = '{ echo "$0" >/proc/self/autogroup; } 2>/dev/null; exec nice -n "$0" "$@"'
"""For a shell. Linux has a niceness for each session too, and between sessions only that one counts."""


class Program(NamedTuple):
    """A testee's command, the folder that holds its job, and the one that its result and log go to."""

    command: Sequence[str]
    job_dir: Path
    result_dir: Path
    niceness: int = 0
    """How far it stands back, by nice(1), where processors are short."""


def run_programs(programs: Mapping[str, Program], progress: Progress, timeout: float | None = None) -> None:
    """Run all programs at the same time, by the names that they have in what is said of them.

    However this process ends, they end with it, by `keeper`; one that takes more than `timeout` seconds is ended.
    Raises `ConformanceError` with the last words of those that failed.
    """
    began = time.monotonic()
    failures: list[str] = []
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, (command, job_dir, result_dir, niceness) in programs.items():
            if shutil.which(command[0]) is None:
                raise ConformanceError(
                    f"testee {name} cannot be started: {command[0]}: No such file, or not executable"
                )
            result_dir.mkdir()
            words = ("sh", "-c", _STANDING_BACK, str(niceness), *command, str(job_dir), str(result_dir))
            processes[name] = keeper.start(
                "run",
                *words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            )
        threads = [
            threading.Thread(
                target=_follow, args=(name, process, programs[name].result_dir, progress, failures), daemon=True
            )
            for name, process in processes.items()
        ]
        for thread in threads:
            thread.start()
        late = []
        for name, thread in zip(processes, threads, strict=True):
            thread.join(None if timeout is None else max(0.0, began + timeout - time.monotonic()))
            if thread.is_alive():
                late.append(name)
        if late:
            raise ConformanceError(
                f"testee {', '.join(late)} was ended after {timeout:g} s, its --timeout; how far it came:"
                f" {programs[late[0]].result_dir / 'log.txt'}"
            )
    finally:
        for process in processes.values():
            keeper.end(process)
    if failures:
        raise ConformanceError("; ".join(failures))


def _follow(
    name: str, process: subprocess.Popen[str], result_dir: Path, progress: Progress, failures: list[str]
) -> None:
    """Write a program's output to its log until it ends; adds to `failures` if it failed."""
    log = result_dir / "log.txt"
    said: deque[str] = deque(maxlen=_LAST_LINES)
    assert process.stdout is not None
    try:
        with log.open("w") as lines, process.stdout:
            for line in process.stdout:
                if line.startswith(PROGRESS_PREFIX):
                    progress(name, json.loads(line.removeprefix(PROGRESS_PREFIX))["case"])
                else:
                    lines.write(line)
                    said.append(line)
    except OSError as error:
        keeper.end(process)
        failures.append(f"testee {name} was ended: {log} cannot be written: {error.strerror}")
        return
    code = process.wait()
    if code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
        failures.append(f"testee {name} {how}: {reason(said)} (its log: {log})")
    else:
        progress(name, "done")


# The most telling first: an error of ours, which an engine's processes wrap and follow by errors of their own. It may
# stand behind a progress bar, which has no end of line.
_ERRORS = (
    re.compile(r"(?:(?<=\])|^)error: .+|\bdsv3_plugin\.errors\.\w+: .+"),
    re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b(?:: .+|$)"),
)
_PROGRESS_BAR = re.compile(r"\d+%|\d+/\d+ \[|[\u2501\u2588]{3}|\bit/s\b|\bs/it\b")


def reason(lines: Iterable[str]) -> str:
    """The line of a failed program's output that says why: its last error, else its last words.

    A progress bar, which is written over itself, is never the reason.
    """
    words = [line.strip() for line in lines if line.strip()]
    for error in _ERRORS:
        for line in reversed(words):
            if (found := error.search(line)) is not None:
                return found[0]
    return next((line for line in reversed(words) if not _PROGRESS_BAR.search(line)), "it said nothing")
