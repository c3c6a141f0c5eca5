"""Ranks that write into each other's memory, run on a CPU: sums in the tree's order, rows at their places, whoever is
late; and what would go wrong is caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: kernels over peer memory are not run on this CPU", allow_module_level=True)

import peer_emulation
from bits import same_bits
from peer_emulation import SharedMemory
from ranks import on_ranks

from dsv3_plugin.kernels.cuda import compiler, peers
from dsv3_plugin.ops.permute import sort_by_expert
from dsv3_plugin.ops.slices import tree_sum

LAG = 200
Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Kernels for so many ranks are those that are launched from now on."""
    peer_emulation.shrink(monkeypatch)

    def build(count: int, *replacements: tuple[str, str], lag: int = LAG) -> None:
        library = peer_emulation.build(tmp_path, count, replacements)
        monkeypatch.setattr(compiler, "launch", peer_emulation.launch_on(library, lag))

    return build


def numbers(rank: int, call: int, words: int) -> torch.Tensor:
    """Of very different sizes, so that the order of a sum is seen."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    sizes = torch.randint(-12, 12, (4 * words,), generator=generator)
    return torch.randn(4 * words, generator=generator) * 2.0**sizes


# Words of a sum: less than a chunk, a chunk that is not full behind many, more than all CTAs take at once.
WORDS = 1, 3, 61, 12, 100, 2, 200


def sums(ranks: int, rank: int, memory: SharedMemory) -> list[torch.Tensor]:
    collectives = peers.Collectives(memory.view(rank))
    return [collectives.tree_sum(numbers(rank, call, words)) for call, words in enumerate(WORDS * 2)]


def expected_sums(ranks: int) -> list[torch.Tensor]:
    of_ranks = ([numbers(rank, call, words) for rank in range(ranks)] for call, words in enumerate(WORDS * 2))
    return [tree_sum(parts) for parts in of_ranks]


def all_sums_are_right(ranks: int) -> bool:
    memory = SharedMemory.of(ranks, peers.Collectives.bytes_for(ranks))
    found = on_ranks(ranks, lambda rank: sums(ranks, rank, memory))
    right = expected_sums(ranks)
    return all(same_bits(x, y) for of_rank in found for x, y in zip(of_rank, right, strict=True))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_have_the_bits_of_the_tree(ranks: int, build: Build) -> None:
    """Small ones by all, large ones by shares, in turns."""
    build(ranks)
    assert all_sums_are_right(ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathers_beside_sums(ranks: int, build: Build) -> None:
    build(ranks)
    memory = SharedMemory.of(ranks, peers.Collectives.bytes_for(ranks))

    def work(rank: int) -> list[torch.Tensor]:
        collectives = peers.Collectives(memory.view(rank))
        gathered = []
        for call, words in enumerate(WORDS):
            gathered.append(collectives.gather(numbers(rank, call, words).view(2, -1)))
            if ranks == 2:
                collectives.tree_sum(numbers(rank, call, 50))
        return gathered

    for of_rank in on_ranks(ranks, work):
        for call, (words, found) in enumerate(zip(WORDS, of_rank, strict=True)):
            assert same_bits(found, torch.stack([numbers(r, call, words).view(2, -1) for r in range(ranks)]))


SABOTAGED_SUMS = {
    "begins with its own": (
        "if (r != peers.rank && i < words) parts[k][r] = room<float4>(peers, peers.rank, epoch, r)[i];",
        "const int from = (peers.rank + r) % RANKS;"
        " if (r != 0 && i < words) parts[k][r] = room<float4>(peers, peers.rank, epoch, from)[i];",
    ),
    "adds one after the other": (
        "    return parts[0];",
        "    return parts[0];\n}\n"
        "float4 in_a_row(float4 (&p)[RANKS]) {\n    float4 s = p[0];\n    for (int r = 1; r < RANKS; r++)\n"
        "        s = make_float4(s.x + p[r].x, s.y + p[r].y, s.z + p[r].z, s.w + p[r].w);\n    return s;",
    ),
    "waits for nobody": ("(int)(load_acquire(flags_of(peers, peers.rank) + r) - epoch) < 0", "false"),
    "waits for the epoch before": ("+ r) - epoch) < 0", "+ r) - epoch) < -1"),
    "does not wait for the last rank": (
        "for (int r = threadIdx.x; r < RANKS; r += blockDim.x) {\n        const u64",
        "for (int r = threadIdx.x; r < RANKS - 1; r += blockDim.x) {\n        const u64",
    ),
    "stores the flag before the words": (
        "            own.store(room<float4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), count);\n"
        "        meet(peers, epoch);\n        add_others",
        "            if (p == 1) meet(peers, epoch);\n"
        "        for (int p = 1; p < RANKS; p++)\n"
        "            own.store(room<float4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), count);\n"
        "        add_others",
    ),
    "has one half": ("blockIdx.x * 2 + epoch % 2", "blockIdx.x * 2"),
    "a word too far": (
        "epoch, peers.rank), count);\n        meet",
        "epoch, peers.rank) + 1, count);\n        meet",
    ),
}


@pytest.mark.parametrize("name", SABOTAGED_SUMS)
def test_sabotaged_sums_are_caught(name: str, build: Build) -> None:
    replacements = [SABOTAGED_SUMS[name]]
    if name == "adds one after the other":
        replacements.append(("tree_sum(parts[k]);", "in_a_row(parts[k]);"))
    build(4, *replacements, lag=1000)
    assert not all_sums_are_right(4)


# The experts' exchange.

SLOTS, TOPK, HIDDEN = 12, 3, 48
SIZES = peers.Sizes(SLOTS, (HIDDEN, 16), 2 * HIDDEN, own_rows=7 * TOPK, rows=4 * 7 * TOPK)
LAYERS = 6


def chosen(ranks: int, rank: int, layer: int) -> torch.Tensor:
    """Slots [T, k] of a rank's tokens, which may be none; in some layers all are of few slots."""
    generator = torch.Generator().manual_seed(100 * layer + rank)
    tokens = (layer + 3 * rank) % 8 if ranks < 4 else 7
    favoured = torch.zeros(SLOTS)
    if layer % 3 == 1:
        favoured[layer : layer + TOPK] = 10
    return (torch.rand(tokens, SLOTS, generator=generator) + favoured).topk(TOPK).indices.sort(1).values


def row_of(rank: int, layer: int, row: int) -> torch.Tensor:
    return torch.randn(HIDDEN // 4, generator=torch.Generator().manual_seed(rank * 7919 + layer * 104729 + row))


def at_the_experts(ranks: int, rank: int, memory: SharedMemory) -> list[tuple[torch.Tensor, ...]]:
    """(rows that came, with where they came from, how many for each slot, what came back), of each layer."""
    exchange = peers.Exchange(memory.view(rank), SIZES)
    seen = []
    for layer in range(LAYERS):
        rows, _, counts = sort_by_expert(chosen(ranks, rank, layer), SLOTS)
        own = len(rows)
        x = torch.stack([row_of(rank, layer, i) for i in range(own)] or [torch.zeros(HIDDEN // 4)])[:own]
        origin = torch.tensor([[rank, i, layer, 7] for i in range(own)], dtype=torch.int32).reshape(own, 4)
        (came, origins), own_counts = exchange.send((x, origin), counts, 7 * TOPK * ranks)
        total = int(own_counts.sum())
        out = torch.full((len(came), HIDDEN), torch.nan, dtype=torch.bfloat16)
        out[:total] = came[:total].view(torch.float32).repeat(1, 4).to(torch.bfloat16) * 2
        back = exchange.send_back(out, own)
        seen.append((came[:total].clone(), origins[:total].clone(), own_counts, back.clone()))
    return seen


def all_rows_are_right(ranks: int) -> bool:
    memory = SharedMemory.of(ranks, peers.Exchange.bytes_for(ranks, SIZES))
    found = on_ranks(ranks, lambda rank: at_the_experts(ranks, rank, memory))
    held = SLOTS // ranks
    for layer in range(LAYERS):
        pairs = [  # in the order in which they shall lie: by slot, by rank, by the rank's own order
            (slot, rank, row)
            for rank in range(ranks)
            for row, slot in enumerate(chosen(ranks, rank, layer).flatten().sort(stable=True).values.tolist())
        ]
        for rank in range(ranks):
            came, origins, counts, back = found[rank][layer]
            own = sorted(pair for pair in pairs if pair[0] // held == rank)
            if origins.view(torch.int32)[:, :2].tolist() != [[source, row] for _, source, row in own]:
                return False
            if counts.tolist() != [sum(pair[0] == rank * held + i for pair in own) for i in range(held)]:
                return False
            rows = [row_of(source, layer, row) for _, source, row in own]
            if not same_bits(came.view(torch.float32), torch.stack(rows) if rows else came.view(torch.float32)):
                return False
            sent = [row_of(rank, layer, row) for _, source, row in pairs if source == rank]
            expected = (torch.stack(sent).repeat(1, 4).to(torch.bfloat16) * 2) if sent else back
            if not same_bits(back, expected):
                return False
    return True


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_go_to_their_experts_and_back(ranks: int, build: Build) -> None:
    build(ranks)
    assert all_rows_are_right(ranks)


SABOTAGED_ROWS = {
    "a row too far": (
        "(size_t)(back ? before : above) * row_words;",
        "(size_t)(back ? before : above + 1) * row_words;",
    ),
    "forgets the ranks before": ("r < source ? slot + 1 : slot", "slot"),
    "counts another rank's rows": ("before += counts[source * slots + i]", "before += counts[i]"),
    "does not wait for counts": (
        "    meet(peers, epoch);\n    const int held",
        "    for (int r = 0; r < RANKS; r++) store_release(flags_of(peers, r) + peers.rank, epoch);\n"
        "    const int held",
    ),
    "does not wait for rows": (
        "    meet(peers, epoch);\n    remember(peers, epoch);\n}",
        "    for (int r = 0; r < RANKS; r++) store_release(flags_of(peers, r) + peers.rank, epoch);\n"
        "    remember(peers, epoch);\n}",
    ),
    "goes back to the owner": ("back ? source : owner", "owner"),
}


@pytest.mark.parametrize("name", SABOTAGED_ROWS)
def test_sabotaged_rows_are_caught(name: str, build: Build) -> None:
    build(3, SABOTAGED_ROWS[name], lag=1000)
    assert not all_rows_are_right(3)


def test_a_rank_that_does_not_come_ends_the_others(
    build: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "_PATIENCE_SECONDS", 1)
    build(2)
    memory = SharedMemory.of(2, peers.Collectives.bytes_for(2))

    alone = get_context("fork").Process(target=sums, args=(2, 0, memory))
    alone.start()
    alone.join(60)
    assert alone.exitcode == 3
    assert "a rank did not come" in capfd.readouterr().err
