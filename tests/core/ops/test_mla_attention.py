"""Attention over a latent cache in pages: splits, key blocks and the fold of splits, against plain fp32 and fp64."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from bits import FLOATS, generator, normal, same_bits
from plain import plain_fold

from dsv3_plugin.ops import mla_attention, products, tile
from dsv3_plugin.ops.elementary import LOG2_E, exp2_of_nonpositive
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.paged_batch import PagedBatch

Tensor = torch.Tensor

HEADS, LATENT, ROTARY = 2, 32, 8
SCALE = 0.3


def poisoned_pages(keys: list[Tensor], block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys [L, C] of each request on shuffled pages; every slot that holds no token is NaN. Returns (cache, table)."""
    counts = [-(-len(k) // block_size) for k in keys]
    order = torch.randperm(sum(counts) + 3, generator=generator(seed)).tolist()
    cache = torch.full((len(order), block_size, LATENT + ROTARY), torch.nan, dtype=keys[0].dtype)
    table = torch.full((len(keys), max(counts) + 1), len(order) - 1)
    for request, (own, count) in enumerate(zip(keys, counts, strict=True)):
        for i in range(count):
            block = table[request, i] = order.pop()
            part = own[i * block_size : (i + 1) * block_size]
            cache[block, : len(part)] = part
    return cache, table


def attend(
    queries: list[Tensor],
    keys: list[Tensor],
    block_size: int = 64,
    seed: int = 0,
    chosen: KeySelection = ALL_KEYS,
) -> list[Tensor]:
    """The last tokens of each request, all in one batch."""
    cache, table = poisoned_pages(keys, block_size, seed)
    counts = [len(q) for q in queries]
    q, lengths = torch.cat(queries), torch.tensor([len(k) for k in keys])
    batch = PagedBatch.of(q, cache, table, lengths, torch.tensor([0, *counts]).cumsum(0))
    out = mla_attention.mla_attention(q, cache, batch, chosen, kv_lora_rank=LATENT, scale=SCALE)
    return list(out.split(counts))


def sequence(length: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries [L, H, C] and keys [L, C] of a whole sequence."""
    return (
        normal(length, HEADS, LATENT + ROTARY, seed=seed, dtype=dtype),
        normal(length, LATENT + ROTARY, seed=seed + 1000, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_pages_chunks_and_batch_mates_change_no_bit(block_size: int, dtype: torch.dtype) -> None:
    q, keys = sequence(200, 0, dtype)
    (whole,) = attend([q], [keys], block_size=200)
    assert whole.isfinite().all()
    assert same_bits(attend([q], [keys], block_size, seed=1)[0], whole), "shuffled pages"
    for chunks in ([1] * 200, [64, 64, 64, 8], [63, 1, 66, 70], [199, 1], [5, 195]):
        end, parts = 0, []
        for chunk in chunks:
            parts += attend([q[end : end + chunk]], [keys[: end + chunk]], block_size)
            end += chunk
        assert same_bits(torch.cat(parts), whole), f"chunks {chunks[:4]}"
    mates = [sequence(length, length, dtype) for length in (1, 65, 300)]
    others = [(mates[0][0], mates[0][1]), (mates[1][0][-3:], mates[1][1]), (mates[2][0][-70:], mates[2][1])]
    batch = [others[0], (q[-20:], keys), others[1], (q[:130], keys[:130]), others[2]]
    found = attend([b[0] for b in batch], [b[1] for b in batch], block_size, seed=2)
    assert same_bits(found[1], whole[-20:]) and same_bits(found[3], whole[:130]), "batch mates"
    for i, (mate_q, mate_keys) in zip((0, 2, 4), others, strict=True):
        assert same_bits(found[i], attend([mate_q], [mate_keys])[0])


def plain_attention(q: Tensor, keys: Tensor) -> Tensor:
    """One query [H, C] after all `keys` [L, C], split by split, block by block; only the matrix products are the
    library's.
    """
    f = np.float32

    def exp2(x: np.ndarray) -> np.ndarray:
        return exp2_of_nonpositive(torch.from_numpy(x)).numpy()

    def split_triple(keys: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        largest, total, output = np.full((HEADS, 1), -np.inf, f), np.zeros((HEADS, 1), f), np.zeros((HEADS, LATENT), f)
        for start in range(0, len(keys), 64):
            block = torch.zeros(64, LATENT + ROTARY)
            block[: len(keys) - start] = keys[start : start + 64].float()
            scores = tile.tiled_linear(q.float(), block).numpy()
            scores[:, len(keys) - start :] = -np.inf
            factor = f(SCALE * LOG2_E)
            # Products are exact in fp64; the second rounding of a difference shows once in 2**29.
            products = scores.astype(np.float64) * np.float64(factor)
            new = np.maximum(largest, (np.ceil(products.max(1, keepdims=True) / 8) * 8).astype(f))
            p, alpha = exp2((products - new).astype(f)), exp2(largest - new)
            p = torch.from_numpy(p).to(q.dtype).float().numpy()
            sums = np.array([[plain_fold(list(row), 64)] for row in p])
            values = block[:, :LATENT].t().contiguous()
            total = total * alpha + sums
            output = output * alpha + tile.tiled_linear(torch.from_numpy(p).to(q.dtype).float(), values).numpy()
            largest = new
        return largest, total, output

    largest, total, output = split_triple(keys[:1024])
    for start in range(1024, len(keys), 1024):
        behind = split_triple(keys[start : start + 1024])
        new = np.maximum(largest, behind[0])
        ours, theirs = exp2(largest - new), exp2(behind[0] - new)
        total, output = total * ours + behind[1] * theirs, output * ours + behind[2] * theirs
        largest = new
    return torch.from_numpy(output * (f(1) / total)).to(q.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_in_plain_fp32(dtype: torch.dtype) -> None:
    q, keys = sequence(150, 0, dtype)
    (out,) = attend([q], [keys], 16)
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 149):
        assert same_bits(out[position], plain_attention(q[position], keys[: position + 1]))


# Queries that see the last key of a split, and those that see one or two of the next.
BORDERS = (1022, 1023, 1024, 1025, 2047, 2048, 2049, 3071, 3072)


@pytest.fixture(scope="module")
def long() -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of 3100 tokens, and the attention of all of them at once."""
    q, keys = sequence(3100, 0, torch.bfloat16)
    return q, keys, attend([q], [keys])[0]


def test_splits_in_plain_fp32(long: tuple[Tensor, Tensor, Tensor]) -> None:
    q, keys, whole = long
    for position in (*BORDERS, 3099):
        assert same_bits(whole[position], plain_attention(q[position], keys[: position + 1]))


def test_decode_chunks_and_batches_across_the_borders_of_splits(long: tuple[Tensor, Tensor, Tensor]) -> None:
    q, keys, whole = long
    for position in BORDERS:
        (alone,) = attend([q[position : position + 1]], [keys[: position + 1]])
        assert same_bits(alone[0], whole[position]), f"decode at {position}"
        (two,) = attend([q[position - 1 : position + 1]], [keys[: position + 1]], 16)
        assert same_bits(two, whole[position - 1 : position + 1]), f"verify at {position}"
        first, second = attend([q[:70], q[position - 65 : position + 1]], [keys[:70], keys[: position + 1]], seed=3)
        assert same_bits(first, whole[:70]) and same_bits(second, whole[position - 65 : position + 1])


def split_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter splits for fewer queries, as a kernel chooses that fills its card."""
    honest = mla_attention.attend

    def by_batch(machine: products.Products, queries: Tensor, *args: object) -> Tensor:
        monkeypatch.setattr(mla_attention, "SPLIT_KEYS", 1024 if len(queries) > 8 else 256)
        return honest(machine, queries, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(mla_attention, "attend", by_batch)


@pytest.mark.parametrize("split", [512, 2048, 4096])
def test_another_split_gives_other_bits(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: where the keys are cut is part of the arithmetic, if only of its last bits."""
    q, keys = sequence(3100, 0, torch.float32)
    (honest,) = attend([q[-20:]], [keys])
    monkeypatch.setattr(mla_attention, "SPLIT_KEYS", split)
    (other,) = attend([q[-20:]], [keys])
    assert int((other != honest).sum()) > 20
    assert (other - honest).abs().max() < 1e-5


def test_splits_chosen_by_the_batch_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = sequence(3100, 0, torch.float32)
    (honest,) = attend([q[-20:]], [keys])
    split_by_batch(monkeypatch)
    (many,) = attend([q[-20:]], [keys])
    assert same_bits(many, honest)
    (few,) = attend([q[-2:]], [keys])
    assert not same_bits(few, honest[-2:])


def test_another_order_of_the_fold_is_caught() -> None:
    q, keys = sequence(3100, 0, torch.float32)
    rows = q[-20:].flatten(0, 1)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, -len(keys) % 64))
    a, b, c = (
        mla_attention.attend_split(products.CPU, rows, HEADS, 3080 - start, part, LATENT, SCALE)
        for start, part in zip((0, 1024, 2048), keys.split(1024), strict=False)
    )
    fold = mla_attention.fold
    left, right = fold(fold(a, b), c), fold(a, fold(b, c))
    assert int((left.output != right.output).sum()) > 100
    assert torch.allclose(left.output / left.total, right.output / right.total, rtol=1e-4, atol=1e-6)


def float64_attention(q: Tensor, keys: Tensor) -> Tensor:
    scores = torch.einsum("qhc,kc->hqk", q.double(), keys.double()) * SCALE
    future = torch.ones(len(q), len(keys), dtype=torch.bool).triu(len(keys) - len(q) + 1)
    return torch.einsum("hqk,kc->qhc", scores.masked_fill(future, -torch.inf).softmax(-1), keys[:, :LATENT].double())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_attention_against_float64(dtype: torch.dtype, bound: float) -> None:
    """Measured: 1.6e-6 and 9.2e-3, of values up to 3.1."""
    q, keys = sequence(300, 0, dtype)
    exact = float64_attention(q, keys)
    error = float((attend([q], [keys])[0] - exact).abs().max())
    print(f"{dtype}: {error:.2e} of {float(exact.abs().max()):.2f}")
    assert error < bound
    # One more key seen, or one fewer, is far outside.
    ahead = float64_attention(torch.cat((q, q[:1])), torch.cat((keys, keys[:1])))[1:]
    assert (ahead - exact).abs().max() > 10 * bound


@pytest.mark.parametrize("key_block", [16, 128])
def test_another_key_block_gives_other_bits(key_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a kernel that splits the keys in another way is another arithmetic."""
    q, keys = sequence(200, 0, torch.float32)
    (whole,) = attend([q], [keys])
    monkeypatch.setattr(mla_attention, "KEY_BLOCK", key_block)
    (other,) = attend([q], [keys])
    assert int((other != whole).sum()) > 100
    assert (other - whole).abs().max() < 1e-5


def test_large_scores_neither_overflow_nor_leak() -> None:
    """What rounds a probability rounds its sum: a key that is alone is returned as it is."""
    q, keys = sequence(130, 0, torch.bfloat16)
    keys[100] = q[-1, 0] * 1000
    (out,) = attend([q], [keys])
    assert out.isfinite().all()
    assert (out[-1, 0] - keys[100, :LATENT]).abs().max() == 0
    assert same_bits(out[:100], attend([q[:100]], [keys[:100]])[0])


def test_maxima_are_the_next_multiples_of_eight() -> None:
    """Up to 2**27 the next integer multiple, beyond the next fp32 number: never below the product."""
    x = normal(4000, seed=1) * torch.exp2(torch.linspace(-140, 29, 4000))
    y = normal(4000, seed=2)
    exact, found = x.double() * y.double(), mla_attention.step_above(x, y).double()
    assert (found >= exact).all() and (found % 8 == 0).all()
    assert (found - exact <= torch.clamp(exact.abs() * 2**-23, min=8)).all()
    assert (((x * y / 8).ceil() * 8).double() < exact).any(), "the twin: rounded once more than up"


def test_scores_that_fp32_barely_tells_apart() -> None:
    """The product of score and factor is not rounded before the maximum is subtracted: no probability exceeds one."""
    q, keys = sequence(70, 0, torch.bfloat16)
    keys[3] = q[-1, 0]
    q, keys = q * 2.0**12, keys * 2.0**12
    (out,) = attend([q], [keys])
    print("largest score in units of log 2:", float((q[-1, 0].float() @ keys[3].float()) * SCALE * LOG2_E))
    assert out.isfinite().all()
    assert same_bits(out[-1, 0], keys[3, :LATENT])


def test_attention_of_nothing() -> None:
    assert attend([torch.empty(0, HEADS, LATENT + ROTARY)], [normal(5, LATENT + ROTARY)])[0].shape == (0, HEADS, LATENT)


# A selection of keys


def every_key(tokens: int, length: int) -> Tensor:
    """Positions [tokens, length] of all keys of a request, in an order of their own in each row."""
    return torch.rand(tokens, length, generator=generator(5)).argsort(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_key_selected_is_no_selection(dtype: torch.dtype, long: tuple[Tensor, Tensor, Tensor]) -> None:
    """Bit for bit, past a border of splits too. The twin: with one key of them less the bits are others."""
    q, keys = sequence(150, 0, dtype)
    (whole,) = attend([q], [keys], 16)
    positions = every_key(150, 150)
    assert same_bits(attend([q], [keys], 16, chosen=KeySelection(positions))[0], whole)
    less = KeySelection(positions.masked_fill(positions == 7, -1))
    (found,) = attend([q], [keys], 16, chosen=less)
    assert same_bits(found[:7], whole[:7])
    assert all(not same_bits(found[i], whole[i]) for i in range(7, 150))
    if dtype == torch.bfloat16:
        q, keys, whole = long
        every = KeySelection(every_key(70, 3100).to(torch.int32))
        assert same_bits(attend([q[-70:]], [keys], chosen=every)[0], whole[-70:])


def test_a_selection_is_not_written_to() -> None:
    """All layers without a rule share one."""
    with pytest.raises(FrozenInstanceError):
        ALL_KEYS.positions = every_key(1, 1)  # type: ignore[misc]


def test_a_selection_in_plain_fp32() -> None:
    """A key left out is as one after the query, and a block or split of which nothing is seen leaves no trace."""
    q, keys = sequence(3100, 0, torch.bfloat16)
    for seen in (1, 64, 100, 1024, 1025, 2100):
        first = KeySelection(torch.arange(seen).unsqueeze(0))
        (found,) = attend([q[-1:]], [keys], chosen=first)
        assert same_bits(found[0], plain_attention(q[-1], keys[:seen])), seen
    for skipped in (64, 1024, 2048, 3008):
        last = KeySelection(torch.arange(skipped, 3100).unsqueeze(0))
        (found,) = attend([q[-1:]], [keys], chosen=last)
        alone = plain_attention(q[-1], keys[skipped:])
        # Where splits are cut at other keys, the last bits are others.
        assert same_bits(found[0], alone) or skipped % 1024
        assert (found[0].float() - alone.float()).abs().max() < 2e-2
    middle = KeySelection(torch.cat((torch.arange(10), torch.arange(2060, 2070))).unsqueeze(0))
    (found,) = attend([q[-1:]], [keys], chosen=middle)
    near = float64_attention(q[-1:], torch.cat((keys[:10], keys[2060:2070])))[0]
    assert (found[0].double() - near).abs().max() < 2e-2


def test_a_selection_is_of_its_request_and_batch_mates_change_no_bit() -> None:
    (q, keys), (mate_q, mate_keys) = sequence(200, 0, torch.float32), sequence(90, 1, torch.float32)
    window = torch.arange(190, 200).unsqueeze(1) - torch.arange(20)
    of_mate = torch.arange(88, 90).unsqueeze(1) - torch.arange(20)
    (alone,) = attend([q[-10:]], [keys], chosen=KeySelection(window))
    both = KeySelection(torch.cat((of_mate, window)))
    mate, found = attend([mate_q[-2:], q[-10:]], [mate_keys, keys], 16, chosen=both)
    assert same_bits(found, alone)
    assert same_bits(mate, attend([mate_q[-2:]], [mate_keys], chosen=KeySelection(of_mate))[0])
    # The twin: the queries' selections in another order.
    mixed = KeySelection(torch.cat((of_mate, window.flip(0))))
    _, other = attend([mate_q[-2:], q[-10:]], [mate_keys, keys], 16, chosen=mixed)
    assert not same_bits(other, alone)
