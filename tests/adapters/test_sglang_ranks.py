"""SGLang on several ranks: the bits of one, in real engines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import (
    REFERENCE,
    cut_short,
    free_port,
    get,
    post,
    predict_logprobs,
    python_of,
    ran_as_one_rank,
    refusal,
    run,
    serving,
    warm,
    warm_command,
    warm_testee,
)
from paths import SUPPORT
from processes import descendants
from typer.testing import CliRunner

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands.cli import app
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.errors import ConformanceError

PROMPT = list(range(300, 340))


def drafts_as_on_a_card(environment: str, layout: str) -> runner.TesteeCommand:
    return warm_testee(environment, str(SUPPORT / "drafts_in_sglang.py")).on(ParallelLayout.parse(layout))


@pytest.mark.parametrize(
    ("environment", "layout", "dtype", "slices"),
    [
        ("sglang", "dp=2,ep=2", "fp8", "1"),
        ("sglang", "tp=2", "bf16", "2"),
        ("sglang", "pp=2", "bf16", "1"),
        ("sglang-0.5.17", "dp=2,ep=2", "bf16", "1"),
        ("sglang-0.5.23", "dp=2,ep=2", "bf16", "1"),
    ],
)
def test_a_layout_has_the_bits_of_one_rank(
    tiny_checkpoint, tmp_path: Path, monkeypatch, environment: str, layout: str, dtype: str, slices: str
) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", slices)
    testee = drafts_as_on_a_card(environment, layout)
    ran_as_one_rank(testee, tiny_checkpoint(dtype), tmp_path, "no drafts for a model in stages")


def test_padding_in_the_drafts_of_a_rank_without_requests_is_caught(
    tiny_checkpoint, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("DRAFTS_IN_SGLANG", "padded")
    testee = drafts_as_on_a_card("sglang-0.5.17", "dp=2,ep=2")
    with pytest.raises(ConformanceError, match="failed with status 1"):
        run([REFERENCE, testee], tiny_checkpoint("bf16"), tmp_path, "mtp_2")
    log = (tmp_path / "kept" / testee.name / "log.txt").read_text()
    assert "assert positions.shape[0] == next_token_logits.shape[0]" in log


def moves_experts(layout: str) -> runner.TesteeCommand:
    return warm_testee("sglang", str(SUPPORT / "watched_sglang.py")).on(ParallelLayout.parse(layout))


def test_experts_that_sglang_moves_change_no_bit(tiny_checkpoint, tmp_path: Path) -> None:
    testee = moves_experts("dp=2,ep=2")
    ran_as_one_rank(testee, tiny_checkpoint("fp8"), tmp_path, "")
    files = (tmp_path / "kept" / testee.name).glob("rank-*/experts.json")
    first, second = (json.loads(file.read_text()) for file in files)
    assert first == second and len(first) > 2
    # Of 20 slots; the first of the four layers is dense.
    assert all(set(experts) == set(range(16)) and len(experts) == 20 for layers in first for experts in layers[1:])


def test_rows_that_go_where_an_expert_was_are_caught(tiny_checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WATCHED_SGLANG", "maps")
    testee = moves_experts("dp=2,ep=2")
    report = run([REFERENCE, testee], tiny_checkpoint("bf16"), tmp_path, "prefix_cache_chunked")
    assert not report.passed
    pair = report.verdicts[0].between("reference", testee.name)
    assert pair is not None and pair.first_difference is not None
    assert re.fullmatch(r"layers\.\d\.mlp", pair.first_difference.stream)


def server(checkpoint: Path, port: int, *arguments: str) -> list[str]:
    """The command of an SGLang server on a CPU."""
    command = [*warm_command("sglang", "-m", "sglang.launch_server"), "--model-path", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    command += ["--attention-backend", "dsv3", "--disable-cuda-graph", "--enable-deterministic-inference"]
    command += ["--context-length", "256", "--max-total-tokens", "2048", "--max-running-requests", "8"]
    command += ["--sleep-on-idle"]
    return [*command, *arguments]


def predicted(checkpoint: Path, prompt: list[int], answer: dict[str, Any]) -> bool:
    """Whether an answer's tokens, and the log-probabilities of the best 128 for each, are one rank's."""
    tokens, meta = answer["output_ids"], answer["meta_info"]
    rows = predict_logprobs(checkpoint, prompt + tokens)[len(prompt) - 1 : -1]
    best = [[item[0] for item in items] for items in meta["output_top_logprobs"]]
    return len(tokens) == 6 and rows.argmax(-1).tolist() == tokens and best == rows.topk(128).values.tolist()


def ask(address: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 128}
    return post(address, "/generate", body | more)


def is_there(address: str) -> bool:
    """Whether the server accepts a connection."""
    try:
        get(address, "/health")
    except OSError as error:
        return "refused" not in str(error)
    return True


def process_of(title: str) -> int:
    """The process of that title which comes from this one."""
    for pid in descendants(os.getpid()):
        with suppress(OSError):  # it has ended
            if title in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    raise AssertionError(f"no {title}")


def test_a_server_on_ranks_and_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, takes new weights on all ranks, tells what they hold, and ends when one of them dies."""
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    port, log = free_port(), tmp_path / "serve.log"
    main, other = tmp_path / "main", tmp_path / "other"
    config = read_config("tiny") | {"num_nextn_predict_layers": 0}
    for seed, path in (1, main), (2, other):
        make_checkpoint(config, path, seed, dtype=CheckpointDtype("bf16"))
    with serving(server(main, port, "--tp", "2", "--pp-size", "2"), port, log, {}) as address:
        with ThreadPoolExecutor(2) as threads:
            prompts = [PROMPT, PROMPT[:7]]
            for prompt, answer in zip(prompts, threads.map(lambda p: ask(address, p), prompts), strict=True):
                assert predicted(main, prompt, answer)
        same = CliRunner().invoke(app, ["fingerprint", address, str(main)])
        assert same.exit_code == 0, same.output
        assert CliRunner().invoke(app, ["fingerprint", address, str(other)]).exit_code == 1
        # An expert of the other rank, and one that both hold a part of.
        tensors = dict(CheckpointReader(main).tensors())
        for name in "model.layers.1.mlp.experts.15.up_proj.weight", "model.layers.0.self_attn.o_proj.weight":
            held = post(address, "/get_weights_by_name", {"name": name, "truncate_size": 3})
            assert held == tensors[name][:3].float().tolist()

        broken = cut_short(other, tmp_path / "broken")
        assert "truncated" in refusal(address, "/update_weights_from_disk", {"model_path": str(broken)})
        assert predicted(main, PROMPT, ask(address, PROMPT))
        post(address, "/update_weights_from_disk", {"model_path": str(other)})
        assert predicted(other, PROMPT, ask(address, PROMPT))
        assert CliRunner().invoke(app, ["fingerprint", address, str(other)]).exit_code == 0

        # As the system ends one that wants too much memory.
        os.kill(process_of("scheduler_PP1_TP1"), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while is_there(address):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert re.search(r"Connection (closed|reset) by peer", log.read_text())
    assert "one child failed" in log.read_text()


def test_what_prefill_computed_is_answered_from(tiny_checkpoint, tmp_path: Path) -> None:
    """Prefill in one server, decode in another, latent rows between them over Mooncake's TCP."""
    found = subprocess.run(
        [python_of("sglang"), "-c", "import mooncake.engine, prometheus_client"], capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip(f"not run without mooncake-transfer-engine-non-cuda: {found.stderr.splitlines()[-1]}")
    checkpoint, meeting = tiny_checkpoint("bf16"), free_port()
    apart = ["--disaggregation-transfer-backend", "mooncake_tcp", "--disaggregation-bootstrap-port", str(meeting)]
    apart += ["--disable-overlap-schedule", "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1"]
    apart += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"]

    def start(mode: str) -> str:
        port = free_port()
        command = server(checkpoint, port, "--disaggregation-mode", mode, *apart)
        return servers.enter_context(serving(command, port, tmp_path / f"{mode}.log", {}))

    with ExitStack() as servers, ThreadPoolExecutor() as threads:
        addresses = list(threads.map(start, ("prefill", "decode")))
        for room, prompt in enumerate((PROMPT, PROMPT[:13], PROMPT), 1):
            place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": meeting, "bootstrap_room": room}
            first, whole = threads.map(partial(ask, prompt=prompt, **place), addresses)
            assert first["output_ids"] == whole["output_ids"][:1]
            assert predicted(checkpoint, prompt, whole)
    assert "Prefill batch" not in (tmp_path / "decode.log").read_text()


@pytest.mark.parametrize("environment", ["sglang-0.5.17", "sglang", "sglang-0.5.23"])
def test_sglang_s_all_reduce_is_built_outside_sglang(environment: str) -> None:
    program = SUPPORT / "all_reduce_in_sglang.py"
    assert warm(environment, program).stdout.splitlines()[-1] == "[[2.0, 2.0], None]"
    said = warm(environment, program, "without").stdout
    assert re.search(r"^\w+Error: .*world.group", said.splitlines()[-1])
