"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mini_checkpoint import MINI, Folders

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config

# The arithmetic of a CPU is that of one thread; set before any test computes something.
torch.set_num_threads(1)
# Set, every program that a test starts would compile every module of its engine anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_NO_TIME = "no time left: `make test` runs all"

TinyCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Of all processes of this run of pytest."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(request.config, "workerinput") else folder


@pytest.fixture(scope="session")
def tiny_checkpoint(run_folder: Path) -> TinyCheckpoint:
    """`tiny_checkpoint("bf16")`: the preset `tiny` in `bf16`, `fp32` or `fp8`, seed 1, made once. Read it only."""
    root = run_folder / "tiny-checkpoints"
    root.mkdir(exist_ok=True)

    def get(dtype: str) -> Path:
        path = root / dtype
        with (root / f"{dtype}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make_checkpoint(read_config("tiny"), path, 1, dtype=CheckpointDtype(dtype))
        return path

    return get


@pytest.fixture(scope="session", autouse=True)
def _vllm_cache_of_servers(run_folder: Path) -> Iterator[None]:
    """`_vllm_cache`, for those that serve several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(run_folder / "vllm-cache" / "vllm"))
        yield


@pytest.fixture(autouse=True)
def _vllm_cache(run_folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vLLM finds out about a model class, in a process that imports all of vLLM, it finds out once."""
    parameters = getattr(request.node, "callspec", None)
    environment = parameters.params.get("environment", "vllm") if parameters else "vllm"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(run_folder / "vllm-cache" / environment))


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: TinyCheckpoint) -> Folders:
    """`tiny_checkpoint` in its three dtypes."""
    return {dtype: tiny_checkpoint(dtype) for dtype in CheckpointDtype}


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The smallest model in bf16 and fp8, seed 1. Read it only."""
    root = tmp_path_factory.mktemp("mini")
    return {d: make_checkpoint(MINI, root / d, 1, dtype=CheckpointDtype(d)).path for d in ("bf16", "fp8")}


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset `small` in bf16 with fewer layers and a small vocabulary: sums over 1,024 and MLA's real sizes."""
    path = tmp_path_factory.mktemp("wide-checkpoint") / "bf16"
    config = read_config("small") | {"vocab_size": 1024, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    make_checkpoint(config, path, 1, dtype=CheckpointDtype("bf16"))
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, help="Skip what has not begun after so many seconds, and say so.")
    parser.addoption("--always", action="append", default=[], help="A file that --seconds does not concern.")


@functools.cache
def _started() -> float:
    """When the first test began."""
    return time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds, always = item.config.getoption("--seconds"), item.config.getoption("--always")
    if seconds and time.monotonic() - _started() > seconds and item.nodeid.partition("::")[0] not in always:
        pytest.skip(_NO_TIME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = (report for report in terminalreporter.stats.get("skipped", []) if _NO_TIME in str(report.longrepr))
    for file, count in Counter(report.nodeid.split("::")[0] for report in skipped).items():
        terminalreporter.write_line(f"not run for want of time: {count} tests of {file}")
