"""vLLM on several ranks: the bits of one, in real engines."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from engines import (
    REFERENCE,
    free_port,
    post,
    predict_logprobs,
    ran_as_one_rank,
    run,
    serving,
    warm,
    warm_command,
    warm_testee,
)
from paths import SUPPORT
from typer.testing import CliRunner

from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands.cli import app
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.layouts import ParallelLayout


def watched(environment: str, layout: str) -> runner.TesteeCommand:
    return warm_testee(environment, str(SUPPORT / "watched_vllm.py")).on(ParallelLayout.parse(layout))


def reads(work_dir: Path, layout: str) -> list[dict[str, Any]]:
    """What each rank's last engine read."""
    folder = work_dir / "kept" / f"vllm {layout}"
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*/reads.json"))]


@pytest.mark.parametrize(
    ("environment", "layout", "dtype", "slices"),
    [
        ("vllm", "dp=2,ep=2", "fp8", "1"),
        ("vllm", "tp=2", "bf16", "2"),
        ("vllm", "pp=2", "bf16", "1"),
        ("vllm-0.27.1", "dp=2,ep=2", "bf16", "1"),
    ],
)
def test_a_layout_has_the_bits_of_one_rank(
    tiny_checkpoint, tmp_path: Path, monkeypatch, environment: str, layout: str, dtype: str, slices: str
) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", slices)
    checkpoint = tiny_checkpoint(dtype)
    if environment != "vllm":  # one start of its engines: drafts
        ran_as_one_rank(watched(environment, layout), checkpoint, tmp_path, "", ["mtp_2"])
        return
    ran_as_one_rank(watched(environment, layout), checkpoint, tmp_path, "no drafter on the first")

    whole = len(list(CheckpointReader(checkpoint).headers()))
    for rank in reads(tmp_path, layout):
        # vLLM's own loader is asked for one tensor, so that it looks at the files.
        assert len(rank["theirs"]) <= 2, rank["theirs"]
        assert len(rank["ours"]) < whole
        assert rank["numbers"] >= rank["held"]


def test_experts_in_another_order_are_caught_and_named(tiny_checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WATCHED_VLLM", "combine")
    testee = watched("vllm", "dp=2,ep=2")
    report = run([REFERENCE, testee], tiny_checkpoint("fp32"), tmp_path, "batch")
    assert not report.passed
    pair = report.verdicts[0].between("reference", testee.name)
    assert pair is not None and pair.first_difference is not None
    assert pair.first_difference.stream == "layers.1.mlp"


def test_rows_that_another_engine_left_are_answered_from(tiny_checkpoint, tmp_path: Path) -> None:
    """Prefill in one engine, decode in another: the same raw logits, and one bit of a row changed is seen."""
    settings = {"VLLM_MLA_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = warm("vllm", SUPPORT / "vllm_connector.py", tiny_checkpoint("bf16"), tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    told: dict[str, Any] = {name: engine for line in lines for name, engine in json.loads(line).items()}
    for drafts in 0, 1:
        alone, stores, finds = (told[f"{what} {drafts}"] for what in ("alone", "stores", "finds"))
        assert alone["digests"] == stores["digests"] == finds["digests"]
        assert alone["tokens"] == finds["tokens"]
        # Two pages of 16 tokens were found of a prompt of 45.
        assert (stores["passes"][0], finds["passes"][0]) == (45, 13)
    assert told["finds others"]["passes"][0] == 13
    assert told["finds others"]["digests"] != told["alone 0"]["digests"]


class Server:
    """`vllm serve` on several ranks, with the calls of its development mode."""

    def __init__(self, address: str, checkpoint: Path) -> None:
        self.address = address
        self.model = str(checkpoint)

    def answers_as(self, checkpoint: Path) -> bool:
        """Whether tokens and their log-probabilities are those of one rank that has this checkpoint."""
        prompt = list(range(300, 340))
        body = {"model": self.model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer: dict[str, Any] = post(self.address, "/v1/completions", body)
        (choice,) = answer["choices"]
        tokens = choice["token_ids"]
        rows = predict_logprobs(checkpoint, prompt + tokens)[len(prompt) - 1 : -1]
        best = rows.max(-1)
        return tokens == best.indices.tolist() and choice["logprobs"]["token_logprobs"] == best.values.tolist()

    def holds(self, checkpoint: Path) -> bool:
        """Whether the fingerprint of all its ranks is the checkpoint's."""
        return CliRunner().invoke(app, ["fingerprint", self.address, str(checkpoint)]).exit_code == 0

    def is_there(self) -> bool:
        """Whether it answers a request, with an error too."""
        try:
            post(self.address, "/v1/completions", {"model": self.model, "prompt": [5], "max_tokens": 1})
        except HTTPError:
            return True
        except OSError:
            return False
        return True

    def call(self, method: str, **kwargs: Any) -> list[Any]:
        """What each worker returns."""
        answer: dict[str, Any] = post(self.address, "/collective_rpc", {"method": method, "kwargs": kwargs})
        return answer["results"]


def test_a_server_on_two_ranks(tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, takes new weights on all ranks, tells what they hold, and ends when one of them dies."""
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    checkpoint, port, log = tiny_checkpoint("bf16"), free_port(), tmp_path / "serve.log"
    other = tmp_path / "other"
    make_checkpoint(read_config("tiny"), other, 2, dtype=CheckpointDtype("bf16"))
    command = [*warm_command("vllm", "-m", "vllm.entrypoints.cli.main"), "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--tensor-parallel-size", "2"]
    command += ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serving(command, port, log, settings) as address:
        server = Server(address, checkpoint)
        assert server.answers_as(checkpoint) and server.holds(checkpoint) and not server.holds(other)
        one, two = (answer["tensors"] for answer in server.call("dsv3_fingerprint"))
        whole = fingerprint_of_checkpoint(CheckpointReader(checkpoint)).tensors
        # Each answers for all but the other's experts.
        assert one.items() < whole.items() and one | two == whole

        server.call("reload_weights", weights_path=str(other))
        assert server.answers_as(other) and server.holds(other)

        found = re.search(r"\(Worker_TP1 pid=(\d+)\)", log.read_text())
        assert found is not None
        # As the system ends one that wants too much memory.
        os.kill(int(found[1]), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.is_there():
            assert time.monotonic() < deadline
    assert re.search(r"Worker proc VllmWorker-\d died unexpectedly", log.read_text())


PAUSE_PROGRAM = """
from types import SimpleNamespace
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore
from dsv3_plugin.vllm_backend import engine, worker

updates = [1]


def collective_rpc(method, *args, **kwargs):
    if method in ("reload_weights", write):
        updates[0] += 1
    return [worker.Weights(list(updates), None)]


def write(worker):
    pass


def told(size, state, method):
    updates[0] = 1
    core = SimpleNamespace(
        dsv3_weights=None,
        model_executor=SimpleNamespace(collective_rpc=collective_rpc),
        reset_prefix_cache=lambda **kwargs: None,
        scheduler=SimpleNamespace(pause_state=state),
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=size)),
    )
    try:
        EngineCore.collective_rpc(core, method)
        return updates[0]
    except Exception as error:
        return f"{updates[0]} {type(error).__name__}: {error}"


engine.install()
for size, state in (1, PauseState.UNPAUSED), (2, PauseState.PAUSED_ALL), (2, PauseState.UNPAUSED):
    for method in "dsv3_fingerprint", "reload_weights", write:
        print("TOLD", told(size, state, method))
"""


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.27.1"])
def test_weights_change_while_data_parallel_engines_pause(environment: str) -> None:
    """Another engine's request may need this one's experts. A trainer's function is known by what it did."""
    done = warm(environment, "-c", PAUSE_PROGRAM)
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert told[:7] == ["1", "2", "2", "1", "2", "2", "1"]
    refusal = "EngineError: weights may not change while data-parallel engines, which use each other's experts, run"
    assert told[7].startswith(f"1 {refusal}") and told[8].startswith(f"2 {refusal}")
