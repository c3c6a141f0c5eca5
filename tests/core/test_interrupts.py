"""Commands ended in the middle, by a signal or a full disk: who ends with them, what is left, what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from processes import is_alive, until

from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.writer import in_bytes, leftovers, new_folder
from dsv3_plugin.conformance.programs import reason, work_folder
from dsv3_plugin.errors import CheckpointError, ConformanceError

DSV3 = Path(sys.executable).with_name("dsv3")


@contextmanager
def command(*words: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(DSV3), *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | variables,
        # A shell's background jobs ignore SIGINT, and so would what the tests start there.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


# dsv3 checkpoint make


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_maker_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "made"

    def partial() -> list[Path]:
        return list(tmp_path.glob("made.*.partial"))

    with command("checkpoint", "make", "small", folder, "--seed", 1) as process:
        until(lambda: bool(partial()) and leftovers(folder) == [], "the folder of a writer that lives")
        process.send_signal(number)
        _, said = process.communicate()
    assert not folder.exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and list(tmp_path.iterdir()) == []
        assert said.splitlines()[-1] == f"error: stopped by {number.name}; {folder} was not made, nothing is left of it"
        return
    # Nobody was left to clear up: the next run names what is left, and is not in its way.
    assert leftovers(folder) == partial() and len(partial()) == 1
    with command("checkpoint", "make", "tiny", folder, "--seed", 1) as process:
        _, said = process.communicate()
    assert process.returncode == 0 and folder.is_dir()
    assert f"note: {partial()[0]} is left of a run that was killed" in said.replace("\n", "")


def test_a_leftover_of_the_same_process_number_is_not_in_the_way(tmp_path: Path) -> None:
    """As in a container that is started again, where each command has the number that it had before."""
    (tmp_path / f".made.{os.getpid()}.partial").mkdir()
    (tmp_path / f"made.{os.getpid():08d}.partial").mkdir()
    make_checkpoint(read_config("tiny"), tmp_path / "made", 1)
    assert (tmp_path / "made" / "config.json").is_file()
    assert leftovers(tmp_path / "made") == [tmp_path / f"made.{os.getpid():08d}.partial"]


def test_all_files_have_the_permissions_of_any_new_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    modes = {file.name: file.stat().st_mode for file in tiny_checkpoint("bf16").iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "any").stat().st_mode) and len(modes) > 3


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"made: cannot be written: .*No space left.*; nothing is left of it"):  # noqa: SIM117
        with new_folder(tmp_path / "made", 0):
            Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (3_400_000, "3.4 MB"), (18_200_000, "18.2 MB"), (1_188_000_000, "1.188 GB")]
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_bytes(size) == words


# dsv3 conformance run

# Starts a process of its own, as engines do, and computes for ever.
ENGINE = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid} {sys.argv[2]}")
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_suite_that_is_ended(number: signal.Signals, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(ENGINE)
    (tmp_path / "temporary").mkdir()
    started = tmp_path / "started"
    testee = f"x={sys.executable} {tmp_path}/engine.py {started}"
    run = ("conformance", "run", "--checkpoint", tiny_checkpoint("bf16"), "--testee", testee)
    with command(*run, TMPDIR=str(tmp_path / "temporary")) as process:
        until(lambda: started.exists() and started.read_text().count(" ") == 2, "the testee")
        engine, child, folder = started.read_text().split(maxsplit=2)
        assert is_alive(int(engine)) and is_alive(int(child))
        process.send_signal(number)
        _, said = process.communicate()
    until(lambda: not is_alive(int(engine)) and not is_alive(int(child)), "the testee's end")
    until(lambda: list((tmp_path / "temporary").iterdir()) == [], "the folder's end")
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        line = f"error: stopped by {number.name}; the testees are ended, {folder} is deleted"
        assert said.splitlines()[-1] == line


def test_a_folder_to_keep_outlives_a_killed_suite(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(ENGINE)
    started, kept = tmp_path / "started", tmp_path / "kept"
    testee = f"x={sys.executable} {tmp_path}/engine.py {started}"
    run = ("conformance", "run", "--checkpoint", tiny_checkpoint("bf16"), "--testee", testee, "--keep", kept)
    with command(*run) as process:
        until(lambda: started.exists() and started.read_text().count(" ") == 2, "the testee")
        engine, child, _ = started.read_text().split(maxsplit=2)
        process.kill()
        process.communicate()
    until(lambda: not is_alive(int(engine)) and not is_alive(int(child)), "the testee's end")
    time.sleep(0.5)
    assert (kept / "x" / "log.txt").is_file()


def test_what_a_testee_left_behind_ends_with_it(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """An engine's process that outlives a crash holds the output open; the suite would wait for ever."""
    crash = ENGINE.replace("time.sleep(1000)\n", "sys.exit('CheckpointError: it crashed')\n")
    (tmp_path / "engine.py").write_text(crash)
    testee = f"x={sys.executable} {tmp_path}/engine.py {tmp_path}/started"
    keep = ("--keep", tmp_path / "kept")
    with command("conformance", "run", "--checkpoint", tiny_checkpoint("bf16"), "--testee", testee, *keep) as process:
        _, said = process.communicate(timeout=120)
    _, child, folder = (tmp_path / "started").read_text().split(maxsplit=2)
    until(lambda: not is_alive(int(child)), "its child's end")
    assert process.returncode == 2
    log = tmp_path / "kept" / "x" / "log.txt"
    assert said.splitlines()[-1] == (
        f"error: testee x failed with status 1: CheckpointError: it crashed (its log: {log})"
    )
    assert log.read_text() == "CheckpointError: it crashed\n" and folder == str(tmp_path / "kept")


def test_the_suites_folder_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConformanceError, match=r"cannot be written: No space left on device; it is deleted"):  # noqa: SIM117
        with work_folder(None):
            Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="another"), work_folder(None) as folder:
        raise ValueError("another error names its log")
    assert list(tmp_path.iterdir()) == [folder]


BAR = "Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 12.3it/s]"


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (["starting", "error: no such file", BAR], "error: no such file"),
        (
            ["Traceback (most recent call last):", "ValueError: a size", "during handling", BAR, ""],
            "ValueError: a size",
        ),
        (
            [
                "[2026] Scheduler hit an exception: Traceback (most recent call last):",
                "dsv3_plugin.errors.CheckpointError: tensor x has shape [1]",
                BAR,
                "RuntimeError: Rank 0 scheduler died during initialization (exit code: -3).",
            ],
            "dsv3_plugin.errors.CheckpointError: tensor x has shape [1]",
        ),
        (
            ["(EngineCore pid=7) ERROR 11-29 [core.py:1] torch.OutOfMemoryError: CUDA out of memory", BAR, "Killed"],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (
            ["weights \u2501\u2501\u2501\u2501\u2501 100% 0:00:00", "the last word", "\u2588\u2588\u2588 3/4"],
            "the last word",
        ),
        ([BAR, "  50%|#####     | 1/2 [00:01<00:01,  1.00s/it]"], "it said nothing"),
        (
            ["  0% Completed | 0/1 [00:00<?, ?it/s]error: tensor x has shape [1]", "", BAR],
            "error: tensor x has shape [1]",
        ),
        (["import error: of no consequence", "RuntimeError: the reason", BAR], "RuntimeError: the reason"),
        (["[rank0]: AssertionError", "a warning: something leaked"], "AssertionError"),
        ([], "it said nothing"),
    ],
)
def test_why_a_testee_failed(log: list[str], why: str) -> None:
    assert reason(log) == why
