"""Cards that write into each other's memory, and ranks that share one: the bits of the process group, eager and in CUDA
graphs, whoever is late.
"""

from __future__ import annotations

import os
import random
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
from dsv3_plugin.layers.linear import quantize
from dsv3_plugin.layers.model import bind_ops, expert_parallel_layers
from dsv3_plugin.layout import Layout
from dsv3_plugin.ops.slices import tree_sum
from dsv3_plugin.peers import connected

TOKENS = 64
# Added and moved like any number: NaN of several kinds (NOTHING of peers.cu first), infinities, zeros, denormals.
ODD_BITS = 0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x807FFFFF
# [rows, 7168] of fp32: of a decode step, of one that is shared by CTAs, of a prompt; and sizes that fill no chunk.
SHAPES = (1, 7168), (3, 4), (128, 7168), (37, 7172), (1, 4), (1024, 7168)


def join(rank: int, ranks: int, experts_alone: bool = False) -> tuple[Layout, torch.device]:
    """A layout over peer memory, on a card of this rank's own if there are enough."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    everyone = group(range(ranks))
    layout = Layout(experts=everyone) if experts_alone else Layout(everyone, everyone)
    layout, reason = connected(layout, device, TOKENS)
    assert reason is None, reason
    return layout, device


def be_late(rng: random.Random) -> None:
    """The card, by up to some milliseconds."""
    torch.cuda._sleep(int(rng.random() ** 4 * 1e7))


def draw(call: int, rank: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * call + rank))


def draw_odd(call: int, rank: int, shape: tuple[int, int]) -> torch.Tensor:
    """Some of them `ODD_BITS`; in places all ranks have -0, whose sum is -0."""
    x, generator = draw(call, rank, shape), torch.Generator().manual_seed(100 * call + rank + 50)
    odd = torch.tensor(ODD_BITS, dtype=torch.int64).to(torch.int32).view(torch.float32)
    chosen = odd[torch.randint(len(odd), shape, generator=generator)]
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, chosen, x)
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(call)) < 0.1, -0.0, x)


def one_nan(x: torch.Tensor) -> torch.Tensor:
    """A card's sums have one NaN, a CPU's have several."""
    return torch.where(x.isnan(), torch.nan, x)


def wrong_sums(ranks: int, twin: bool, rank: int) -> list[str]:
    """What differs from the tree on this rank."""
    layout, device = join(rank, ranks)
    peers, rng, wrong = layout.tensor.peers, random.Random(rank), []
    assert peers is not None
    static = [torch.empty(shape, device=device) for shape in SHAPES]

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        out = [(peers.tree_sum(x), torch.stack(peers.gather(x))) for x in static]
        be_late(rng)
        # In a row, without a gather's flags between them.
        return out + [(peers.tree_sum(x), gathered) for x, (_, gathered) in zip(static * 4, out * 4, strict=True)]

    def fill(call: int) -> list[list[torch.Tensor]]:
        parts = [[draw_odd(call, other, shape) for other in range(ranks)] for shape in SHAPES]
        for x, of_ranks in zip(static, parts, strict=True):
            x.copy_(of_ranks[rank])
        return parts

    def compare(where: str, out: list[tuple[torch.Tensor, torch.Tensor]], parts: list[list[torch.Tensor]]) -> None:
        for shape, (summed, gathered), of_ranks in zip(SHAPES * 5, out, parts * 5, strict=True):
            expected = tree_sum([*of_ranks[1:], of_ranks[0]] if twin else of_ranks)
            sums_agree = same_bits(one_nan(summed.cpu()), one_nan(expected))
            right = sums_agree, same_bits(gathered.cpu(), torch.stack(of_ranks))
            if not all(right):
                wrong.append(f"{where} {shape}: sum {right[0]}, gather {right[1]}")

    for call in range(4):
        parts = fill(call)
        be_late(rng)
        compare(f"eager {call}", run(), parts)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    for call in range(4, 14):
        parts = fill(call)
        be_late(rng)
        graph.replay()
        compare(f"graph {call}", out, parts)
    return wrong


@needs_hopper
@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_and_gathers(ranks: int) -> None:
    found = on_ranks(ranks, partial(wrong_sums, ranks, False), "spawn")
    assert found == [[]] * ranks


@needs_hopper
def test_another_order_is_seen() -> None:
    assert all(on_ranks(4, partial(wrong_sums, 4, True), "spawn"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("peers")
    for dtype in ("bf16", "fp8"):
        make_checkpoint(read_config("sliceable"), root / dtype, 1, dtype=CheckpointDtype(dtype))
    return root


def wrong_layers(path: Path, ranks: int, experts_alone: bool, rank: int) -> list[str]:
    """Where a layer of experts over peer memory differs from the process group's."""
    layout, device = join(rank, ranks, experts_alone)
    reader, rng, wrong = CheckpointReader(path), random.Random(rank), []
    profile = replace(reader.profile(), reduction_slices=1 if experts_alone else ranks)
    ops = bind_ops(reader.config, profile, device, layout=layout)
    layers = expert_parallel_layers(load_model(reader, ops, layout).model)
    tokens = [7 + 20 * other if experts_alone else 37 for other in range(ranks)]
    static = torch.empty(tokens[rank], reader.config.hidden_size, dtype=torch.bfloat16, device=device)

    def run(most_tokens: int | None) -> list[torch.Tensor]:
        layout.begin_pass(most_tokens)
        activation = quantize(ops, static) if ops.quantizes_ahead else static
        return [layer(static, activation) for layer in layers.values()]

    def by_process_group() -> list[torch.Tensor]:
        over_peers = [layer.exchange for layer in layers.values()]
        for layer in layers.values():
            layer.exchange = None
        out = [x.clone() for x in run(None)]
        for layer, exchange in zip(layers.values(), over_peers, strict=True):
            layer.exchange = exchange
        return out

    def fill(call: int) -> None:
        x = draw(call, rank if experts_alone else 0, (tokens[rank], reader.config.hidden_size))
        static.copy_(x if call % 2 else x[:1].expand_as(x))  # all tokens to the same experts

    with torch.inference_mode():
        for call in range(3):
            fill(call)
            expected = by_process_group()
            be_late(rng)
            if not all(map(same_bits, run(max(tokens)), expected)):
                wrong.append(f"eager {call}")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(max(tokens))
        for call in range(3, 9):
            fill(call)
            expected = by_process_group()
            be_late(rng)
            graph.replay()
            if not all(map(same_bits, out, expected)):
                wrong.append(f"graph {call}")
    return wrong


@needs_hopper
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("experts_alone", [True, False], ids=["data parallel", "tensor parallel"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts(checkpoints: Path, dtype: str, experts_alone: bool, ranks: int) -> None:
    found = on_ranks(ranks, partial(wrong_layers, checkpoints / dtype, ranks, experts_alone), "spawn")
    assert found == [[]] * ranks
