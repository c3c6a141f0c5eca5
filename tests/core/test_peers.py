"""A model whose ranks write into each other's memory has the bits of one rank; the kernels run on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: kernels over peer memory are not run on this CPU", allow_module_level=True)

import peer_emulation
from peer_emulation import SharedMemory
from ranks import group, on_ranks
from test_layout import SHARED, TOKENS, compute, same

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.cuda.peers import View
from dsv3_plugin.layers.linear import Activation, Quantized
from dsv3_plugin.layers.moe import Experts
from dsv3_plugin.layout import WHOLE, Group, Layout
from dsv3_plugin.peers import PeerMemory, _wrong_rows, connected

ROOM = 1 << 21


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("peers")

    def get(dtype: str) -> Path:
        if not (root / dtype).exists():
            make_checkpoint(SHARED, root / dtype, 1, dtype=CheckpointDtype(dtype))
        return root / dtype

    return get


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Kernels for so many ranks; and experts that leave the rows alone that mean nothing, as a card's do."""
    peer_emulation.shrink(monkeypatch)
    forward = Experts.forward

    def of_the_rows_that_came(self: Experts, x: Activation, counts: torch.Tensor) -> torch.Tensor:
        total, rows = int(counts.sum()), len(x[0]) if isinstance(x, Quantized) else len(x)
        came = Quantized(*(part[:total] for part in x)) if isinstance(x, Quantized) else x[:total]
        out = forward(self, came, counts)
        return torch.cat((out, out.new_full((rows - total, out.shape[1]), torch.nan)))

    monkeypatch.setattr(Experts, "forward", of_the_rows_that_came)

    def emulate(ranks: int, *replacements: tuple[str, str]) -> None:
        library = peer_emulation.build(tmp_path, ranks, replacements)
        monkeypatch.setattr(compiler, "launch", peer_emulation.launch_on(library, 20))

    return emulate


def with_memory(alone: Group, memories: list[SharedMemory], tokens: int) -> Group:
    """The group over memory that was made before its ranks were, each part of it for one use."""
    left = iter(memories)

    def allocate(size: int) -> View:
        assert size <= ROOM, size
        return next(left).view(alone.rank)

    return replace(alone, peers=PeerMemory(allocate, alone.size, tokens))


def memories(ranks: int) -> list[SharedMemory]:
    return [SharedMemory.of(ranks, ROOM) for _ in range(3)]


@pytest.mark.parametrize(("dtype", "slices", "ranks"), [("bf16", 4, 4), ("fp8", 2, 2), ("fp32", 4, 2)])
def test_tensor_parallel_peers_have_the_bits_of_one_rank(
    dtype: str, slices: int, ranks: int, checkpoints: Callable[[str], Path], emulated: Callable[..., None]
) -> None:
    emulated(ranks)
    path, shared = checkpoints(dtype), memories(ranks)
    alone = compute(path, slices, WHOLE, TOKENS)

    def work(rank: int) -> bool:
        everyone = with_memory(group(range(ranks)), shared, 64)
        layout = Layout(everyone, everyone)
        return same(compute(path, slices, layout, TOKENS), alone)

    assert on_ranks(ranks, work) == [True] * ranks


def spread(ranks: int, counts: tuple[int, ...], path: Path, room: int = 40) -> list[bool]:
    """Of each rank, whether it has the bits of one rank where each has tokens of its own."""
    shared = memories(ranks)
    alone = [compute(path, 1, WHOLE, TOKENS[:count] + rank) for rank, count in enumerate(counts)]

    def work(rank: int) -> bool:
        layout = Layout(experts=with_memory(group(range(ranks)), shared, room))
        layout.begin_pass(max(counts))
        return same(compute(path, 1, layout, TOKENS[: counts[rank]] + rank), alone[rank])

    return on_ranks(ranks, work)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("counts", [(37, 5), (3, 37, 1, 2)], ids=str)
def test_spread_experts_over_peers_have_the_bits_of_one_rank(
    dtype: str, counts: tuple[int, ...], checkpoints: Callable[[str], Path], emulated: Callable[..., None]
) -> None:
    emulated(len(counts))
    assert spread(len(counts), counts, checkpoints(dtype)) == [True] * len(counts)


def test_more_tokens_than_there_is_room_for_go_by_the_process_group(
    checkpoints: Callable[[str], Path], emulated: Callable[..., None]
) -> None:
    emulated(2, ("    meet(peers, epoch);\n    const int held", '    printf("used"), exit(4);\n    const int held'))
    assert spread(2, (37, 5), checkpoints("bf16"), room=36) == [True] * 2


def test_rows_that_come_back_elsewhere_are_caught(
    checkpoints: Callable[[str], Path], emulated: Callable[..., None]
) -> None:
    emulated(2, ("(size_t)(back ? before : above) * row_words;", "(size_t)(back ? before ^ 1 : above) * row_words;"))
    assert not all(spread(2, (37, 5), checkpoints("bf16")))


ONE_ROW_TOO_FAR = "(size_t)(back ? before : above) * row_words;", "(size_t)(back ? before : above + 1) * row_words;"
BACK_ELSEWHERE = "(size_t)(back ? before : above) * row_words;", "(size_t)(back ? before ^ 1 : above) * row_words;"


@pytest.mark.parametrize(
    ("ranks", "fault", "found"),
    [
        (2, (), set()),
        (3, (), set()),
        (2, (ONE_ROW_TOO_FAR,), {"experts' rows arrive wrong over peer memory"}),
        (2, (BACK_ELSEWHERE,), {"experts' rows come back wrong over peer memory"}),
    ],
    ids=["of 2", "of 3", "there", "back"],
)
def test_experts_rows_are_looked_at_before_they_are_used(
    ranks: int, fault: tuple[tuple[str, str], ...], found: set[str], emulated: Callable[..., None]
) -> None:
    emulated(ranks, *fault)
    shared = memories(ranks)

    def work(rank: int) -> list[str]:
        everyone = with_memory(group(range(ranks)), shared, 64)
        assert isinstance(everyone.peers, PeerMemory)
        return _wrong_rows(everyone.peers, everyone, torch.device("cpu"))

    assert {reason for reasons in on_ranks(ranks, work) for reason in reasons} == found


def test_ranks_on_a_cpu_keep_their_process_group() -> None:
    def work(rank: int) -> tuple[bool, str | None]:
        everyone = group(range(2))
        layout, reason = connected(Layout(everyone, everyone), torch.device("cpu"), 8)
        return layout.tensor.peers is None and layout.experts.peers is None, reason

    assert on_ranks(2, work) == [(True, "ranks are not CUDA devices")] * 2
    assert connected(WHOLE, torch.device("cpu"), 8) == (WHOLE, None)


def test_a_reason_of_one_rank_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> str | None:
        if rank == 1:
            monkeypatch.setenv("DSV3_PEER_MEMORY", "off")
        monkeypatch.setattr("dsv3_plugin.peers._reason", _reason_of(rank))
        return connected(Layout(experts=group(range(2))), torch.device("cpu"), 8)[1]

    assert on_ranks(2, work) == ["rank 1 has none"] * 2


def _reason_of(rank: int) -> Callable[..., str | None]:
    return lambda group, device: "rank 1 has none" if rank else None
