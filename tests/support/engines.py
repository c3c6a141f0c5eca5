"""Running real engines of their own environments (`make environments`), for the tests of the adapters."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from paths import ROOT
from warm import WarmPython

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance import runner
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import bind_ops

ENVIRONMENTS = ROOT / ".envs"
REFERENCE = runner.TesteeCommand("reference", (sys.executable, "-m", "dsv3_plugin.conformance.testees.reference"))


def python_of(environment: str) -> str:
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: run `make environments`")
    return str(python)


WARM = {
    "core": ("dsv3_plugin.commands.cli", "dsv3_plugin.conformance.testees.reference"),
    "vllm": (
        *("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
        *("vllm.v1.core.sched.scheduler", "vllm.model_executor.layers.quantization.compressed_tensors.utils"),
        *("vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.v1.executor.multiproc_executor"),
        "support.vllm_in_forks",
    ),
    "sglang": (
        *("sglang.srt.managers.scheduler", "sglang.srt.models.registry", "sglang.srt.server_args"),
        *("sglang.srt.entrypoints.http_server", "sglang.srt.managers.detokenizer_manager"),
    ),
}


@functools.cache
def _warm(environment: str) -> WarmPython:
    """`core` is this Python's own environment."""
    python = sys.executable if environment == "core" else python_of(environment)
    return WarmPython(python, WARM[environment.partition("-")[0]])


def shipped_testee(environment: str) -> runner.TesteeCommand:
    """The testee of an environment NAME or NAME-VERSION, as `warm` runs programs."""
    name = environment.partition("-")[0]
    return warm_testee(environment, "-m", f"dsv3_plugin.conformance.testees.{name}")


def warm_testee(environment: str, *program: str) -> runner.TesteeCommand:
    """A program in an engine's environment as a testee."""
    return runner.TesteeCommand(environment.partition("-")[0], warm_command(environment, *program))


def warm(environment: str, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in a fork of a Python that has imported an environment's engine: that takes ten seconds."""
    return _warm(environment).run(command, [os.environ | {"OMP_NUM_THREADS": "1"} | variables])


def warm_command(environment: str, *program: str) -> tuple[str, ...]:
    """A command that is `python PROGRAM` as `warm` runs it: a server's start takes half a minute of processor time."""
    return _warm(environment).command(*program)


def environments_of(commands: Mapping[str, Sequence[str]], folder: Path) -> Path:
    """A folder of environments, of which each `bin/python` is a command such as `warm_command`'s."""
    for name, command in commands.items():
        python = folder / name / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        python.chmod(0o755)
    return folder


def in_fork(testee: runner.TesteeCommand) -> runner.TesteeCommand:
    """A testee in this Python's environment, as `warm` runs programs; another as it is."""
    python, *program = testee.command
    return replace(testee, command=_warm("core").command(*program)) if python == sys.executable else testee


def run(testees: Sequence[runner.TesteeCommand], checkpoint: Path, work_dir: Path, *cases: str) -> runner.Report:
    """What the suite finds; the reference and its saboteurs run in forks, also where the suite itself starts them."""
    programs = [in_fork(testee) for testee in testees]
    core = environments_of({"core": warm_command("core")}, work_dir / "environments") / "core" / "bin" / "python"
    with patch.object(runner, "sys", SimpleNamespace(executable=str(core))):
        return runner.run(programs, checkpoint, lambda name, what: None, keep=work_dir / "kept", only=cases)


def ran_as_one_rank(
    testee: runner.TesteeCommand,
    checkpoint: Path,
    work_dir: Path,
    no_drafts: str,
    cases: Sequence[str] = ("prefix_cache_chunked", "mtp_2"),
) -> None:
    """Prompts in chunks beside decodes, prefix hits, drafts, and a rank without requests in the last rounds: the bits
    of one rank. Stages decline the case of drafts, which is the last, and say `no_drafts`.
    """
    report = run([REFERENCE, testee], checkpoint, work_dir, *cases)
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    in_stages = testee.layout.pp > 1
    drafts = report.results[testee.name].cases[-1]
    if in_stages:
        assert all(no_drafts in (request.unsupported or "") for request in drafts.requests)
    else:
        assert 0 < drafts.num_accepted_tokens < drafts.num_draft_tokens
    for verdict in report.verdicts:
        if not in_stages or not verdict.case.num_speculative_tokens:
            pair = verdict.between("reference", testee.name)
            assert pair is not None and pair.equal_rows > 500, verdict.case.name


def own_model_served_when_switched_off(
    engine: str, checkpoint: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The class that an engine serves with `DSV3_PLUGIN=off`. The report must name it, and find its rows different."""
    monkeypatch.setenv("DSV3_PLUGIN", "off")
    report = run([REFERENCE, shipped_testee(engine)], checkpoint, work_dir, "prefill")
    assert not report.passed
    served = report.results[engine].served.model_class
    assert report.problems == [f"{engine} served {served}, which is not dsv3-plugin's model"]
    pair = next(c for c in report.verdicts[0].comparisons if (c.left, c.right) == ("reference", engine))
    # Its embeddings are equal: one module of nine.
    assert pair.different_rows > 0.8 * (pair.different_rows + pair.equal_rows)
    assert "switched off by DSV3_PLUGIN" in (work_dir / "kept" / engine / "log.txt").read_text()
    return served


def cut_short(checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint whose file of tensors lacks its end."""
    shutil.copytree(checkpoint, target)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return target


def predict_logits(checkpoint: Path, token_ids: list[int]) -> torch.Tensor:
    """The reference's logits at every position, fp32 [tokens, vocab_size]."""
    reader = CheckpointReader(checkpoint)
    ops = bind_ops(reader.config, reader.profile(), torch.device("cpu"))
    model = load_model(reader, ops)
    hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), WholeSequences(ops, reader.config))
    return model.lm_head(hidden)


def predict_logprobs(checkpoint: Path, token_ids: list[int]) -> torch.Tensor:
    """log-softmax of the reference's logits at every position, fp32 [tokens, vocab_size]."""
    return torch.log_softmax(predict_logits(checkpoint, token_ids), dim=-1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a server as a user would, who sets no number of threads; yields its address once it answers."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=variables | dict(environment))
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with status {server.returncode}:\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def post(address: str, path: str, body: dict[str, object]) -> dict[str, object]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def get(address: str, path: str) -> dict[str, object]:
    with urllib.request.urlopen(address + path, timeout=120) as answer:
        return json.load(answer)


def refusal(address: str, path: str, body: dict[str, object]) -> str:
    """What a server answers to a request that it refuses."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, path, body)
    assert caught.value.code == 400
    return caught.value.read().decode()
