"""The RL loop of examples/rl: a trainer and both servers, which a user started, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engines import predict_logprobs, python_of
from megatron_programs import needs_megatron, printed, warm
from paths import ROOT, SUPPORT

from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config

EXAMPLE = ROOT / "examples" / "rl"
sys.path.insert(0, str(EXAMPLE))

import servers as rl  # noqa: E402

GRPO, TWINS = EXAMPLE / "grpo.py", SUPPORT / "rl_twins.py"
MODULES = "dsv3_plugin.megatron_backend.model", "dsv3_plugin.megatron_backend.weights"
SHORT = "--sft-steps", 2, "--sft-batch-size", 8, "--prompts", 4, "--samples", 2, "--eval-prompts", 0, "--hang-up", 1
UPDATES = int(os.environ.get("DSV3_TEST_UPDATES", "20"))
"""While requests run; 100 take four minutes."""
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rl")
    return [make_checkpoint(read_config(str(EXAMPLE)), folder / str(seed), seed).path for seed in (1, 2)]


@pytest.fixture(scope="module")
def started(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[rl.Server]]:
    python_of("vllm"), python_of("sglang")  # else skips
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(name: str) -> rl.Server:
            return stack.enter_context(rl.started(name, models[0], logs / f"{name}.log", kv_tokens=4096, on_cpu=True))

        yield list(threads.map(start, rl.SERVERS))


@pytest.fixture(scope="module")
def addresses(started: list[rl.Server]) -> list[str]:
    return ["--server", *(f"{server.name}={server.address}" for server in started)]


def steps_of(run: Path) -> Steps:
    """Without what no two runs share."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: step[name] for name in step.keys() - {"seconds", "tokens", *rl.COUNTED}} for step in steps]


def train(model: Path, run: Path, *arguments: object) -> str:
    done = warm(GRPO, model, run, *SHORT, *arguments, modules=MODULES)
    assert done.returncode == 0, printed(done)[-3000:]
    return done.stdout


@needs_megatron
def test_every_step_agrees(models: list[Path], addresses: list[str], tmp_path: Path) -> None:
    said = train(models[0], tmp_path / "run", *addresses, "--steps", 3, "--plot", tmp_path / "plot.svg")
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2] and said.count("max |difference| 0.0, ratios 1.0 to 1.0") == 3
    for step in steps:
        assert [step["max_difference"], step["ratio_min"], step["ratio_max"]] == [0.0, 1.0, 1.0]
        assert [step["versions"], step["aborted"]] == [[step["step"]], 2]
    assert len({step["weights"] for step in steps}) == 3
    assert (tmp_path / "plot.svg").stat().st_size > 1000


@needs_megatron
def test_a_cut_run_goes_on(models: list[Path], started: list[rl.Server], addresses: list[str], tmp_path: Path) -> None:
    """From the weights that the servers held and the answers that waited, with equal bits each time. Which tokens
    servers draw beside drafts depends on how they batched them, so no other run has the same answers.
    """
    arguments = *addresses, "--steps", 2, "--one-step-off"
    train(models[0], tmp_path / "cut", *arguments, "--exit-interval", 1)
    held = {server.fingerprint().digest for server in started}
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    for run in "cut", "again":
        train(models[0], tmp_path / run, *arguments, "--resume")
    steps = steps_of(tmp_path / "cut")
    assert [step["step"] for step in steps] == [0, 1] and steps == steps_of(tmp_path / "again")
    # The twin: the weights of the first step are others.
    assert {steps[1]["weights"]} == held != {steps[0]["weights"]}


@needs_megatron
def test_one_step_off_each_answer_is_compared_under_the_weights_that_made_it(
    models: list[Path], addresses: list[str], tmp_path: Path
) -> None:
    """With several updates a step, and a divergence from the first model."""
    more = "--one-step-off", "--inner-updates", 2, "--kl-coefficient", 0.1
    arguments = *addresses, "--steps", 3, *more
    train(models[0], tmp_path / "whole", *arguments)
    whole = steps_of(tmp_path / "whole")
    assert [step["versions"] for step in whole] == [[0], [0], [1]]
    assert [step["max_difference"] for step in whole] == [0.0] * 3
    # Other weights learn from them than made them, and that is seen.
    assert [step["ratio_min"] == step["ratio_max"] == 1.0 for step in whole] == [True, False, False]
    assert all(step["kl_to_reference"] > 0 for step in whole)


@needs_megatron
@pytest.mark.parametrize(
    "tensor", [BIAS, "model.layers.3.eh_proj.weight", "model.layers.2.mlp.experts.5.down_proj.weight"]
)
def test_a_stale_tensor_is_named_in_its_step(
    tensor: str, models: list[Path], addresses: list[str], tmp_path: Path
) -> None:
    done = warm(TWINS, tensor, 1, models[0], tmp_path / "run", *SHORT, *addresses, modules=MODULES)
    assert done.returncode == 1
    expected = f"error: step 1: vllm does not hold the trainer's weights in 1 of 133 tensors: {tensor}"
    assert printed(done).splitlines()[-1] == expected, printed(done)[-3000:]


@needs_megatron
def test_a_forgotten_temperature_is_named_in_its_step(models: list[Path], addresses: list[str], tmp_path: Path) -> None:
    done = warm(TWINS, "temperature", 1, models[0], tmp_path / "run", *SHORT, *addresses, modules=MODULES)
    assert done.returncode == 1
    said = printed(done).splitlines()[-1]
    assert said.startswith("error: step 1: ") and " log-probabilities of " in said, printed(done)[-3000:]
    assert said.endswith(
        "'s are log-softmax(logits / temperature); the trainer's are log-softmax(logits), without the temperature"
    )


@needs_megatron
def test_what_cannot_work_is_one_line(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    for arguments, expected in (
        ((tmp_path,), "is not empty, and nothing is overwritten; --resume continues a run"),
        ((tmp_path / "a", "--server", "trt"), "--server trt: not one of vllm, sglang"),
        ((tmp_path / "b", "--resume"), "holds no checkpoint to resume from"),
    ):
        done = warm(GRPO, models[0], *arguments, modules=MODULES)
        assert done.returncode == 1
        line = printed(done).splitlines()[-1]
        assert line.startswith("error: ") and expected in line, printed(done)[-3000:]


@cache
def predicted(model: Path, token_ids: tuple[int, ...]) -> Any:
    return predict_logprobs(model, list(token_ids))


def made(answer: rl.Answer, prompt: list[int], model: Path) -> bool:
    """Whether a model gives an answer's tokens these log-probabilities."""
    rows = predicted(model, (*prompt, *answer.token_ids))[len(prompt) - 1 : -1]
    return answer.logprobs == [row[token].item() for row, token in zip(rows, answer.token_ids, strict=True)]


@pytest.mark.parametrize("name", rl.SERVERS)
def test_updates_under_requests_lose_and_mix_none(name: str, started: list[rl.Server], models: list[Path]) -> None:
    (server,) = (server for server in started if server.name == name)
    prompts = [[0, *range(20 + i, 26 + i)] for i in range(4)]
    ended = threading.Event()

    def ask(i: int) -> list[rl.Answer]:
        answers: list[rl.Answer] = []
        while not ended.is_set():
            request = rl.Request(prompts[i], 1.0, 6, seed=len(answers) % 8, n=2, ignore_eos=True)
            answers += server.answers(request)
        return answers

    server.update(models[0], "0")
    with ThreadPoolExecutor() as threads:
        asking = [threads.submit(ask, i) for i in range(len(prompts))]
        try:
            for version in range(1, UPDATES + 1):
                server.update(models[version % 2], str(version))
        finally:
            ended.set()
        answered = [future.result() for future in asking]
    versions = {int(answer.version) for answers in answered for answer in answers}
    assert len(versions) > UPDATES // 2 and versions <= set(range(UPDATES + 1))
    for prompt, answers in zip(prompts, answered, strict=True):
        for answer in answers:
            assert len(answer.token_ids) == len(answer.logprobs) == 6 and answer.finish_reason == "length"
            right, other = (models[(int(answer.version) + i) % 2] for i in range(2))
            assert made(answer, prompt, right) and not made(answer, prompt, other)
