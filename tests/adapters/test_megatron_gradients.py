"""Megatron's gradients: those of the core, equal where activations are recomputed, and the report's balance."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from megatron_programs import needs_megatron, printed, warm

pytestmark = needs_megatron

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
from dsv3_plugin.layers.attend import WholeSequences
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

attend = WholeSequences(ops, config)
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


def test_megatrons_gradients_are_the_cores(tiny_checkpoint: TinyCheckpoint) -> None:
    """The dispatcher, Megatron's losses and the MTP layer's place change no gradient, in fp32, beyond rounding."""
    said = printed(warm("-c", GRADIENTS, tiny_checkpoint("fp32")))
    assert "worst" in said, said[-2000:]
    worst = float(said.split("worst")[1].split()[0])
    print(f"largest difference over a gradient's largest element: {worst:.1e}")
    assert worst < 1e-5


RECOMPUTED = """
import sys
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.megatron_backend import layers
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import fingerprint, load_checkpoint, save_checkpoint

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
config = reader.config
ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
calls, forwards = [], []

def gradients(**settings):
    gpt = build_model(config, transformer_config(config, reader.profile(), **settings))
    load_checkpoint(gpt, sys.argv[1])
    gpt.train()
    calls.clear()
    positions = torch.arange(40).expand(2, -1)
    losses = gpt(ids, positions, None, labels=ids.roll(-1, 1))
    losses.mean().backward()
    forwards.append([losses.detach(), gpt(ids, positions, None).detach()])
    with torch.no_grad():
        gpt.eval()
        forwards.append([gpt(ids, positions, None, labels=ids.roll(-1, 1)), gpt(ids, positions, None)])
    return {name: parameter.grad for name, parameter in gpt.named_parameters()}

# Losses and logits of all forward passes so far: in training and in evaluation, whatever is recomputed.
def of_one_kind():
    return all(torch.equal(*pair) for other in forwards for pair in zip(other, forwards[0], strict=True))

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
print("forwards", len(forwards), of_one_kind())

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
def drifting(self, queries):
    return up_project(self, queries * (1 + 2.0**-7 * torch.is_grad_enabled()))
layers.MLA.up_project = drifting
found = gradients(recompute_granularity="selective", recompute_modules=["mla_up_proj"])
print("twin", "equal" if all(torch.equal(found[name], expected[name]) for name in expected) else "different")
gradients()
print("drifts", of_one_kind())
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_recomputed_activations_give_equal_gradients_and_weights_their_fingerprint(
    dtype: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    said = printed(warm("-c", RECOMPUTED, tiny_checkpoint(dtype), tmp_path / "hf"))
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert f"held True\nmoved {expert}\nexported True\n" in said, said[-2000:]
    # Nothing and each of the seven settings, in training and in evaluation; and the twin.
    assert "forwards 16 True\n" in said and "drifts False\n" in said, said[-2000:]
    results = re.findall(r"^(\[.*\]|full|twin) (equal|different) ?(\d*)$", said, re.MULTILINE)
    assert [what for what, *_ in results] == [
        "['layernorm']",
        "['mla_up_proj']",
        "['mlp']",
        "['moe']",
        "['shared_experts']",
        "['layernorm', 'mla_up_proj', 'mlp']",
        "full",
        "twin",
    ], said[-2000:]
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


def test_balance_is_the_reports(tiny_checkpoint: TinyCheckpoint) -> None:
    """The complementary loss of each sequence, and the bias: up by gamma below the mean load, down above it."""
    said = printed(warm("-c", BALANCE, tiny_checkpoint("fp32")))
    error = {name: float(value) for name, value in re.findall(r"^(sequence|batch|routed) (\S+)$", said, re.M)}
    others = re.findall(r"^(aux_loss|global_aux_loss|z_loss) (\S+) True$", said, re.M)
    assert len(others) == 3 and all(float(value) < 1e-5 for _, value in others), said[-2000:]
    assert error["sequence"] < 1e-5, said[-2000:]
    # What it is not: one loss for the whole batch, or one that counts the biased, group-limited choice.
    assert error["batch"] > 1e-2 and error["routed"] > 1e-2
    below, up = re.search(r"moved (\d+) up (\d+)", said).groups()  # type: ignore[union-attr]
    assert below == up and int(up) > 0
