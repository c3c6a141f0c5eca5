"""The RL loop of examples/rl: a trainer and both servers, which a user started, over HTTP."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command import run_cli
from engines import environments_of, predict_logprobs, warm_command
from engines import warm as in_engine
from megatron_programs import needs_megatron, printed, warm
from megatron_programs import warm_command as warm_trainer
from mini_checkpoint import MINI
from paths import ROOT, SUPPORT
from processes import descendants, is_alive, until

from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.tokenizer import DEEPSEEK_VOCAB
from dsv3_plugin.errors import EngineError, InputError
from dsv3_plugin.profile import ATTENTION_VARIABLE

EXAMPLE = ROOT / "examples" / "rl"
sys.path.insert(0, str(EXAMPLE))

import record  # noqa: E402
import servers as rl  # noqa: E402
from hand_over import Weights  # noqa: E402
from launch import Launch, started  # noqa: E402
from task import Conversation, problems  # noqa: E402

GRPO, SFT, SAMPLE = (EXAMPLE / f"{name}.py" for name in ("grpo", "sft", "sample"))
TWINS, PREPARE = SUPPORT / "rl_twins.py", ROOT / "examples" / "prepare_data.py"
MODULES = "dsv3_plugin.megatron_backend.model", "dsv3_plugin.megatron_backend.weights"
SHORT = "--sft-steps", 2, "--sft-batch-size", 8, "--prompts", 4, "--samples", 2, "--eval-prompts", 0, "--hang-up", 1
UPDATES = int(os.environ.get("DSV3_TEST_UPDATES", "8"))
"""While requests run; 100 take two minutes."""
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rl")
    return [make_checkpoint(read_config(str(EXAMPLE)), folder / str(seed), seed).path for seed in (1, 2)]


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both servers and the trainer, whose imports are done; else skips."""
    commands = {name: warm_command(name) for name in rl.SERVERS} | {"megatron": warm_trainer(MODULES)}
    return environments_of(commands, tmp_path_factory.mktemp("environments"))


@contextmanager
def both_started(model: Path, environments: Path, logs: Path) -> Iterator[list[rl.Server]]:
    launch = Launch(model, on_cpu=True, kv_tokens=4096, environments=environments)
    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(name: str) -> rl.Server:
            return stack.enter_context(started(name, launch, logs / name))

        before = descendants(os.getpid())
        servers = list(threads.map(start, rl.SERVERS))
        started_here = descendants(os.getpid()) - before
        yield servers
    assert len(started_here) > 2 * len(servers)  # keepers, servers, and what these started
    until(lambda: not any(map(is_alive, started_here)), "the servers' end")


@pytest.fixture(scope="module")
def running(
    models: list[Path], environments: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[rl.Server]]:
    with both_started(models[0], environments, tmp_path_factory.mktemp("logs")) as servers:
        yield servers


def at(servers: list[rl.Server], environments: Path) -> list[str]:
    addresses = [f"{server.name}={server.address}" for server in servers]
    return ["--environments", str(environments), "--server", *addresses]


@pytest.fixture(scope="module")
def addresses(running: list[rl.Server], environments: Path) -> list[str]:
    return at(running, environments)


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
def test_weights_out_of_memory(models: list[Path], addresses: list[str], tmp_path: Path) -> None:
    """What vLLM takes out of a card's only, SGLang takes out of a CPU's too. The twin: one tensor of it is stale."""
    arguments = "--server", addresses[-1], "--hand-over", "ipc"
    train(models[0], tmp_path / "run", *arguments, "--steps", 2)
    steps = steps_of(tmp_path / "run")
    assert [step["max_difference"] for step in steps] == [0.0, 0.0] and len({step["weights"] for step in steps}) == 2
    # One folder, for whoever wants the policy.
    assert [path.name for path in (tmp_path / "run" / "weights").iterdir()] == ["2"]
    error, _ = mismatch(BIAS, 1, models[0], tmp_path / "twin", *arguments)
    assert error.endswith(f": sglang does not hold the trainer's weights in 1 of 133 tensors: {BIAS}")


@pytest.mark.parametrize("engine", ["vllm", "vllm-0.27.1"])
def test_vllm_reads_what_it_is_sent_out_of_memory(engine: str, models: list[Path]) -> None:
    """All that needs no card: the calls, their order, and that vLLM's own `ipc` engine finds each tensor as it is."""
    done = in_engine(engine, SUPPORT / "vllm_ipc.py", models[0])
    assert done.returncode == 0, printed(done)[-3000:]
    calls = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    paths = [path for path, *names in calls if path != "/update_weights"]
    starts = "/start_weight_update", "/start_draft_weight_update"
    around = [each for start in starts for each in (start, "/finish_weight_update")]
    assert paths == ["/pause?mode=wait", "/init_weight_transfer_engine", *around, "/resume"]
    target, draft = (calls.index([start]) for start in starts)
    came = [[name for _, *names in part for name in names] for part in (calls[target:draft], calls[draft:])]
    every = [name for name, _ in CheckpointReader(models[0]).tensors()]
    assert came == [every, [name for name in every if name.startswith("model.layers.3.")]]
    assert sum(len(names) > 1 for _, *names in calls) > 3  # several buckets


@needs_megatron
def test_a_cut_run_goes_on(models: list[Path], running: list[rl.Server], addresses: list[str], tmp_path: Path) -> None:
    """From the weights that the servers held and the answers that waited, with equal bits each time. Which tokens
    servers draw beside drafts depends on how they batched them, so no other run has the same answers.
    """
    arguments = *addresses, "--steps", 2, "--one-step-off"
    train(models[0], tmp_path / "cut", *arguments, "--exit-interval", 1)
    done = warm(GRPO, models[0], tmp_path / "cut", *addresses, "--steps", 0, "--resume", modules=MODULES)
    assert done.returncode == 1 and "is at step 1 already, and --steps 0 leaves nothing" in printed(done)
    held = {server.fingerprint().digest for server in running}
    for run, more in ("again", ()), ("parts", ("--micro-batch-size", 3)), ("cut", ()):
        if run != "cut":
            shutil.copytree(tmp_path / "cut", tmp_path / run)
        train(models[0], tmp_path / run, *arguments, "--resume", *more)
    steps = steps_of(tmp_path / "cut")
    assert [step["step"] for step in steps] == [0, 1] and steps == steps_of(tmp_path / "again")
    # Micro-batches add up to the same: all but the last bits of what is summed in parts.
    in_parts = steps_of(tmp_path / "parts")[1]
    assert in_parts == steps[1] | {
        name: pytest.approx(steps[1][name], rel=1e-3) for name in ("gradient_norm", "entropy")
    }
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


def mismatch(twin: str, step: int, model: Path, run: Path, *arguments: object) -> tuple[str, list[str]]:
    """The line that ends a run with a fault in it, and the arguments of the `dsv3` command behind it."""
    done = warm(TWINS, twin, step, model, run, *SHORT, *arguments, modules=MODULES)
    assert done.returncode == 1
    error, command = printed(done).splitlines()[-2:]
    assert error.startswith(f"error: step {step}: ") and command.startswith("to see why: dsv3 diff "), printed(done)[
        -3000:
    ]
    return error, shlex.split(command.removeprefix("to see why: dsv3 "))


def verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """What `dsv3 diff` says at last, which finds a difference."""
    assert run_cli(monkeypatch, *command) == 1
    return capsys.readouterr().out.splitlines()[-1]


@needs_megatron
@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (BIAS, "router biases"),
        ("model.layers.3.eh_proj.weight", "of the MTP layer"),
        ("model.layers.2.mlp.experts.5.down_proj.weight", "of routed experts"),
    ],
)
def test_a_stale_tensor_is_named_in_its_step(
    tensor: str, kind: str, models: list[Path], addresses: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    error, command = mismatch(tensor, 1, models[0], tmp_path / "run", *addresses)
    assert error.endswith(f": vllm does not hold the trainer's weights in 1 of 133 tensors: {tensor}")
    said = verdict(monkeypatch, capsys, command)
    assert said.startswith("DIFFERENT: weights: vllm: 1 of 133 tensors are those of version 0, not 1 (")
    assert run_cli(monkeypatch, *command, "--json") == 1
    weights = json.loads(capsys.readouterr().out)["steps"][1]
    assert weights["says"][1] == f"1 of 133 tensors of version 1 differ, first {tensor}: 1 {kind}"


@needs_megatron
def test_a_forgotten_temperature_is_named_in_its_step(
    models: list[Path], addresses: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    error, command = mismatch("temperature", 1, models[0], tmp_path / "run", *addresses)
    assert " log-probabilities of " in error and error.endswith(
        "'s are log-softmax(logits / temperature); the trainer's are log-softmax(logits), without the temperature"
    )
    said = verdict(monkeypatch, capsys, command)
    assert said.startswith("DIFFERENT: formula: trainer answers log_softmax(logits, the temperature forgotten)")


@needs_megatron
def test_in_two_forms_every_step_agrees(
    models: list[Path], environments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Prompts by heads, answers absorbed. The twin: the trainer forgets where prompts end."""
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")
    with both_started(models[0], environments, tmp_path) as servers:
        assert {server.kernels()["profile"] for server in servers} == {"bf16 two_form"}
        addresses = at(servers, environments)
        train(models[0], tmp_path / "run", *addresses, "--steps", 2)
        error, command = mismatch("prompts", 1, models[0], tmp_path / "twin", *addresses, "--steps", 2)
    steps = steps_of(tmp_path / "run")
    assert [[step["max_difference"], step["ratio_min"], step["ratio_max"]] for step in steps] == [[0.0, 1.0, 1.0]] * 2
    assert " log-probabilities of " in error and error.endswith(
        "'s are log-softmax(logits / temperature); the trainer's are of no known formula"
    )
    said = verdict(monkeypatch, capsys, command)
    assert said.startswith("DIFFERENT: formula: trainer: no known formula gives its numbers")


@needs_megatron
def test_servers_in_another_profile_are_refused(models: list[Path], addresses: list[str], tmp_path: Path) -> None:
    """Before anything is learned or written."""
    done = warm(GRPO, models[0], tmp_path / "run", *SHORT, *addresses, modules=MODULES, DSV3_ATTENTION="two_form")
    assert done.returncode == 1 and printed(done).splitlines()[-1] == (
        f"error: --server {addresses[-2]}: computes in bf16, the trainer in bf16 two_form; start both with the same"
        " dtype, DSV3_ATTENTION and DSV3_REDUCTION_SLICES"
    )
    assert not (tmp_path / "run").exists()


@needs_megatron
def test_a_kernel_of_fast_mode_is_named_in_its_step(
    models: list[Path], addresses: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    site = tmp_path / "site"
    (site / "saboteur-1.0.dist-info").mkdir(parents=True)
    (site / "saboteur-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: saboteur\nVersion: 1.0\n")
    (site / "saboteur-1.0.dist-info" / "entry_points.txt").write_text("[dsv3_plugin]\nsaboteur = saboteur\n")
    (site / "saboteur.py").write_text(
        "from dsv3_plugin.hooks import hookimpl\nfrom wrong_kernel import wrong_kernel\n"
        "@hookimpl\ndef dsv3_kernels():\n    return [wrong_kernel('silu_and_mul')]\n"
    )
    error, command = mismatch(f"kernel:{site}", 0, models[0], tmp_path / "run", *addresses)
    assert error.endswith("'s are of no known formula; the trainer's are log-softmax(logits / temperature)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(SUPPORT), os.environ.get("PYTHONPATH", "")]))
    said = verdict(monkeypatch, capsys, command)
    assert said.startswith("DIFFERENT: layers: operation silu_and_mul in layers.0.mlp is the first to differ ")
    assert run_cli(monkeypatch, "diff", *command[1:3], "--json") == 1
    told = json.loads(capsys.readouterr().out)["about"]
    assert told["settings.mode"] == ["fast", "strict"]
    ours, theirs = told["kernels.silu_and_mul"]
    assert ours.startswith("saboteur 1.0 (") and theirs.startswith("reference ")


@needs_megatron
def test_a_model_teaches_a_judge_and_is_taught_by_it(
    models: list[Path], running: list[rl.Server], addresses: list[str], tmp_path: Path
) -> None:
    """From solved problems by SFT to the served model's right answers and verdicts, to a judge, to RL by it."""

    def done(*command: object) -> str:
        ended = warm(*command, modules=MODULES)
        assert ended.returncode == 0, printed(ended)[-3000:]
        return ended.stdout

    def read(name: str) -> list[Conversation]:
        return [Conversation.parse(json.loads(line)) for line in (tmp_path / name).read_text().splitlines()]

    solved = [problem.solved().record() for problem in problems("sort", 320, "test")]
    (tmp_path / "solved.jsonl").write_text("".join(json.dumps(each) + "\n" for each in solved))
    policy, judge = tmp_path / "policy", tmp_path / "judge"
    said = done(SFT, models[0], tmp_path / "solved.jsonl", policy, "--batch-size", 32)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert len(losses) == 20 and losses[-1] < 0.3 * losses[0]
    for server in running:
        server.update(policy, "0")
    asked = {problem.prompt: problem for problem in problems("sort", 64, 1234, "sample")}
    for name, more in ("right.jsonl", ()), ("verdicts.jsonl", ("--judge",)):
        done(SAMPLE, policy, tmp_path / name, *addresses, "--samples", 4, *more)
    right, verdicts = read("right.jsonl"), read("verdicts.jsonl")
    assert len(right) > 4 and all(asked[each.user].answer == each.assistant for each in right)
    marks = [each.assistant for each in verdicts]
    assert len(marks) > 4 and marks.count("+") == marks.count("-") == len(marks) / 2
    for prompt, _, answer in (each.user.partition("=") for each in verdicts):
        problem = asked[f"{prompt}="]
        assert problem.verdict(answer) in verdicts

    # Megatron's own training loop reads them, too.
    tokenizer = tmp_path / "tokenizer"
    make_checkpoint(MINI | {"vocab_size": DEEPSEEK_VOCAB}, tokenizer, 1)
    said = done(PREPARE, "sft", tokenizer, tmp_path / "right.jsonl", "--output", tmp_path / "data", "--longest", 64)
    assert f"{len(right)} documents, " in said

    done(SFT, policy, tmp_path / "verdicts.jsonl", judge, "--epochs", 1, "--batch-size", 16)
    graded = "--reward", "rule", "model", "--reward-model", judge, "--kl-coefficient", 0.001
    more = "--mini-batches", 2, "--reference-interval", 2, "--steps", 2, *graded
    train(policy, tmp_path / "run", *addresses, *more)
    steps = steps_of(tmp_path / "run")
    assert [step["max_difference"] for step in steps] == [0.0, 0.0]
    assert all(step["reward"] % 1 and 0 < step["reward"] < 2 for step in steps)
    # The second of two optimizer steps is measured to the policy before the first, which is the reference.
    assert all(step["kl_to_reference"] > 0 for step in steps)
    assert sorted(path.name for path in (tmp_path / "run" / "weights").iterdir()) == ["2"]


@needs_megatron
def test_a_recipe_gives_defaults(models: list[Path], tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import grpo; print(vars(grpo.parse_arguments()))"
    done = warm("-c", code, EXAMPLE, models[0], tmp_path, "--recipe", "r1-first", "--prompts", 8, modules=MODULES)
    for expected in ("'lr': 3e-06", "'clip_ratio': 10.0", "'samples': 16", "'prompts': 8", "'kl_coefficient': 0.001"):
        assert expected in done.stdout


@needs_megatron
def test_what_cannot_work_is_one_line(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (broken := tmp_path / "broken" / "checkpoints" / "00001" / "progress.json").parent.mkdir(parents=True)
    broken.write_text('{"step"')
    for arguments, expected in (
        ((tmp_path,), "is not empty, and nothing is overwritten; --resume continues a run"),
        ((tmp_path / "mine",), "mine: is no folder; name one for the run"),
        ((tmp_path / "c", "--reward", "model", "--reward-model", tmp_path / "judge"), "judge: no such folder"),
        ((tmp_path / "a", "--server", "trt"), "--server trt: not one of vllm, sglang"),
        ((tmp_path / "b", "--resume"), "holds no checkpoint to resume from"),
        ((tmp_path / "broken", "--resume"), "progress.json: does not say where the run is: "),
        ((tmp_path / "c", "--reward", "model"), "--reward model and --reward-model FOLDER go together"),
        ((tmp_path / "d", "--hand-over", "ipc"), "--hand-over ipc: vLLM takes weights out of a card's memory only"),
        (
            (tmp_path / "e", "--hand-over", "ipc", "--server", "sglang=http://10.0.0.2:30000"),
            "--hand-over ipc: sglang at http://10.0.0.2:30000 is not on this host",
        ),
        ((tmp_path / "f", "--server", "vllm=127.0.0.1:9"), "none answers there; write vllm=http://HOST:PORT"),
        ((tmp_path / "g", "--server", "vllm=http://127.0.0.1:9"), "vllm=http://127.0.0.1:9: none answers there"),
        ((tmp_path / "h", "--plot", "plot.pdf"), "--plot plot.pdf: name a file that ends in .svg or .png"),
        ((tmp_path / "h", "--plot", "/proc/plot.svg"), "--plot /proc/plot.svg: cannot be written: No such file"),
        ((tmp_path / "h", "--environments", "/nope"), "--environments /nope: no such folder"),
        ((tmp_path / "h", "--environments", tmp_path), "lacks vllm or dsv3_plugin; --environments names a folder with"),
        ((tmp_path / "h", "--mini-batches", 9, "--prompts", 2, "--samples", 4), "-batches 9: a step has 8 answers"),
    ):
        done = warm(GRPO, models[0], *arguments, modules=MODULES)
        assert done.returncode == 1
        line = printed(done).splitlines()[-1]
        assert line.startswith("error: ") and expected in line, printed(done)[-3000:]
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    done = warm(SFT, models[0], tmp_path / "latin.jsonl", tmp_path / "policy", modules=MODULES)
    assert done.returncode == 1 and "latin.jsonl: cannot be read: 'utf-8' codec" in printed(done).splitlines()[-1]
    for content, says in (
        (5, "bad.jsonl:1: is no JSON object with 'messages' of one user and one assistant, each a text"),
        ("\ud800", "bad.jsonl:1: is no JSON object with 'messages' of one user and one assistant, each a text"),
        ("1" * 9000, "bad.jsonl:1: 9,003 tokens; the model knows "),
    ):
        roles = {"role": "user", "content": content}, {"role": "assistant", "content": "1"}
        (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": roles}))
        done = warm(SFT, models[0], tmp_path / "bad.jsonl", tmp_path / "policy", modules=MODULES)
        assert done.returncode == 1 and says in printed(done).splitlines()[-1]
    done = warm(SFT, models[0], tmp_path / "bad.jsonl", tmp_path / "bad.jsonl" / "policy", modules=MODULES)
    assert done.returncode == 1 and "policy: cannot be written: Not a directory" in printed(done).splitlines()[-1]
    solved = [json.dumps(problem.solved().record()) for problem in problems("sort", 4, "test")]
    (tmp_path / "solved.jsonl").write_text("\n".join(solved))
    diverges = "--lr", 1e30, "--batch-size", 1, "--clip-grad", 0
    done = warm(SFT, models[0], tmp_path / "solved.jsonl", tmp_path / "policy", *diverges, modules=MODULES)
    assert done.returncode == 1 and "error: the gradients' norm is nan" in printed(done).splitlines()[-1]
    assert not (tmp_path / "policy").exists()
    for name in "micro-batch-size", "mini-batches", "inner-updates":
        done = warm(GRPO, models[0], tmp_path / "i", f"--{name}", 0, modules=MODULES)
        assert done.returncode == 2 and printed(done).endswith(f"argument --{name}: 0: at least 1\n")
    for name, value, says in (
        ("temperature", "0", "above zero, and finite"),
        ("lr", "nan", "above zero, and finite"),
        ("steps", "-1", "at least 0"),
        ("save-interval", "-1", "at least 0"),
        ("clip-ratio", "nan", "zero or above, and finite"),
        ("kl-coefficient", "inf", "zero or above, and finite"),
        ("clip-grad", "nan", "zero or above, and finite"),
        ("moe-router-bias-update-rate", "nan", "zero or above, and finite"),
        ("mtp-loss-scaling-factor", "-1", "zero or above, and finite"),
        ("seed", "-1", "from 0 to 4294967295"),
    ):
        done = warm(GRPO, models[0], tmp_path / "i", f"--{name}={value}", modules=MODULES)
        assert done.returncode == 2 and printed(done).endswith(f"argument --{name}: {value}: {says}\n")
    for name in "clip-grad", "moe-router-bias-update-rate", "mtp-loss-scaling-factor":
        done = warm(SFT, models[0], tmp_path / "data", tmp_path / "policy", f"--{name}=nan", modules=MODULES)
        assert done.returncode == 2 and f"argument --{name}: nan: zero or above" in printed(done)
    done = warm(SAMPLE, models[0], tmp_path / "out", "--seed=-1", modules=MODULES)
    assert done.returncode == 2 and printed(done).endswith("argument --seed: -1: from 0 to 4294967295\n")


@needs_megatron
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("out", "--server", "trt"), "error: --server trt: not one of vllm, sglang"),
        (("none/out",), "none/out: there is no folder none"),
        (("out", "--environments", "/nope"), "error: --environments /nope: no such folder"),
        (("out", "--server", "vllm=http://127.0.0.1:9"), "vllm=http://127.0.0.1:9: none answers there"),
        (("out", "--prompts", "0"), "argument --prompts: 0: at least 1"),
    ],
)
def test_samples_that_cannot_be_drawn(models: list[Path], arguments: tuple[str, ...], expected: str) -> None:
    done = warm(SAMPLE, models[0], *arguments, modules=MODULES)
    assert done.returncode and expected in printed(done).splitlines()[-1]


def test_what_a_killed_run_recorded_is_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert record.steps(tmp_path) == [{"step": 0}, {"step": 1}]
    record.forget_from(tmp_path, 1)
    assert file.read_text() == '{"step": 0}\n' and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    file.write_text('{"step": 0}\nx\n{"step": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: is no step of a run"):
        record.steps(tmp_path)


def test_servers_start_with_what_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(tmp_path, on_cpu=False, kv_tokens=640, environments=tmp_path, options={"sglang": ["--more", "1"]})
    for stock in False, True:
        launch = replace(launch, stock=stock)
        line = launch.command("sglang", 8000)
        assert line[-2:] == ["--more", "1"] and "--device" not in line
        assert ("dsv3" in line) is (launch.environment().get("DSV3_PLUGIN") != "off") is not stock
        monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")
        assert ("--disable-radix-cache" in launch.command("sglang", 8000)) is not stock
        monkeypatch.delenv(ATTENTION_VARIABLE)
        assert "--disable-radix-cache" not in line
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in launch.environment() and "--weight-transfer-config" not in line
    launch = replace(launch, from_memory=True)
    line = launch.command("vllm", 8000)
    assert line[line.index("--weight-transfer-config") + 1] == '{"backend": "ipc"}'
    assert launch.environment()["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    for name in "vllm", "sglang":  # of a vLLM that lacks what it is asked for
        with pytest.raises(EngineError, match=f"lacks {name};"):
            launch.require(name)
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\necho True\n")
        python.chmod(0o755)
    launch.require("sglang")
    replace(launch, from_memory=False).require("vllm")
    with pytest.raises(EngineError, match="pip install ray"):
        launch.require("vllm")
    assert line[line.index("--block-size") + 1 :][:3] == ["64", "--num-gpu-blocks-override", "10"]


@cache
def predicted(model: Path, token_ids: tuple[int, ...]) -> Any:
    return predict_logprobs(model, list(token_ids))


def made(answer: rl.Answer, prompt: list[int], model: Path) -> bool:
    """Whether a model gives an answer's tokens these log-probabilities."""
    rows = predicted(model, (*prompt, *answer.token_ids))[len(prompt) - 1 : -1]
    return answer.logprobs == [row[token].item() for row, token in zip(rows, answer.token_ids, strict=True)]


@pytest.mark.parametrize(("name", "way"), [("vllm", "files"), ("sglang", "files"), ("sglang", "memory")])
def test_updates_under_requests_lose_and_mix_none(
    name: str, way: str, running: list[rl.Server], models: list[Path]
) -> None:
    (server,) = (server for server in running if server.name == name)
    prompts = [[0, *range(20 + i, 26 + i)] for i in range(4)]
    ended = threading.Event()

    def update(version: int) -> None:
        model = models[version % 2]
        if way == "files":
            server.update(model, str(version))
        else:
            server.update_from_memory(
                Weights(CheckpointReader(model).tensors, None, bucket_bytes=1 << 20), str(version)
            )

    def ask(i: int) -> list[rl.Answer]:
        answers: list[rl.Answer] = []
        while not ended.is_set():
            request = rl.Request(prompts[i], 1.0, 6, seed=len(answers) % 8, n=2, ignore_eos=True)
            answers += server.answers(request)
        return answers

    update(0)
    with ThreadPoolExecutor() as threads:
        asking = [threads.submit(ask, i) for i in range(len(prompts))]
        try:
            for version in range(1, UPDATES + 1):
                update(version)
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
