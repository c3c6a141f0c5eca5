"""Training: converted checkpoints, Megatron's own loop, on-policy samples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from megatron_programs import LOOP, PYTHON, convert, fresh, needs_megatron, printed, warm, weights
from paths import ROOT, SUPPORT, TESTS

from dsv3_plugin.conformance.texts import real_text
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend import compat

TRAIN = ROOT / "examples" / "train_megatron.py"
ON_POLICY = ROOT / "examples" / "on_policy.py"
PREPARE = ROOT / "examples" / "prepare_data.py"
PRETRAIN = ROOT / "examples" / "pretrain_megatron.py"
ON_CPU = TESTS / "pretrain_on_cpu.py"


def train(checkpoint: Path, *arguments: object) -> list[dict[str, str]]:
    """Run the example; returns what each iteration printed."""
    small = "--micro-batch-size", 2, "--global-batch-size", 8, "--seq-length", 32
    done = warm(TRAIN, checkpoint, *small, *arguments)
    assert done.returncode == 0, printed(done)[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("iteration")]
    return [dict(part.rsplit(" ", 1) for part in line.split(" | ")) for line in lines]


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))}


# The example


@needs_megatron
def test_a_converted_checkpoint_trains_as_its_original_and_goes_on_where_it_stopped(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Growing batches, recomputation, an interruption and both formats: equal losses, equal weights."""
    original = tiny_checkpoint("bf16")
    convert("to-megatron", original, tmp_path / "converted")
    common = "--train-iters", 6, "--rampup-batch-size", 2, 2, 12
    whole = train(original, "--finetune-from-weights", "--hf-output", tmp_path / "whole", *common)
    assert [line["batch"] for line in whole] == ["2", "2", "4", "6", "8", "8"]
    first = train(
        original, "--load", tmp_path / "converted", "--exit-interval", 4, "--save", tmp_path / "state", *common
    )
    full = "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1
    second = train(original, "--load", tmp_path / "state", "--save", tmp_path / "state", *common, *full)
    assert first + second == whole
    done = warm(TRAIN, original, "--load", tmp_path / "state", "--train-iters", 5, "--save", tmp_path / "earlier")
    assert done.returncode == 1 and "is at iteration 6 already, and --train-iters 5 leaves" in printed(done)
    assert not (tmp_path / "earlier").exists()
    # Of another optimizer.
    done = warm(TRAIN, original, "--load", tmp_path / "state", "--train-iters", 7, "--use-distributed-optimizer")
    line = printed(done).strip().splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'state' / 'iter_0000006'}: cannot be read: ") and len(line) < 600
    convert("to-hf", tmp_path / "state", tmp_path / "resumed")
    resumed = weights(tmp_path / "resumed")
    for copy in ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"):
        del resumed[copy]  # which only the converter writes
    assert not different(resumed, weights(tmp_path / "whole"))
    assert len(different(resumed, {name: weights(original)[name] for name in resumed})) > 100


@needs_megatron
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--rampup-batch-size", 2, 4, 12), "batches cannot grow from 2 by 4 to 8"),
        (("--rampup-batch-size", 1, 1, 12), "global batch size 1 is not a multiple"),
        (("--data", "nowhere.txt"), "--data: cannot be read"),
        (("--data", sys.executable), "--data: cannot be read"),
        (("--data", __file__, "--seq-length", 100_000), "needs one more"),
        (("--save", __file__), "cannot be written: Not a directory; name another place"),
        (("--hf-output", SUPPORT), "exists already and is not overwritten"),
        (("--load-output", SUPPORT), "is no file that can be written"),
        (("--evaluate", "nowhere.json"), "--evaluate nowhere.json: cannot be read"),
        (("--evaluate", __file__), "test_train.py: cannot be read"),
        (("--load", SUPPORT), "is no distributed checkpoint of Megatron"),
        (("--save", "/proc/none"), "--save /proc/none: cannot be written: No such file"),
        (("--save", "/proc"), "--save /proc: cannot be written: No such file"),
        (("--load-output", "/proc/x"), "--load-output /proc/x: cannot be written: No such file"),
        (("--evaluate", "/proc/x"), "--evaluate writes /proc/x.trainer: cannot be written: No such file"),
        (("--save", "CHECKPOINT"), "is the checkpoint's own folder; name another"),
        (("--evaluate", "tokens.json"), "tokens.json: token 1024, and the model knows those from 0 to 1023"),
        (("--evaluate", "tokens.trainer"), "the answer would be written over it"),
        (("--recompute-granularity", "full"), "Megatron refuses these settings: "),
        (
            ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 2),
            "recompute_num_layers=2 with recompute_method=uniform: ",
        ),
        (("--recompute-granularity", "selective", "--recompute-modules", "foo"), "foo"),
        (("--lr", "1e30", "--clip-grad", 0, "--train-iters", 9), "the gradients' norm is nan; nothing is saved"),
        (("--init-method-std", "1e20"), "the gradients' norm is "),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments: tuple[object, ...], expected: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    small = "--micro-batch-size", 2, "--global-batch-size", 8, "--train-iters", 1
    checkpoint = tiny_checkpoint("bf16")
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[[[1, 2], [3, 1024]]]")
    places = {"CHECKPOINT": checkpoint, "tokens.json": tokens, "tokens.trainer": tokens.with_suffix(".trainer")}
    named = [places.get(str(word), word) for word in arguments]
    done = warm(TRAIN, checkpoint, *small, "--hf-output", tmp_path / "hf", *named)
    assert done.returncode == 1
    line = printed(done).strip().splitlines()[-1]
    assert line.startswith("error: ") and expected in line, printed(done)[-2000:]
    assert not (tmp_path / "hf").exists()


@needs_megatron
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seq-length", "0", "at least 1"),
        ("tensor-model-parallel-size", "0", "at least 1"),
        ("train-iters", "-1", "at least 0"),
        ("lr", "nan", "above zero, and finite"),
        ("min-lr", "nan", "zero or above, and finite"),
        ("clip-grad", "inf", "zero or above, and finite"),
        ("weight-decay", "-1", "zero or above, and finite"),
        ("moe-router-bias-update-rate", "nan", "zero or above, and finite"),
        ("init-method-std", "0", "above zero, and finite"),
        ("lr-warmup-fraction", "2", "from 0 to 1"),
        ("seed", "99999999999999999999", "from 0 to 4294967295"),
    ],
)
def test_a_number_that_cannot_be_is_named(name: str, value: str, says: str, tmp_path: Path) -> None:
    done = warm(TRAIN, tmp_path, f"--{name}={value}")
    assert done.returncode == 2 and printed(done).strip().endswith(f"argument --{name}: {value}: {says}")


@needs_megatron
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--min-lr", 1), "--min-lr 1.0 is above --lr 0.001"),
        (("--recompute-num-layers", 1), "--recompute-num-layers needs --recompute-granularity full"),
        (("--recompute-modules", "moe"), "--recompute-modules needs --recompute-granularity selective"),
        (
            ("--recompute-granularity", "full", "--recompute-modules", "moe"),
            "--recompute-modules needs --recompute-granularity selective",
        ),
    ],
)
def test_arguments_that_contradict_each_other_are_named(
    arguments: tuple[object, ...], says: str, tmp_path: Path
) -> None:
    done = warm(TRAIN, tmp_path, *arguments)
    assert done.returncode == 2 and printed(done).strip().endswith(says)


# Megatron's own loop


# A script that hands over a function in place of a configuration.
PROVIDER = """
import runpy
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from dsv3_plugin.megatron_backend.provider import add_arguments, model_provider

def main():
    example = runpy.run_path({example!r})
    args = parse_and_validate_args(add_arguments)
    pretrain(pretrain_cfg_container_from_args(args), example["datasets"], ModelType.encoder_or_decoder,
             example["forward_step"], model_provider=model_provider)
"""


def pretrain(checkpoint: Path, data: Path, *arguments: object, script: Path = PRETRAIN) -> str:
    """Run Megatron's loop over the text; returns what it printed."""
    model = "--hf-config", checkpoint, "--tokenizer-type", "NullTokenizer", "--vocab-size", 1023
    small = "--micro-batch-size", 2, "--global-batch-size", 4, "--seq-length", 32, "--train-iters", 2
    evaluation = "--split", "100,0,0", "--eval-iters", 0, "--eval-interval", 100
    machine = "--transformer-impl", "local", "--distributed-backend", "gloo", "--log-interval", 1
    command = ON_CPU, script, *model, *small, *evaluation, *machine, "--data-path", data, *arguments
    done = warm(*command, ranks=1, modules=LOOP)
    assert done.returncode == 0, printed(done)[-3000:]
    return done.stdout


@needs_megatron
def test_megatron_s_own_loop_trains_the_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """It reads what the converter wrote, and the converter what it wrote: without a step equal bytes, with one not."""
    original = tiny_checkpoint("bf16")
    convert("to-megatron", original, tmp_path / "converted")
    data = tmp_path / "text"
    text = tmp_path / "text.txt"
    text.write_text(real_text()[:20_000])
    done = warm(PREPARE, "pretrain", original, text, "--output", data, "--fim-rate", 0)
    assert done.returncode == 0, printed(done)[-2000:]
    provider = tmp_path / "provider.py"
    provider.write_text(PROVIDER.format(example=str(PRETRAIN)))
    after = {}
    for name, rate, script in ("rest", 0, PRETRAIN), ("steps", 1e-3, PRETRAIN), ("provider", 1e-3, provider):
        saved = tmp_path / name
        common = "--load", tmp_path / "converted", "--save", saved, "--save-interval", 10
        rates = "--lr", rate, "--min-lr", rate, "--moe-router-bias-update-rate", rate
        said = pretrain(original, data, *common, *rates, script=script)
        assert len(re.findall(r"iteration +\d/ +2 .*lm loss: [67]\.\d.*mtp_1 loss: [67]\.\d", said)) == 2, said
        convert("to-hf", saved, tmp_path / f"{name} hf", "--like", original)
        after[name] = weights(tmp_path / f"{name} hf")
    assert not different(after["rest"], weights(original))
    assert len(different(after["steps"], weights(original))) > 100
    assert not different(after["provider"], after["steps"])


@needs_megatron
def test_a_spec_is_refused_where_it_would_have_no_effect(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    spec = "--spec", "dsv3_plugin.megatron_backend.provider", "refuse_spec"
    with pytest.raises(AssertionError, match="error: --spec replaces the decoder layers only"):
        pretrain(tiny_checkpoint("bf16"), tmp_path / "text", *spec)


# On-policy


def on_policy(checkpoint: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return fresh(sys.executable, ON_POLICY, checkpoint, *arguments)


# In fp32 and fp8 a trainer and both servers are compared with the reference, each in its own file.
@needs_megatron
def test_every_server_samples_with_the_trainer_s_probabilities(tiny_checkpoint: TinyCheckpoint) -> None:
    for name in ("vllm", "sglang"):
        if not (PYTHON.parents[2] / name).exists():
            pytest.skip(f"the environment {name} is missing: run `make environments`")
    done = on_policy(tiny_checkpoint("bf16"), "--server", "vllm", "sglang")
    assert done.returncode == 0, done.stdout[-3000:]
    for name in ("vllm", "sglang"):
        assert f"{name}: 96 of 96 sampled tokens have equal log-probabilities; KL = 0.0\n" in done.stdout


@needs_megatron
def test_one_weight_that_is_off_by_one_ulp_is_caught(tiny_checkpoint: TinyCheckpoint) -> None:
    done = on_policy(tiny_checkpoint("bf16"), "--server", "reference", "--change-one-weight")
    assert done.returncode == 1
    found = re.search(r"reference: (\d+) of 96 sampled tokens have equal log-probabilities; KL = (\S+)", done.stdout)
    assert found is not None and int(found[1]) < 96 and float(found[2]) != 0, done.stdout[-3000:]


def test_an_unknown_server_is_refused(tmp_path: Path) -> None:
    done = on_policy(tmp_path, "--server", "nobody")
    assert done.returncode == 2 and "--server nobody: not one of reference, vllm, sglang" in printed(done)
    done = on_policy(tmp_path, "--server", "vllm=/nope/python")
    assert done.returncode == 2 and "/nope/python: No such file, or not executable; name a Python" in printed(done)
    done = on_policy(tmp_path / "none", "--server", "reference")
    assert done.returncode == 1 and printed(done).strip().endswith(
        "none: no such folder; a checkpoint is a folder with config.json"
    )


# Versions


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.16.1", "too old"), ("0.18.9", "too old"), ("0.19.2", None), ("0.20.0", "is tested with Megatron 0.19.2")],
)
def test_another_megatron_is_refused_or_warned_of(
    version: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    if expected == "too old":
        with pytest.raises(EngineError, match=f"Megatron-Core {version} is too old"):
            compat.untested_warning()
    else:
        warning = compat.untested_warning()
        assert warning is None if expected is None else expected in str(warning)
