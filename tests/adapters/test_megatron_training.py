"""Training with Megatron: on two processes, resumed, from and to checkpoints, and what it samples."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from megatron_programs import PYTHON, fresh, needs_megatron, printed, torchrun, warm, weights
from paths import ROOT
from safetensors.torch import load_file, save_file

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.profile import ATTENTION_VARIABLE

pytestmark = needs_megatron

TRAIN = ROOT / "examples" / "train_megatron.py"
ON_POLICY = ROOT / "examples" / "on_policy.py"
TENSOR_PARALLEL = "--tensor-model-parallel-size", "2"
EXPERT_PARALLEL = "--expert-model-parallel-size", "2"
PIPELINE_PARALLEL = "--pipeline-model-parallel-size", "2"


def train(checkpoint: Path, *arguments: object, ranks: int = 1, slices: int = 1, user: bool = False) -> str:
    """Run the example, as a user starts it or warm; returns what it printed. A failure shows its last lines."""
    small = "--micro-batch-size", 2, "--global-batch-size", 4, "--seq-length", 64
    command, variables = (TRAIN, checkpoint, *small, *arguments), {"DSV3_REDUCTION_SLICES": str(slices)}
    if not user:
        done = warm(*command, ranks=ranks, **variables)
    elif ranks == 1:
        done = fresh(PYTHON, *command, **variables)
    else:
        done = torchrun(*command, ranks=ranks, **variables)
    assert done.returncode == 0, "\n".join(printed(done).splitlines()[-15:])
    return done.stdout


def losses(said: str) -> list[tuple[str, ...]]:
    """The losses as printed, six digits each. Of tensor-parallel ranks each prints them."""
    found = re.findall(r"iteration (\d+) \| lm loss (\S+) \| mtp loss (\S+)", said)
    by_iteration = {iteration: of_iteration for iteration, *of_iteration in found}
    return [tuple(by_iteration[iteration]) for iteration in sorted(by_iteration, key=int)]


Alone = Callable[[int], tuple[str, Path]]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """`alone(2)`: what one process prints over three iterations in two slices, and the checkpoint that it writes."""

    @cache
    def run_alone(slices: int) -> tuple[str, Path]:
        output = tmp_path_factory.mktemp("alone") / "hf"
        arguments = "--finetune-from-weights", "--train-iters", 3, "--hf-output", output
        return train(tiny_checkpoint("bf16"), *arguments, slices=slices, user=True), output

    return run_alone


@pytest.mark.parametrize(
    "layout",
    [
        EXPERT_PARALLEL,
        (*TENSOR_PARALLEL, *EXPERT_PARALLEL, "--use-distributed-optimizer"),
        PIPELINE_PARALLEL,
    ],
    ids=" ".join,
)
def test_two_processes_train(
    layout: tuple[object, ...],
    alone: Alone,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    """The first two losses are of the same weights (warm-up begins at zero): equal in every printed digit, but for
    tensor-parallel ranks, whose logits are equal and whose exponentials Megatron adds up part by part.
    """
    output = tmp_path / "hf"
    arguments = "--finetune-from-weights", "--train-iters", 3, "--hf-output", output, *layout
    slices, tolerance = (2, 2e-6) if TENSOR_PARALLEL[0] in layout else (1, 0.0)
    found = losses(train(tiny_checkpoint("bf16"), *arguments, ranks=2, slices=slices, user=True))
    expected = losses(alone(slices)[0])
    assert len(found) == 3
    for ours, wanted in zip(found[:2], expected[:2], strict=True):
        assert [float(loss) for loss in ours] == pytest.approx([float(loss) for loss in wanted], abs=tolerance, rel=0)
    assert abs(float(found[2][0]) - float(expected[2][0])) < 0.02
    CheckpointReader(output).validate()


def test_resuming_continues_with_equal_bits(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """In stages. On one process: in `test_train`; with a distributed optimizer: in `test_pretrain`."""

    def go(*arguments: object) -> str:
        common = "--finetune-from-weights", "--train-iters", 4, *PIPELINE_PARALLEL
        return train(tiny_checkpoint("bf16"), *common, *arguments, ranks=2, slices=2)

    whole = go("--hf-output", tmp_path / "whole")
    first = go("--exit-interval", 2, "--save", tmp_path / "state")
    second = go("--load", tmp_path / "state", "--hf-output", tmp_path / "resumed")
    assert losses(whole) == losses(first) + losses(second)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer",)], ids=["", "distributed"])
def test_one_process_continues_what_two_tensor_parallel_ranks_began(
    optimizer: tuple[str, ...], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Weights and optimizer state change their layout: the next loss is equal, and what Adam makes of it close.

    Equal but for the last place: for the loss, which is not the model's, each rank sums its part of the vocabulary.
    """
    checkpoint = tiny_checkpoint("bf16")

    def go(processes: int, *arguments: object) -> list[tuple[str, ...]]:
        common = "--finetune-from-weights", "--train-iters", 4, *optimizer, *arguments
        return losses(train(checkpoint, *common, ranks=processes, slices=2))

    state = "--exit-interval", 2, "--save", tmp_path / "state"
    begun = go(2, *TENSOR_PARALLEL, *state)
    whole, continued = go(2, *TENSOR_PARALLEL), go(1, "--load", tmp_path / "state")
    assert whole[:2] == begun
    expected = [float(loss) for loss in whole[2]]
    assert [float(loss) for loss in continued[0]] == pytest.approx(expected, abs=2e-6, rel=0)
    assert abs(float(whole[3][0]) - float(continued[1][0])) < 0.02


def test_every_weight_learns_and_the_bias_moves_by_its_step(alone: Alone, tiny_checkpoint: TinyCheckpoint) -> None:
    before, after = weights(tiny_checkpoint("bf16")), weights(alone(1)[1])
    copies = ("layers.4.embed_tokens.weight", "layers.4.shared_head.head.weight")
    assert {name for name in before if name not in after} == {f"model.{name}" for name in copies}
    unchanged = [name for name in after if torch.equal(before[name], after[name])]
    # An expert that no token chose has no gradient, and a norm's weights are near 1, where bf16 hides two small steps.
    assert all(".experts." in name or "norm." in name for name in unchanged), unchanged
    for name in after:
        if name.endswith("e_score_correction_bias"):
            steps = (after[name].double() - before[name].double()) / 1e-2
            assert float((steps - steps.round()).abs().max()) < 1e-4
            assert float(steps.abs().max().round()) in (1, 2, 3)


def test_samples_have_the_trainers_probabilities(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two forms of attention, in which they depend on what the trainer is told of prompts."""
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")
    done = fresh(PYTHON, ON_POLICY, tiny_checkpoint("fp8"), "--trainer", PYTHON, "--server", "reference")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "96 of 96 sampled tokens have equal log-probabilities; KL = 0.0" in done.stdout


# Checkpoints


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_a_checkpoint_survives_the_way_in_and_out(dtype: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    train(tiny_checkpoint(dtype), "--finetune-from-weights", "--train-iters", 0, "--hf-output", output)
    before, after = weights(tiny_checkpoint(dtype)), weights(output)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in after)
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1, "weights are read by whom the rest is"


# The example, which saves other weights than it read.
NO_NUMBERS = """
import runpy, sys
from dsv3_plugin.megatron_backend import weights

def save_checkpoint(model, *places, save=weights.save_checkpoint):
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    save(model, *places)

weights.save_checkpoint = save_checkpoint
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_weights_that_are_no_numbers_nothing_is_left(
    ranks: int, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """One rank finds out, and all say so."""
    script = tmp_path / "script.py"
    script.write_text(NO_NUMBERS)
    layout = PIPELINE_PARALLEL if ranks > 1 else ()
    arguments = "--train-iters", 0, "--hf-output", tmp_path / "hf", *layout
    done = warm(script, TRAIN, tiny_checkpoint("bf16"), *arguments, ranks=ranks)
    said = printed(done)
    assert done.returncode == 1 and "Traceback" not in said, said[-3000:]
    assert said.count(f"error: {tmp_path / 'hf'}: is not written: ") == ranks and "nan" in said, said[-3000:]
    assert not (tmp_path / "hf").exists()


def refusal(checkpoint: Path, *arguments: str) -> str:
    done = warm(TRAIN, checkpoint, *arguments)
    assert done.returncode != 0
    return printed(done).strip().splitlines()[-1]


def test_missing_expert_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    good = tiny_checkpoint("bf16")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in good.glob("*.json"):
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(good / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    line = refusal(broken, "--finetune-from-weights")
    assert line.startswith("error: ") and "model.layers.2.mlp.experts.5.up_proj.weight" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--pipeline-model-parallel-size", "2"), "1 processes cannot be divided"),
        (("--expert-model-parallel-size", "3"), "1 processes cannot be divided"),
        (("--tensor-model-parallel-size", "2"), "1 processes cannot be divided"),
        (("--global-batch-size", "6"), "global batch size 6 is not a multiple of micro batch size 4"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(
    arguments: tuple[str, ...], expected: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    line = refusal(tiny_checkpoint("bf16"), *arguments)
    assert line.startswith("error: ") and expected in line
