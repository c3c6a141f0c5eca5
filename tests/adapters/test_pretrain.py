"""Megatron's own loop on several ranks: which of its parallel features change a bit of what is learned.

A run ends with the fingerprint of its weights, all ranks together. Gradients are not clipped, so that no norm, which
ranks add up in another order, reaches the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from megatron_programs import LOOP, convert, needs_megatron, printed, torchrun, warm
from paths import SUPPORT, TESTS

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader

ON_CPU, PROBE = TESTS / "pretrain_on_cpu.py", SUPPORT / "pretrain_probe.py"
pytestmark = needs_megatron

STAGES = "--pipeline-model-parallel-size", "2"
SHARDED = ("--use-distributed-optimizer",)
OVERLAPPED = *SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "5000"
EXPERTS = "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"
TENSOR_AND_EXPERT = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *EXPERTS,
)
ALL = (
    *TENSOR_AND_EXPERT,
    *(*STAGES, "--num-virtual-stages-per-pipeline-rank", "2"),
    *(*SHARDED, "--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"),
)
"""On eight processes each of the four kinds of parallel ranks has two."""
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Trained:
    """What a run printed and learned."""

    returncode: int
    printed: str
    weights: Fingerprint

    @property
    def losses(self) -> list[tuple[str, ...]]:
        """Of each iteration the two losses and the norm of the gradients, as printed."""
        return re.findall(r"lm loss: (\S+) .*?mtp_1 loss: (\S+) .*?grad norm: (\S+)", self.printed)


Pretrain = Callable[..., Trained]


@pytest.fixture(scope="module")
def pretrain(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """`pretrain(2, ...)` runs the example on two processes, from the weights of `tiny` unless `--load` says others.

    With `user` they are new ones that torchrun starts.
    """
    folder = tmp_path_factory.mktemp("pretrain")
    original = tiny_checkpoint("bf16")
    convert("to-megatron", original, folder / "converted")
    numbers = count()

    def run(
        processes: int,
        *flags: object,
        iterations: int = 1,
        slices: int = 1,
        without: str | None = None,
        user: bool = False,
    ) -> Trained:
        model = "--hf-config", original, "--tokenizer-type", "NullTokenizer", "--vocab-size", 1023, "--mock-data"
        small = "--micro-batch-size", 2, "--global-batch-size", 8, "--seq-length", 32, "--train-iters", iterations
        course = "--lr", 1e-3, "--min-lr", 1e-3, "--clip-grad", 0, "--eval-iters", 0, "--eval-interval", 9
        machine = "--transformer-impl", "local", "--distributed-backend", "gloo", "--log-interval", 1
        file = folder / f"{next(numbers)}.json"
        broken = ["--break", without] if without else []
        script = ON_CPU, PROBE, file, *broken, *model, *small, *course, *machine, "--load", folder / "converted"
        launch = torchrun if user else partial(warm, modules=LOOP)
        variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "DSV3_REDUCTION_SLICES": str(slices)}
        done = launch(*script, *flags, ranks=processes, **variables)
        learned = Fingerprint.model_validate_json(file.read_text()) if file.exists() else Fingerprint(tensors={})
        return Trained(done.returncode, printed(done), learned)

    return run


@pytest.fixture(scope="module")
def plain(pretrain: Pretrain) -> Callable[[], Trained]:
    """One iteration on one process, started as a user does."""
    return cache(lambda: pretrain(1, user=True))


@pytest.mark.parametrize(
    ("layout", "sums"),
    [
        (("--num-virtual-stages-per-pipeline-rank", "2"), {EMBEDDING}),
        (("--pipeline-model-parallel-layout", "Ettttm|L"), set()),
        (("--pipeline-model-parallel-layout", "E|ttttmL", *SHARDED), {EMBEDDING}),
    ],
    ids=str,
)
def test_stages_change_no_bit(
    layout: tuple[str, ...], sums: set[str], pretrain: Pretrain, plain: Callable[[], Trained]
) -> None:
    """But of the embedding where two stages hold it: its gradient is added up by stage, not by micro-batch."""
    found = pretrain(2, *STAGES, *layout)
    assert found.weights.tensors, found.printed[-3000:]
    assert set(found.weights.difference(plain().weights)) <= sums
    assert found.losses == plain().losses


def test_an_embedding_that_is_added_to_the_head_is_caught(pretrain: Pretrain, plain: Callable[[], Trained]) -> None:
    layout = *STAGES, "--pipeline-model-parallel-layout", "Ettttm|L"
    found = pretrain(2, *layout, without="embedding")
    assert found.weights.difference(plain().weights) == ["lm_head.weight", EMBEDDING], found.printed[-3000:]
    assert found.losses != plain().losses


def test_overlaps_change_no_bit(pretrain: Pretrain, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Of gradients that are reduced and weights that are gathered while others are computed, in small buckets; nor of
    the weights' average, which waits for them.
    """
    runs, averages = [], []
    for name, flags in ("plain", SHARDED), ("overlapped", OVERLAPPED):
        average = "--ema-decay", 0.75, "--save", tmp_path / name, "--save-interval", 3
        runs.append(pretrain(2, *flags, *average, iterations=3))
        assert runs[-1].weights.tensors, runs[-1].printed[-3000:]
        convert("to-hf", tmp_path / name / "ema", tmp_path / f"{name} average", "--like", tiny_checkpoint("bf16"))
        averages.append(fingerprint_of_checkpoint(CheckpointReader(tmp_path / f"{name} average")))
    expected, found = runs
    assert found.weights == expected.weights and found.losses == expected.losses
    assert averages[0] == averages[1] != found.weights
    # The twin: whoever reads a weight without waiting for it computes with the last step's, if it gets so far.
    stale = pretrain(2, *OVERLAPPED, iterations=3, without="waiting")
    assert stale.losses != expected.losses


def test_tokens_that_travel_while_others_are_computed_change_no_bit(pretrain: Pretrain) -> None:
    """But of the embedding: MTP's part of its gradient is added in fp32, not to the other in bf16 before."""
    overlapped = *EXPERTS, "--overlap-moe-expert-parallel-comm"
    expected, found = pretrain(2, *EXPERTS), pretrain(2, *overlapped)
    assert found.weights.tensors, found.printed[-3000:]
    assert set(found.weights.difference(expected.weights)) <= {EMBEDDING} and found.losses == expected.losses
    # The twin: routers that learn nothing from how experts are weighed.
    twin = pretrain(2, *overlapped, without="weights").weights.difference(expected.weights)
    assert "model.layers.1.mlp.gate.weight" in twin


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, ()),
        (2, OVERLAPPED),
        (8, ALL),
    ],
    ids=str,
)
def test_a_run_that_continues_learns_the_same(
    processes: int, flags: tuple[str, ...], pretrain: Pretrain, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Tensor-parallel ranks, experts and stages are all in the last."""
    middle = 2 if processes <= 2 else 1  # many share the cores
    end = 2 * middle
    whole = pretrain(processes, *flags, "--save", tmp_path, "--save-interval", middle, iterations=end, slices=2)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(middle))
    rest = pretrain(processes, *flags, "--load", tmp_path, iterations=end, slices=2)
    assert whole.weights.tensors and rest.weights == whole.weights, rest.printed[-3000:]
    assert len(whole.losses) == end and rest.losses == whole.losses[middle:]
    if TENSOR_AND_EXPERT[0] in flags:
        # What its ranks hold together has the fingerprint of the checkpoint that it is exported to.
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(end))
        convert("to-hf", tmp_path, tmp_path / "hf", "--like", tiny_checkpoint("bf16"))
        assert fingerprint_of_checkpoint(CheckpointReader(tmp_path / "hf")) == whole.weights


def test_evaluation_alone(pretrain: Pretrain) -> None:
    """Gives the loss that a run which learns nothing ends with; its weights are the checkpoint's."""
    resting = "--lr", 0, "--min-lr", 0, "--moe-router-bias-update-rate", 0, "--eval-iters", 1
    trained, evaluated = pretrain(1, *resting), pretrain(1, *resting, "--skip-train")
    of_both = [re.findall(r"on validation set \| lm loss value: (\S+)", run.printed) for run in (trained, evaluated)]
    assert len(of_both[0]) == 1 and of_both[0] == of_both[1], evaluated.printed[-3000:]
