"""Ranks that write into each other's memory, run on a CPU: sums in the tree's order, rows at their places, whoever is
late; and what would go wrong is caught."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
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


# NaN of several kinds (NOTHING of peers.cu first), infinities, zeros, denormals.
ODD_BITS = 0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x807FFFFF


def odd_numbers(rank: int, call: int, words: int) -> torch.Tensor:
    """The same, and in places zeros with signs, infinities, denormals, and NaN of all kinds. In some all ranks have -0,
    whose sum is -0.
    """
    x, generator = numbers(rank, call, words), torch.Generator().manual_seed(1000 * call + rank + 500)
    odd = torch.tensor(ODD_BITS, dtype=torch.int64).to(torch.int32).view(torch.float32)
    chosen = odd[torch.randint(len(odd), x.shape, generator=generator)]
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, chosen, x)
    return torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(call)) < 0.2, -0.0, x)


# Words of a sum: less than a chunk, a chunk that is not full behind many, more than all CTAs take at once.
WORDS = 1, 3, 61, 12, 100, 2, 200
Draw = Callable[[int, int, int], torch.Tensor]


def sums(rank: int, memory: SharedMemory, words: Sequence[int], draw: Draw = numbers) -> list[torch.Tensor]:
    collectives = peers.Collectives(memory.view(rank))
    return [collectives.tree_sum(draw(rank, call, count)) for call, count in enumerate(words)]


def one_nan(x: torch.Tensor) -> torch.Tensor:
    """A card's sums have one NaN, a CPU's have several."""
    return torch.where(x.isnan(), torch.nan, x)


def sums_are_right(ranks: int, words: Sequence[int] = WORDS * 2, draw: Draw = numbers, fill: int = peers.FILL) -> bool:
    memory = SharedMemory.of(ranks, peers.Collectives.bytes_for(ranks), fill)
    found = on_ranks(ranks, lambda rank: sums(rank, memory, words, draw))
    right = [tree_sum([draw(rank, call, count) for rank in range(ranks)]) for call, count in enumerate(words)]
    return all(same_bits(one_nan(x), one_nan(y)) for of_rank in found for x, y in zip(of_rank, right, strict=True))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_have_the_bits_of_the_tree(ranks: int, build: Build) -> None:
    """Small ones at once, large ones by shares or, of two ranks, by all, in turns."""
    build(ranks)
    assert sums_are_right(ranks)


def words_at_once(ranks: int, calls: int) -> list[int]:
    """Of calls in a row: the most that go at once in every third, one in some, any number in others."""
    most, rng = peers._AT_ONCE_BYTES // (ranks - 1) // peers.WORD, random.Random(ranks)
    return [(most, rng.choice([1, most]), rng.randint(1, most))[call % 3] for call in range(calls)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_small_sums_in_a_row(ranks: int, build: Build) -> None:
    build(ranks)
    assert sums_are_right(ranks, words_at_once(ranks, 40), odd_numbers)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_what_goes_at_once_has_room(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of a card: every word has a thread and a place."""
    launched = []
    monkeypatch.setattr(compiler, "launch", lambda *arguments: launched.append(arguments))
    nowhere = peers.View(torch.empty(0, dtype=torch.uint8), (0,) * ranks, 0)
    most = peers._AT_ONCE_BYTES // (ranks - 1) // peers.WORD
    for words in (1, 127, 128, 129, 1792, 16 * 1792, most - 1, most):
        peers.Collectives(nowhere).tree_sum(torch.empty(4 * words))
        program, name, how, (_, _, _, given, chunk) = launched.pop()
        parameters = dict(program.parameters)
        assert name == "fold_at_once" and given == words
        assert (how.grid - 1) * chunk < words <= how.grid * chunk
        assert how.grid <= peers._CTAS and how.block % 32 == 0 and how.block <= parameters["THREADS"]
        # Words of a thread are THREADS apart.
        assert chunk <= (how.block if how.block < parameters["THREADS"] else how.block * parameters["AT_ONCE"])
    room = peers._CTAS * 2 * ranks * parameters["THREADS"] * parameters["AT_ONCE"] * peers.WORD
    assert parameters["AT_ONCE_AT"] % peers.WORD == 0
    assert parameters["AT_ONCE_AT"] + room == peers.Collectives.bytes_for(ranks)
    peers.Collectives(nowhere).tree_sum(torch.empty(4 * (most + 1)))
    assert launched.pop()[1] == ("fold_all" if ranks == 2 else "fold_shares")


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


IN_A_ROW = ("step *= 2)", "step++)"), ("r += 2 * step", "r += RANKS")
# Of so many ranks, by shares or by all: what is replaced.
SABOTAGED_SUMS: dict[str, tuple[int, *tuple[tuple[str, str], ...]]] = {
    "begins with its own": (
        4,
        (
            "if (r != peers.rank && i < words) parts[k][r] = room<float4>(peers, peers.rank, epoch, r)[i];",
            "const int from = (peers.rank + r) % RANKS;"
            " if (r != 0 && i < words) parts[k][r] = room<float4>(peers, peers.rank, epoch, from)[i];",
        ),
    ),
    "adds one after the other": (4, *IN_A_ROW),
    "waits for nobody": (4, ("(int)(load_acquire(flags_of(peers, peers.rank) + r) - epoch) < 0", "false")),
    "waits for the epoch before": (4, ("+ r) - epoch) < 0", "+ r) - epoch) < -1")),
    "does not wait for the last rank": (
        4,
        (
            "for (int r = threadIdx.x; r < RANKS; r += blockDim.x) {\n        const u64",
            "for (int r = threadIdx.x; r < RANKS - 1; r += blockDim.x) {\n        const u64",
        ),
    ),
    "stores the flag before the words": (
        2,
        (
            "            own.store(room<float4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), count);\n"
            "        meet(peers, epoch);\n        add_others",
            "            if (p == 1) meet(peers, epoch);\n"
            "        for (int p = 1; p < RANKS; p++)\n"
            "            own.store(room<float4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), count);\n"
            "        add_others",
        ),
    ),
    "has one half, of shares": (4, ("blockIdx.x * 2 + epoch % 2", "blockIdx.x * 2")),
    "has one half": (2, ("blockIdx.x * 2 + epoch % 2", "blockIdx.x * 2")),
    "a word too far": (
        2,
        ("epoch, peers.rank), count);\n        meet", "epoch, peers.rank) + 1, count);\n        meet"),
    ),
}


@pytest.mark.parametrize("name", SABOTAGED_SUMS)
def test_sabotaged_sums_are_caught(name: str, build: Build) -> None:
    ranks, *replacements = SABOTAGED_SUMS[name]
    build(ranks, *replacements, lag=1000)
    assert not sums_are_right(ranks, [61, 100, 200, 61, 100, 200])


PUTS_BACK = "if (comes(k, r)) store_relaxed(place(k, r), nothing);"
SABOTAGED_AT_ONCE: dict[str, Sequence[tuple[str, str]]] = {
    "begins with its own": [
        ("return r != peers.rank && k", "return r != 0 && k"),
        ("room + (r * AT_ONCE + k)", "room + ((peers.rank + r) % RANKS * AT_ONCE + k)"),
    ],
    "adds one after the other": IN_A_ROW,
    "does not wait": [("while (!complete)", "while (false)")],
    "looks at one number of a word": [
        ("is_nothing(word.x) || is_nothing(word.y) || is_nothing(word.z) || is_nothing(word.w)", "is_nothing(word.x)")
    ],
    "puts nothing back": [(PUTS_BACK, "")],
    "puts nothing back of a word": [(PUTS_BACK, PUTS_BACK.replace("comes(k, r)", "comes(k, r) && k + r > 0"))],
    "empties its room too early": [
        (
            "    bool complete;\n",
            "    bool complete;\n    for (int k = 0; k < AT_ONCE; k++)\n"
            f"        for (int r = 0; r < RANKS; r++) {PUTS_BACK}\n",
        )
    ],
    "empties the next call's room": [
        (PUTS_BACK, PUTS_BACK.replace("place(k, r)", "(room_at_once(peers, peers.rank, call + 1, r) + k)"))
    ],
    "has one room": [("blockIdx.x * 2 + call % 2", "blockIdx.x * 2")],
    "has one room for all CTAs": [("blockIdx.x * 2 + call % 2", "call % 2")],
    "counts no calls": [("remember(peers, call + 1)", "remember(peers, call)")],
    "a word too far": [
        (
            "room_at_once(peers, (peers.rank + p) % RANKS, call, peers.rank), count",
            "room_at_once(peers, (peers.rank + p) % RANKS, call, peers.rank) + 1, count",
        )
    ],
    "sends NOTHING": [("return is_nothing(x) ? __uint_as_float(NAN_OF_SUMS) : x", "return x")],
    "takes -0 for NOTHING": [
        ("NOTHING = 0xFFFFFFFF, NAN_OF_SUMS = 0x7FFFFFFF", "NOTHING = 0x80000000, NAN_OF_SUMS = 0")
    ],
}


@pytest.mark.parametrize("name", SABOTAGED_AT_ONCE)
def test_sabotaged_small_sums_are_caught(name: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATIENCE_SECONDS", 2)
    build(4, *SABOTAGED_AT_ONCE[name], lag=1000)
    assert is_caught(lambda: sums_are_right(4, words_at_once(4, 12), odd_numbers))


def test_memory_that_was_not_filled_is_caught(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATIENCE_SECONDS", 2)
    build(4)
    assert is_caught(lambda: sums_are_right(4, words_at_once(4, 12), odd_numbers, fill=0))


def is_caught(is_right: Callable[[], bool]) -> bool:
    """Wrong, or at an end: ranks wait for what never comes, or read where nothing is."""
    try:
        return not is_right()
    except RuntimeError as error:
        return "ended without an answer" in str(error)


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
def test_sabotaged_rows_are_caught(name: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATIENCE_SECONDS", 2)
    build(3, SABOTAGED_ROWS[name], lag=1000)
    assert is_caught(lambda: all_rows_are_right(3))


@pytest.mark.parametrize("words", [1, 61], ids=["at once", "by flags"])
def test_a_rank_that_does_not_come_ends_the_others(
    words: int, build: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "_PATIENCE_SECONDS", 1)
    build(2)
    memory = SharedMemory.of(2, peers.Collectives.bytes_for(2))

    alone = get_context("fork").Process(target=sums, args=(0, memory, [words]))
    alone.start()
    alone.join(60)
    assert alone.exitcode == 3
    assert "a rank did not come" in capfd.readouterr().err
