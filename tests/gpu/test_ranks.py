"""Ranks that share one card, with gloo between them, print what one rank prints on it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bits import same_bits
from hopper_card import needs_hopper
from ranks import group, on_ranks

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.layout import WHOLE, GroupSlices, Layout
from dsv3_plugin.ops.slices import tree_sum

CARD = torch.device("cuda", 0)
LENGTHS = 600, 20
"""Of sequences: with many rows kernels walk the slices, with few they split them."""


def compute(path: Path, slices: int, layout: Layout, first: int = 0) -> torch.Tensor:
    """Logits of a few sequences, whose tokens begin with `first`, on the CPU."""
    reader = CheckpointReader(path)
    config, profile = reader.config, replace(reader.profile(), reduction_slices=slices)
    ops = bind_ops(config, profile, CARD, layout=layout)
    model = load_model(reader, ops, layout)
    attend = WholeSequences(ops, config)
    logits = []
    for length in LENGTHS:
        # No two ranks have equally many.
        positions = torch.arange(length - first, device=CARD)
        tokens = (positions * 7 + first) % config.vocab_size
        with torch.inference_mode():
            logits.append(model.lm_head(model(tokens, positions, attend)).cpu())
    return torch.cat(logits)


def on_one_card(path: Path, slices: int, shares: str, twin: bool, ranks: int, rank: int) -> torch.Tensor:
    """What a rank computes of a model of which the ranks share `shares`; a twin adds up as it hears from the others."""
    everyone = group(range(ranks))
    if twin:
        GroupSlices.fold = (
            lambda self, branch: tree_sum(  # type: ignore[method-assign]
                [*(parts := self.group.gather(branch))[1:], parts[0]]
            )
        )
    if shares == "experts":
        return compute(path, slices, Layout(experts=everyone), rank)
    return compute(path, slices, Layout(everyone, everyone))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    for dtype in ("bf16", "fp8"):
        make_checkpoint(read_config("sliceable"), root / dtype, 1, dtype=CheckpointDtype(dtype))
    return root


@needs_hopper
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(("slices", "ranks"), [(2, 2), (4, 2), (4, 4)])
def test_tensor_parallel_ranks_on_one_card_have_the_bits_of_one(
    checkpoints: Path, dtype: str, slices: int, ranks: int
) -> None:
    alone = compute(checkpoints / dtype, slices, WHOLE)
    assert alone.isfinite().all() and alone.std() > 0
    for shared in on_ranks(ranks, partial(on_one_card, checkpoints / dtype, slices, "heads", False, ranks), "spawn"):
        assert same_bits(shared, alone)


@needs_hopper
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_spread_experts_on_one_card_have_the_bits_of_one(checkpoints: Path, dtype: str) -> None:
    shared = on_ranks(2, partial(on_one_card, checkpoints / dtype, 1, "experts", False, 2), "spawn")
    for rank, logits in enumerate(shared):
        assert same_bits(logits, compute(checkpoints / dtype, 1, WHOLE, rank))


@needs_hopper
def test_ranks_that_add_as_they_arrive_are_caught(checkpoints: Path) -> None:
    """Two sums have one order, so that this takes more ranks."""
    alone = compute(checkpoints / "bf16", 4, WHOLE)
    shared, *_ = on_ranks(4, partial(on_one_card, checkpoints / "bf16", 4, "heads", True, 4), "spawn")
    assert not same_bits(shared, alone)
