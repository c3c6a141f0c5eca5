"""Reduction slices: products that tensor-parallel ranks share have the bits of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from engines import predict_logits

from dsv3_plugin.autograd.bind import differentiable
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError, KernelError
from dsv3_plugin.hooks import Arithmetic
from dsv3_plugin.layers import linear as layers
from dsv3_plugin.layers.mlp import MLP
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.quantize import E4M3, quantize_weight
from dsv3_plugin.ops.sliced_linear import sliced_linear
from dsv3_plugin.ops.slices import Slices, tree_sum
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, FP32, Profile, profile_for
from dsv3_plugin.registry import Ops

CPU = torch.device("cpu")
CONFIG = DeepseekV3Config.from_dict(read_config("small"))
HIDDEN, INTERMEDIATE = 512, 1024


def ops_for(profile: Profile, slices: int, arithmetic: Arithmetic | None = None) -> Ops:
    return bind_ops(CONFIG, replace(profile, reduction_slices=slices), CPU, arithmetic=arithmetic)


@dataclass(frozen=True)
class Rank(Slices):
    """One of several ranks: `fold` is what the ranks do with their branches."""

    add: Callable[[torch.Tensor], torch.Tensor]

    def fold(self, branch: torch.Tensor) -> torch.Tensor:
        return self.add(branch)


def mlp_weights(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = torch.randn(2, INTERMEDIATE, HIDDEN, generator=generator) * 0.1
    return gate, up, torch.randn(HIDDEN, INTERMEDIATE, generator=generator) * 0.1


def mlp_of(ops: Ops, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> MLP:
    mlp = MLP(ops, HIDDEN, len(gate))
    for module, weight in (mlp.gate_up_proj, torch.cat((gate, up))), (mlp.down_proj, down):
        if module.weight.dtype == E4M3:
            values, scale = quantize_weight(weight, "ue8m0")
            module.weight.data.copy_(values)
            module.weight_scale_inv.data.copy_(scale)
        else:
            module.weight.data.copy_(weight)
    return mlp


def on_ranks(
    profile: Profile,
    slices: int,
    ranks: int,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    add: Callable[[list[torch.Tensor]], torch.Tensor] = tree_sum,
    arithmetic: Arithmetic | None = None,
) -> torch.Tensor:
    """The MLP cut over `ranks`, one after the other in this process; `add` puts their branches together."""
    gate, up, down = weights
    branches: list[torch.Tensor] = []

    def run(rank: int, fold: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ops = replace(ops_for(profile, slices, arithmetic), slices=Rank(slices // ranks, fold))
        parts = gate.chunk(ranks)[rank], up.chunk(ranks)[rank], down.chunk(ranks, 1)[rank]
        return mlp_of(ops, *parts)(x)

    for rank in range(ranks):
        run(rank, lambda branch: branches.append(branch) or branch)
    return run(0, lambda _: add(branches))


@pytest.mark.parametrize("profile", [FP32, BF16, FP8_UE8M0], ids=str)
@pytest.mark.parametrize(("slices", "ranks"), [(2, 2), (4, 2), (4, 4)])
def test_ranks_have_the_bits_of_one(profile: Profile, slices: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(slices)
    weights = mlp_weights(generator)
    x = torch.randn(70, HIDDEN, generator=generator).to(profile.dtype)
    alone = mlp_of(ops_for(profile, slices), *weights)(x)
    assert torch.equal(on_ranks(profile, slices, ranks, x, weights), alone)


@pytest.mark.parametrize("profile", [BF16, FP8_FLOAT32], ids=str)
def test_ranks_have_the_bits_of_one_on_hopper(profile: Profile) -> None:
    """In the model of its arithmetic; the twin adds the ranks' fp32 sums in another order."""
    generator = torch.Generator().manual_seed(2)
    weights = mlp_weights(generator)
    x = torch.randn(3, HIDDEN, generator=generator).to(profile.dtype)
    alone = mlp_of(ops_for(profile, 4, "sm90"), *weights)(x)
    assert torch.equal(on_ranks(profile, 4, 2, x, weights, arithmetic="sm90"), alone)

    def add(branches: list[torch.Tensor]) -> torch.Tensor:
        assert not torch.equal(tree_sum([*branches[1:], branches[0]]), tree_sum(branches))
        return tree_sum(branches)

    assert torch.equal(on_ranks(profile, 4, 4, x, weights, add, "sm90"), alone)


def test_ranks_without_slices_are_caught() -> None:
    """The same comparison fails where one rank does not cut its sum, or the ranks add from left to right."""
    generator = torch.Generator().manual_seed(0)
    weights = mlp_weights(generator)
    x = torch.randn(70, HIDDEN, generator=generator)
    whole = mlp_of(ops_for(FP32, 1), *weights)(x)
    assert not torch.equal(on_ranks(FP32, 2, 2, x, weights), whole)

    def from_left_to_right(branches: list[torch.Tensor]) -> torch.Tensor:
        return ((branches[0] + branches[1]) + branches[2]) + branches[3]

    alone = mlp_of(ops_for(FP32, 4), *weights)(x)
    assert torch.equal(on_ranks(FP32, 4, 4, x, weights), alone)
    assert not torch.equal(on_ranks(FP32, 4, 4, x, weights, from_left_to_right), alone)


def test_the_tree_adds_neighbours_first() -> None:
    one, small = torch.ones(1), torch.full((1,), 2.0**-24)
    # From left to right each small number alone is lost in 1.
    assert tree_sum([one, small, small, small]).item() == 1 + 2.0**-23
    assert (((one + small) + small) + small).item() == 1
    assert tree_sum([one]) is one


@pytest.mark.parametrize("slices", [2, 4])
def test_a_sliced_model_means_the_same(slices: int, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(40))
    whole = predict_logits(tiny_checkpoint("fp32"), tokens)
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", str(slices))
    sliced = predict_logits(tiny_checkpoint("fp32"), tokens)
    assert not torch.equal(sliced, whole)
    assert (sliced - whole).abs().max() < 1e-4


def test_gradients_flow_through_slices() -> None:
    """In fp32 they are those of the whole product, up to rounding; in fp8 the master weights get them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(HIDDEN, INTERMEDIATE, generator=generator) * 0.1
    x = torch.randn(9, INTERMEDIATE, generator=generator)
    for profile in FP32, BF16, FP8_UE8M0:
        gradients = []
        for slices in 1, 4:
            layer = layers.RowLinear(differentiable(ops_for(profile, slices)), INTERMEDIATE, HIDDEN)
            layer.weight.data.copy_(weight)
            layer.weight.requires_grad_(True)
            inputs = x.detach().clone().to(profile.dtype).requires_grad_(True)
            layer(inputs).float().square().sum().backward()
            gradients.append((inputs.grad, layer.weight.grad))
        tolerance = 1e-5 if profile is FP32 else 2e-2
        for whole, sliced in zip(*gradients, strict=True):
            assert (whole - sliced).abs().max() < tolerance * whole.abs().max()


# The setting


@pytest.mark.parametrize("text", ["3", "0", "-2", "two", ""])
def test_only_powers_of_two(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", text)
    with pytest.raises(ConfigError, match="use a power of two"):
        profile_for(CONFIG)


def test_the_profile_says_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    profile = profile_for(CONFIG)
    assert str(profile) == "bf16 in 2 reduction slices"
    assert "profile bf16 in 2 reduction slices, strict mode" in bind_ops(CONFIG, profile, CPU).announcement("x")
    assert str(BF16) == "bf16"


def test_sizes_that_cannot_be_cut_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "16")
    with pytest.raises(ConfigError, match="num_attention_heads=8 has no 16 equal slices"):
        profile_for(CONFIG)
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "4")
    assert profile_for(CONFIG).reduction_slices == 4
    fp8 = read_config("small") | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ConfigError, match=r"n_shared_experts .*=256 has no 4 equal slices of whole blocks of 128"):
        profile_for(DeepseekV3Config.from_dict(fp8))


def test_a_model_without_slices_has_no_kernel_of_them() -> None:
    with pytest.raises(KernelError, match="sliced_linear was called in the bf16 profile, which does not use it"):
        ops_for(BF16, 1)[sliced_linear](torch.zeros(1, 2), torch.zeros(1, 2), 2)
    bound = {choice.op for choice in ops_for(BF16, 2).provenance}
    assert "sliced_linear" in bound and "sliced_fp8_linear" not in bound


@pytest.mark.parametrize(("slices", "products"), [(1, [8]), (2, [4, 4]), (4, [2, 2, 2, 2])])
def test_columns_that_ranks_share_are_products_of_their_own(slices: int, products: list[int]) -> None:
    """On a CPU, whose library may give an output other bits beside more outputs; a rank has no more than its own."""
    ops, made = ops_for(BF16, slices), []
    run = ops.kernels[linear]

    def watched(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
        made.append(len(weight))
        return run(x, weight, **options)

    ops.kernels[linear] = watched
    assert layers.ColumnLinear(ops, 16, 8)(torch.zeros(3, 16).bfloat16()).shape == (3, 8)
    assert made == products
