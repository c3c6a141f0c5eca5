"""Programs in Megatron's environment: in a process of their own, as a user starts them, or in a fork of a warm one."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from engines import ENVIRONMENTS, free_port, python_of
from warm import WarmPython

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.runner import TesteeCommand

PYTHON = ENVIRONMENTS / "megatron" / "bin" / "python"
DSV3 = PYTHON.with_name("dsv3")
needs_megatron = pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing: run `make environments`")

MODEL = "dsv3_plugin.commands.cli", "dsv3_plugin.megatron_backend.convert", "dsv3_plugin.megatron_backend.model"
"""What is imported in advance by default."""
LOOP = (*MODEL, "pretrain_on_cpu")
"""For Megatron's own loop, whose stand-ins stay in place."""

Done = subprocess.CompletedProcess[str]


def _environment(variables: dict[str, str]) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "200"} | variables


def fresh(*command: object, **variables: str) -> Done:
    """Run a command in a new process."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=_environment(variables), timeout=900)


def torchrun(*command: object, ranks: int, **variables: str) -> Done:
    """Run `torchrun COMMAND` in new processes."""
    launch = "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"
    return fresh(PYTHON, *launch, *command, **variables)


_warm = cache(WarmPython)


def warm(*command: object, ranks: int | None = None, modules: tuple[str, ...] = MODEL, **variables: str) -> Done:
    """Run `python COMMAND` in a fork, or in one for each of `ranks`, with the variables that torchrun sets."""
    environments = [_environment(variables)]
    if ranks:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        numbers = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks))
        environments = [environments[0] | world | {"LOCAL_WORLD_SIZE": str(ranks)} | number for number in numbers]
    return _warm(str(PYTHON), modules).run(command, environments)


def warm_command(modules: tuple[str, ...] = MODEL) -> tuple[str, ...]:
    """A command whose arguments are those of a `python` that runs them in a fork."""
    return _warm(python_of("megatron"), modules).command()


def testee(program: str) -> TesteeCommand:
    """A program in such forks that is a testee of the suite."""
    words = ("-m", program) if program.startswith("dsv3_plugin.") else (program,)
    return TesteeCommand("megatron", _warm(str(PYTHON), MODEL).command(*words))


def printed(done: Done) -> str:
    """All that a program said, errors last."""
    return done.stdout + done.stderr


def convert(direction: str, *arguments: object) -> str:
    """`dsv3 convert`; returns what it printed."""
    done = warm(DSV3, "convert", direction, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(CheckpointReader(checkpoint).tensors())
