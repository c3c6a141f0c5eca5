"""A program in a fork of a warm Python is as one in a new process: what it is told, says, and leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from warm import WarmPython


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> WarmPython:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "speaking.py").write_text("import os; print('loaded'); os.environ['SPOKE'] = 'yes'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        return WarmPython(sys.executable, ["fractions", "speaking"])


def test_it_is_told_and_says_what_a_new_process_would(python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, beside; print(__name__, sys.argv[1:], beside.NUMBER)\nsys.exit('bad luck')\n")
    (tmp_path / "beside.py").write_text("NUMBER = 7\n")
    done = python.run([script, "a", 2], [{"NAME": "value"}])
    assert (done.returncode, done.stdout, done.stderr) == (1, "__main__ ['a', '2'] 7\n", "bad luck\n")
    code = "import os, sys; print(sys.argv, *sorted(os.environ.items()), sys.stdin.read() == '')"
    assert (
        python.run(["-c", code, "b"], [{"NAME": "value"}]).stdout
        == "['-c', 'b'] ('NAME', 'value') ('SPOKE', 'yes') True\n"
    )
    assert "ZeroDivisionError" in python.run(["-c", "1 / 0"], [{}]).stderr


def test_it_ends_as_a_new_process_would(python):
    """Threads end first, then what was registered runs, and files are written."""
    code = "import atexit, threading, time; atexit.register(print, 'exit'); print('begin', end=' ')\n"
    code += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread', end=' '))).start()\n"
    for ending, status, said in ("", 0, ""), ("raise SystemExit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError"):
        done = python.run(["-c", code + ending], [{}])
        assert (done.returncode, done.stdout) == (status, "begin thread exit\n") and said in done.stderr


def test_what_it_spawns_is_warm(python):
    code = "import sys, multiprocessing as m\n"
    code += "def say(): print('fractions' in sys.modules, m.parent_process() is not None)\n"
    code += "p = m.get_context('spawn').Process(target=say); p.start(); p.join()"
    assert python.run(["-c", code], [{}]).stdout == "True True\n"


def test_its_packages_are_those_of_its_own_pythonpath(python, tmp_path):
    (tmp_path / "of_its_own.py").write_text("")
    find = ["-c", "import importlib.util; print(importlib.util.find_spec('of_its_own') is not None)"]
    assert [python.run(find, [each]).stdout for each in ({"PYTHONPATH": str(tmp_path)}, {})] == ["True\n", "False\n"]


def test_what_is_warm_was_imported_and_what_a_program_leaves_is_gone(python):
    leave = "import sys, fractions; print('fractions' in sys.modules); fractions.LEFT = sys.LEFT = 1"
    assert python.run(["-c", "import sys; print('fractions' in sys.modules, 'cgi' in sys.modules)"], [{}]).stdout == (
        "True False\n"
    )
    assert python.run(["-c", leave], [{}]).returncode == 0
    left = "import sys, fractions; print(hasattr(sys, 'LEFT'), hasattr(fractions, 'LEFT'))"
    assert python.run(["-c", left], [{}]).stdout == "False False\n"


def test_ranks_run_together_and_one_that_fails_ends_the_others(python):
    ranks = [dict(os.environ, RANK=str(rank)) for rank in range(2)]
    code = "import os; os.write(1, b'rank %s\\n' % os.environ['RANK'].encode())"  # in one piece
    assert sorted(python.run(["-c", code], ranks).stdout.splitlines()) == ["rank 0", "rank 1"]
    began = time.monotonic()
    code = "import os, sys, time; time.sleep(600) if os.environ['RANK'] == '0' else sys.exit(3)"
    assert python.run(["-c", code], ranks).returncode == 3
    assert time.monotonic() - began < 300


def test_a_command_of_its_own_is_the_program(python, tmp_path):
    code = "import sys; print(sys.argv, sys.orig_argv[3:]); print('fractions' in sys.modules, file=sys.stderr)"
    words = python.command("-c", code, "a")
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"['-c', 'a'] {['-c', code, 'a']}\n" and done.stderr == "True\n"
    done = subprocess.run(python.command("-m", "json.tool", "-h"), capture_output=True, text=True)
    assert done.returncode == 0 and "json.tool [-h]" in done.stdout
    assert subprocess.run(python.command("-c", "import sys; sys.exit(3)")).returncode == 3


@pytest.mark.parametrize("all_of_them", [False, True])
def test_who_asks_goes_away_and_so_does_the_program(all_of_them):
    """Alone, or with all that a terminal's interrupt reaches."""
    python = WarmPython(sys.executable, [])
    code = "import os, subprocess, sys, time; subprocess.Popen(['sleep', '600']); print(os.getpid(), flush=True)"
    process = subprocess.Popen(python.command("-c", f"{code}; time.sleep(600)"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    group = int(process.stdout.readline())
    if all_of_them:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(python.command()[2]) in (folder / "cmdline").read_text() and int(folder.name) != group:
                    os.kill(int(folder.name), signal.SIGTERM)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it runs on")
