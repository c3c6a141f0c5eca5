"""Megatron's forward, its training on two processes, its checkpoints, and the stand-ins for CUDA."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from paths import ROOT, SUPPORT
from safetensors.torch import load_file, save_file

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance import runner

TRAIN = ROOT / "examples" / "train_megatron.py"
ON_POLICY = ROOT / "examples" / "on_policy.py"
SABOTAGED = SUPPORT / "sabotaged_megatron.py"
CASES = ("batch", "mtp_1")
TENSOR_PARALLEL = "--tensor-model-parallel-size", "2"
EXPERT_PARALLEL = "--expert-model-parallel-size", "2"
PIPELINE_PARALLEL = "--pipeline-model-parallel-size", "2"


@pytest.fixture(scope="module")
def python() -> str:
    """The environment's Python."""
    path = ROOT / ".envs" / "megatron" / "bin" / "python"
    if not path.exists():
        pytest.skip(f"{path} is missing: run `make environments`")
    return str(path)


def run(command: list[str], slices: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DSV3_REDUCTION_SLICES": str(slices)}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def on_ranks(python: str, processes: int) -> list[str]:
    """The command that starts a program on so many processes."""
    if processes == 1:
        return [python, "-W", "ignore"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"
    return [python, "-W", "ignore", "-m", *torchrun]


def train(python: str, checkpoint: Path, *arguments: object, processes: int = 1, slices: int = 1) -> str:
    """Run the example; returns what it printed. A failure shows its last lines."""
    small = ["--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "64"]
    command = [*on_ranks(python, processes), str(TRAIN), str(checkpoint), *small, *map(str, arguments)]
    done = run(command, slices)
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-15:])
    return done.stdout


def losses(printed: str) -> list[tuple[str, ...]]:
    """The losses as printed, six digits each. Of tensor-parallel ranks each prints them."""
    found = re.findall(r"iteration (\d+) \| lm loss (\S+) \| mtp loss (\S+)", printed)
    by_iteration = {iteration: of_iteration for iteration, *of_iteration in found}
    return [tuple(by_iteration[iteration]) for iteration in sorted(by_iteration, key=int)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(CheckpointReader(checkpoint).tensors())


# The forward


def reference() -> runner.TesteeCommand:
    return runner.TesteeCommand.parse("reference", ROOT / ".envs")


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_the_training_forward_has_the_references_bits(dtype: str, python: str, tiny_checkpoint: TinyCheckpoint) -> None:
    megatron = runner.TesteeCommand("megatron", (python, "-m", "dsv3_plugin.conformance.testees.megatron"))
    report = runner.run([reference(), megatron], tiny_checkpoint(dtype), lambda *_: None, only=CASES)
    assert report.passed, report.to_json()
    assert report.results["megatron"].schedule_not_followed
    compared = [c for v in report.verdicts for c in v.comparisons if {"megatron", "reference"} == {c.left, c.right}]
    print(f"{sum(c.equal_rows for c in compared):,} rows equal")


def test_experts_added_up_in_megatrons_order_are_caught(python: str, tiny_checkpoint: TinyCheckpoint) -> None:
    sabotaged = runner.TesteeCommand("megatron", (python, str(SABOTAGED), "experts"))
    report = runner.run([reference(), sabotaged], tiny_checkpoint("bf16"), lambda *_: None, only=("batch",))
    assert not report.passed
    comparisons = {(c.left, c.right): c for c in report.verdicts[0].comparisons}
    first = comparisons["reference", "megatron"].first_difference
    assert first is not None and first.stream == "layers.1.mlp"


def on_two_ranks(python: str, name: str, *arguments: str) -> runner.TesteeCommand:
    return runner.TesteeCommand(name, (*on_ranks(python, 2), *arguments))


@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("bf16", (TENSOR_PARALLEL,)),
        ("fp32", (TENSOR_PARALLEL, EXPERT_PARALLEL, (*TENSOR_PARALLEL, *EXPERT_PARALLEL))),
        ("fp8", (TENSOR_PARALLEL,)),
    ],
    ids=["bf16", "fp32", "fp8"],
)
def test_two_ranks_have_the_bits_of_one(
    dtype: str,
    layouts: tuple[tuple[str, ...], ...],
    python: str,
    tiny_checkpoint: TinyCheckpoint,
    sliceable_fp8_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensor parallel, expert parallel, both: every row of every layer, in as many slices as ranks."""
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    checkpoint = sliceable_fp8_checkpoint if dtype == "fp8" else tiny_checkpoint(dtype)
    testee = "-m", "dsv3_plugin.conformance.testees.megatron"
    commands = [on_two_ranks(python, f"megatron-{i}", *testee, *layout) for i, layout in enumerate(layouts)]
    report = runner.run([reference(), *commands], checkpoint, lambda *_: None, only=("mtp_1",))
    assert report.passed, report.to_json()
    assert report.profile == f"{dtype} in 2 reduction slices"
    compared = [c for v in report.verdicts for c in v.comparisons if "reference" in (c.left, c.right)]
    print(f"{sum(c.equal_rows for c in compared):,} rows equal")


def test_partial_sums_that_travel_in_bf16_are_caught(
    python: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    sabotaged = on_two_ranks(python, "megatron", str(SABOTAGED), "reduction", *TENSOR_PARALLEL)
    report = runner.run([reference(), sabotaged], tiny_checkpoint("bf16"), lambda *_: None, only=("batch",))
    assert not report.passed
    comparisons = {(c.left, c.right): c for c in report.verdicts[0].comparisons}
    first = comparisons["reference", "megatron"].first_difference
    assert first is not None and first.stream == "layers.0.self_attn"


# Training


@pytest.fixture(scope="session")
def sliceable_fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` in fp8 with heads and a shared expert that have two slices of whole blocks of 128."""
    path = tmp_path_factory.mktemp("sliceable") / "fp8"
    wider = {"num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2}
    make_checkpoint(read_config("tiny") | wider, path, 1, dtype=CheckpointDtype.FP8)
    return path


Alone = Callable[[int], tuple[str, Path]]


@pytest.fixture(scope="module")
def alone(python: str, tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """`alone(2)`: what one process prints over three iterations in two slices, and the checkpoint that it writes."""

    @cache
    def run_alone(slices: int) -> tuple[str, Path]:
        output = tmp_path_factory.mktemp("alone") / "hf"
        arguments = "--finetune-from-weights", "--train-iters", 3, "--hf-output", output
        return train(python, tiny_checkpoint("bf16"), *arguments, slices=slices), output

    return run_alone


@pytest.mark.parametrize(
    "layout",
    [
        EXPERT_PARALLEL,
        TENSOR_PARALLEL,
        (*TENSOR_PARALLEL, *EXPERT_PARALLEL, "--use-distributed-optimizer"),
        PIPELINE_PARALLEL,
    ],
    ids=" ".join,
)
def test_two_processes_train(
    layout: tuple[object, ...],
    python: str,
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
    printed = losses(train(python, tiny_checkpoint("bf16"), *arguments, processes=2, slices=slices))
    expected = losses(alone(slices)[0])
    assert len(printed) == 3
    for found, wanted in zip(printed[:2], expected[:2], strict=True):
        assert [float(loss) for loss in found] == pytest.approx([float(loss) for loss in wanted], abs=tolerance, rel=0)
    assert abs(float(printed[2][0]) - float(expected[2][0])) < 0.02
    CheckpointReader(output).validate()


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, ("--use-distributed-optimizer",)),
        (2, PIPELINE_PARALLEL),
    ],
    ids=str,
)
def test_resuming_continues_with_equal_bits(
    processes: int, layout: tuple[object, ...], python: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    def go(*arguments: object) -> str:
        common = "--finetune-from-weights", "--train-iters", 4, *layout
        return train(python, tiny_checkpoint("bf16"), *common, *arguments, processes=processes, slices=2)

    whole = go("--hf-output", tmp_path / "whole")
    first = go("--exit-interval", 2, "--save", tmp_path / "state")
    second = go("--load", tmp_path / "state", "--hf-output", tmp_path / "resumed")
    assert losses(whole) == losses(first) + losses(second)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer",)], ids=["", "distributed"])
def test_one_process_continues_what_two_tensor_parallel_ranks_began(
    optimizer: tuple[str, ...], python: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Weights and optimizer state change their layout: the next loss is equal, and what Adam makes of it close.

    Equal but for the last place: for the loss, which is not the model's, each rank sums its part of the vocabulary.
    """
    checkpoint = tiny_checkpoint("bf16")

    def go(processes: int, *arguments: object) -> list[tuple[str, ...]]:
        common = "--finetune-from-weights", "--train-iters", 4, *optimizer, *arguments
        return losses(train(python, checkpoint, *common, processes=processes, slices=2))

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


def test_samples_have_the_trainers_probabilities(python: str, tiny_checkpoint: TinyCheckpoint) -> None:
    done = run([python, str(ON_POLICY), str(tiny_checkpoint("fp8")), "--trainer", python, "--server", "reference"])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "96 of 96 sampled tokens have equal log-probabilities; KL = 0.0" in done.stdout


GRADIENTS = """
import sys
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from dsv3_plugin.autograd.bind import differentiable
from dsv3_plugin.checkpoint.loader import load_model, load_mtp
from dsv3_plugin.checkpoint.names import checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.attend import attend_to_itself
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint, local_tensors

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
config = reader.config
tokens = torch.randint(config.vocab_size, (71,), generator=torch.Generator().manual_seed(3))
ids, labels, positions = tokens[:-1], tokens[1:], torch.arange(70)

gpt = build_model(config, transformer_config(config, reader.profile(), moe_aux_loss_coeff=0.0))
load_checkpoint(gpt, sys.argv[1])
gpt.train()
gpt(ids[None], positions[None], None, labels=labels[None]).mean().backward()
for parameter in gpt.parameters():
    parameter.data = parameter.grad
found = local_tensors(gpt, config)

ops = differentiable(bind_ops(config, reader.profile(), torch.device("cpu")))
parts = {"main": load_model(reader, ops), "mtp": load_mtp(reader, ops)}
for part in parts.values():
    part.requires_grad_(True)

attend = attend_to_itself(ops, config)
hidden = parts["main"](ids, positions, attend)
drafted = parts["mtp"](labels[:-1], positions[:-1], hidden[:-1], attend)
loss = cross_entropy(parts["main"].lm_head(hidden), labels)
(loss + 0.3 * cross_entropy(parts["mtp"].lm_head(drafted), labels[1:])).backward()
worst = 0.0
for name, spec in checkpoint_tensors(config).items():
    places = [(dict(parts[p].named_parameters())[t.parameter].grad, t.index) for p, t in spec.targets.items()]
    if not places or "e_score" in name:
        continue
    expected = sum(torch.zeros(spec.shape) if grad is None else grad[index] for grad, index in places)
    if expected.any():
        worst = max(worst, float((found[name] - expected).abs().max() / expected.abs().max()))
    else:
        assert not found[name].any(), name
print("worst", worst)
"""


def test_megatrons_gradients_are_the_cores(python: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """The dispatcher, Megatron's losses and the MTP layer's place change no gradient, in fp32, beyond rounding."""
    printed = run([python, "-W", "ignore", "-c", GRADIENTS, str(tiny_checkpoint("fp32"))]).stdout
    assert "worst" in printed, printed[-2000:]
    worst = float(printed.split("worst")[1])
    print(f"largest difference over a gradient's largest element: {worst:.1e}")
    assert worst < 1e-5


RECOMPUTED = """
import sys
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.megatron_backend import layers
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import fingerprint, load_checkpoint, save_checkpoint

# Where TransformerEngine would be asked whether it computes in its own FP8.
random.HAVE_TE = True
random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
random.activation_recompute_forward = random.fp8_autocast = lambda **_: nullcontext()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
random.model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
config = reader.config
ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
calls = []

def gradients(**settings):
    gpt = build_model(config, transformer_config(config, reader.profile(), **settings))
    load_checkpoint(gpt, sys.argv[1])
    gpt.train()
    calls.clear()
    gpt(ids, torch.arange(40).expand(2, -1), None, labels=ids.roll(-1, 1)).mean().backward()
    return {name: parameter.grad for name, parameter in gpt.named_parameters()}

def counted(owner, name):
    method = getattr(owner, name)
    def call(self, *args, **kwargs):
        calls.append(name)
        return method(self, *args, **kwargs)
    setattr(owner, name, call)

counted(layers.MLA, "up_project")
counted(layers.Norm, "forward")
counted(layers.DenseMLP, "forward")
expected, before = gradients(), len(calls)
modules = ["layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
settings = [{"recompute_granularity": "selective", "recompute_modules": [name]} for name in modules]
for setting in *settings, {"recompute_granularity": "selective", "recompute_modules": modules[:3]}, full:
    found = gradients(**setting)
    equal = all(torch.equal(found[name], expected[name]) for name in expected)
    print(setting.get("recompute_modules", "full"), "equal" if equal else "different", len(calls) - before)

# What the trainer holds, as a server would that loads what it writes; one number of one weight is another fingerprint.
gpt = build_model(config, transformer_config(config, reader.profile()))
load_checkpoint(gpt, sys.argv[1])
held = fingerprint(gpt, config)
print("held", held == fingerprint_of_checkpoint(reader))
gpt.decoder.layers[1].mlp.experts.core.down_proj.weight.data[3, 5, 7] *= -1
moved = fingerprint(gpt, config)
print("moved", *held.difference(moved))
save_checkpoint(gpt, sys.argv[1], sys.argv[2])
print("exported", moved == fingerprint_of_checkpoint(CheckpointReader(sys.argv[2])))

# The twin: the second time it computes something else.
up_project = layers.MLA.up_project
def drifting(self, queries, latent, *rest):
    scale = 1 + 2.0**-7 * torch.is_grad_enabled()
    return up_project(self, queries * scale, latent, *rest)
layers.MLA.up_project = drifting
found = gradients(recompute_granularity="selective", recompute_modules=["mla_up_proj"])
print("twin", "equal" if all(torch.equal(found[name], expected[name]) for name in expected) else "different")
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_recomputed_activations_give_equal_gradients_and_weights_their_fingerprint(
    dtype: str, python: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    printed = run([python, "-W", "ignore", "-c", RECOMPUTED, str(tiny_checkpoint(dtype)), str(tmp_path / "hf")]).stdout
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert f"held True\nmoved {expert}\nexported True\n" in printed, printed[-2000:]
    results = re.findall(r"^(\[.*\]|full|twin) (equal|different) ?(\d*)$", printed, re.MULTILINE)
    assert [what for what, *_ in results] == [
        "['layernorm']",
        "['mla_up_proj']",
        "['mlp']",
        "['moe']",
        "['shared_experts']",
        "['layernorm', 'mla_up_proj', 'mlp']",
        "full",
        "twin",
    ], printed[-2000:]
    *settings, twin = results
    for what, verdict, more_calls in settings:
        assert verdict == "equal" and int(more_calls) > 0, (what, verdict, more_calls)
    assert twin[1] == "different"


BALANCE = """
import sys
import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
config, alpha, gamma = reader.config, 0.5, 0.25
tokens, sequences, experts, chosen = 24, 3, config.n_routed_experts, config.num_experts_per_tok
x = torch.randn(tokens, sequences, config.hidden_size, generator=torch.Generator().manual_seed(1))

def route(**losses):
    settings = transformer_config(config, reader.profile(), moe_router_bias_update_rate=gamma, **losses)
    gpt = build_model(config, settings)
    load_checkpoint(gpt, sys.argv[1])
    router = gpt.train().decoder.layers[1].mlp.router
    probs, routing_map = router(x)
    (probs.sum() * 0).backward()
    return gpt, settings, router, probs.detach(), routing_map

gpt, settings, router, probs, routing_map = route(moe_aux_loss_coeff=alpha)
found = router.weight.grad.double()

# The report's equations 17 to 20, for each sequence; the choice is that of the affinities alone.
def balance(affinity, choice):
    f = choice.sum(0) * experts / (chosen * len(affinity))
    return alpha * (f * (affinity / affinity.sum(-1, keepdim=True)).mean(0)).sum()

def gradient(of_sequence):
    weight = router.weight.detach().double().requires_grad_(True)
    affinity = torch.sigmoid(x.double() @ weight.t())
    choice = torch.zeros_like(affinity).scatter(-1, affinity.topk(chosen, -1).indices, 1.0)
    if of_sequence == "routed":
        choice = routing_map.view(tokens, sequences, experts).double()
    if of_sequence == "batch":
        loss = balance(affinity.flatten(0, 1), choice.flatten(0, 1))
    else:
        loss = sum(balance(affinity[:, b], choice[:, b]) for b in range(sequences)) / sequences
    (expected,) = torch.autograd.grad(loss, weight)
    return float((found - expected).abs().max() / expected.abs().max())

print("sequence", gradient("sequence"))
print("batch", gradient("batch"))
print("routed", gradient("routed"))

# Megatron's other losses, over the same choice and weights.
for kind in "aux_loss", "global_aux_loss":
    _, _, other, other_probs, _ = route(moe_aux_loss_coeff=alpha, moe_router_load_balancing_type=kind)
    found = other.weight.grad.double()
    print(kind, gradient("batch"), torch.equal(other_probs, probs))
_, _, other, other_probs, _ = route(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=alpha)
weight = router.weight.detach().double().requires_grad_(True)
loss = alpha * torch.logsumexp(x.double().flatten(0, 1) @ weight.t(), -1).square().mean()
(expected,) = torch.autograd.grad(loss, weight)
error = float((other.weight.grad.double() - expected).abs().max() / expected.abs().max())
print("z_loss", error, torch.equal(other_probs, probs))

# No token is dropped, and the counters are integers.
counts = router.local_tokens_per_expert.clone()
assert counts.dtype == torch.int64 and torch.equal(counts, routing_map.sum(0))
assert int(counts.sum()) == tokens * sequences * chosen and (routing_map.sum(1) == chosen).all()
before = router.expert_bias.clone()
_update_router_expert_bias([gpt], settings)
expected = before + gamma * torch.sign(counts.double().mean() - counts).float()
assert torch.equal(router.expert_bias, expected)
print("moved", int((counts.double() < counts.double().mean()).sum()), "up", int((router.expert_bias > before).sum()))
"""


def test_balance_is_the_reports(python: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """The complementary loss of each sequence, and the bias: up by gamma below the mean load, down above it."""
    printed = run([python, "-W", "ignore", "-c", BALANCE, str(tiny_checkpoint("fp32"))]).stdout
    error = {name: float(value) for name, value in re.findall(r"^(sequence|batch|routed) (\S+)$", printed, re.M)}
    others = re.findall(r"^(aux_loss|global_aux_loss|z_loss) (\S+) True$", printed, re.M)
    assert len(others) == 3 and all(float(value) < 1e-5 for _, value in others), printed[-2000:]
    assert error["sequence"] < 1e-5, printed[-2000:]
    # What it is not: one loss for the whole batch, or one that counts the biased, group-limited choice.
    assert error["batch"] > 1e-2 and error["routed"] > 1e-2
    below, up = re.search(r"moved (\d+) up (\d+)", printed).groups()  # type: ignore[union-attr]
    assert below == up and int(up) > 0


# Checkpoints


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_a_checkpoint_survives_the_way_in_and_out(
    dtype: str, python: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    output = tmp_path / "hf"
    train(python, tiny_checkpoint(dtype), "--finetune-from-weights", "--train-iters", 0, "--hf-output", output)
    before, after = weights(tiny_checkpoint(dtype)), weights(output)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in after)


def refusal(python: str, checkpoint: Path, *arguments: str) -> str:
    done = run([python, "-W", "ignore", str(TRAIN), str(checkpoint), *arguments])
    assert done.returncode != 0
    return done.stdout.strip().splitlines()[-1]


def test_missing_expert_is_named(python: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    good = tiny_checkpoint("bf16")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in good.glob("*.json"):
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(good / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    line = refusal(python, broken, "--finetune-from-weights")
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
    arguments: tuple[str, ...], expected: str, python: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    line = refusal(python, tiny_checkpoint("bf16"), *arguments)
    assert line.startswith("error: ") and expected in line


REFUSED = """
import sys
from types import SimpleNamespace
import torch
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import distributed as dist
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.pipeline import require_embedding_group
from dsv3_plugin.profile import profile_for
config = DeepseekV3Config.from_pretrained(sys.argv[1])
for settings in ({"moe_token_dispatcher_type": "allgather"}, {"hidden_dropout": 0.1}, {"layernorm_epsilon": 1e-5},
                 {"context_parallel_size": 2}, {"moe_expert_capacity_factor": 1.0},
                 {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": False},
                 {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
                 {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}):
    try:
        build_model(config, transformer_config(config, profile_for(config), **settings))
    except EngineError as error:
        print(error)

# As if this were the first of two pipeline stages, with the group of first and last stage that is Megatron's default.
parallel_state.get_pipeline_model_parallel_world_size = lambda: 2
parallel_state.get_pipeline_model_parallel_group = parallel_state.get_embedding_group = lambda **_: "both"
dist.get_rank, dist.get_process_group_ranks = (lambda: 0), (lambda group: [0, 1])
for layout in "Etttt|mL", "Ettttm|L", "E|tt|ttm|L":
    stages = PipelineParallelLayerLayout(layout, 2)
    try:
        require_embedding_group(SimpleNamespace(mtp_num_layers=1, pipeline_model_parallel_layout=stages))
        print("accepted", layout)
    except EngineError as error:
        print(error)
"""


def test_settings_that_the_layers_cannot_honour_are_refused(python: str, tiny_checkpoint: TinyCheckpoint) -> None:
    lines = run([python, "-W", "ignore", "-c", REFUSED, str(tiny_checkpoint("bf16"))]).stdout.strip().splitlines()
    refused = [line.split(": ")[1] for line in lines if line.startswith("dsv3-plugin does not serve these options")]
    assert refused == [
        "moe_token_dispatcher_type='allgather'",
        "hidden_dropout=0.1",
        "context_parallel_size=2",
        "moe_expert_capacity_factor=1.0",
    ], lines
    others = [line for line in lines if not line.startswith("dsv3-plugin does not serve")]
    assert "layernorm_epsilon=1e-05, and the checkpoint's configuration says 1e-06" in others.pop(0)
    assert "tensor_model_parallel_size=2 needs sums in as many slices" in others[0]
    assert "set DSV3_REDUCTION_SLICES=2" in others.pop(0)
    assert others.pop(0).startswith("sequence_parallel=False with tensor_model_parallel_size=2")
    assert "recompute_modules=core_attn is not supported, layernorm, mla_up_proj, " in others[0]
    assert "recompute_modules=layernorm needs TransformerEngine" in others[1]
    assert others[2] == "accepted Etttt|mL"
    assert others[3].startswith("the embedding is on ranks [0] of the pipeline [0, 1], and the process group")
    assert others[4].startswith("pipeline_model_parallel_layout has the MTP layer on the first rank")


# The stand-ins


UNTOUCHED = """
import torch
before = torch.cuda.current_device, torch.zeros, torch.Tensor.type, torch.distributed.all_to_all_single
import dsv3_plugin.autograd.bind, dsv3_plugin.layers.model
after = torch.cuda.current_device, torch.zeros, torch.Tensor.type, torch.distributed.all_to_all_single
assert before == after and "megatron_cpu" not in __import__("sys").modules
torch.cuda.is_available = lambda: True
import megatron_cpu
megatron_cpu.install()
assert all(getattr(owner, name) is not function for owner, name, function in megatron_cpu.PATCHES)
print("untouched")
"""


def test_no_stand_in_without_megatron_or_on_a_gpu(python: str) -> None:
    assert run([python, "-c", UNTOUCHED]).stdout.strip() == "untouched"


NO_DEVICE = """
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend import compat
try:
    compat.require_device()
except EngineError as error:
    print(error)
"""


def test_without_stand_ins_a_cpu_is_refused_in_one_line(python: str) -> None:
    (line,) = run([python, "-c", NO_DEVICE]).stdout.strip().splitlines()
    assert line.startswith("Megatron-Core needs a GPU")
