"""Fingerprints: equal exactly where the weights are, whatever the order, the parts and who holds them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from dsv3_plugin.checkpoint.fingerprint import (
    Fingerprint,
    fingerprint,
    fingerprint_of_checkpoint,
    fingerprint_of_tensors,
    part_sum,
)
from dsv3_plugin.checkpoint.loader import WeightLoader, load_model, load_mtp
from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.names import checkpoint_tensors
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.profile import BF16

MASK = (1 << 64) - 1


def test_parts_that_disagree_are_not_put_together() -> None:
    one, other = (Fingerprint(tensors={"a": digest, "b": "3"}) for digest in "12")
    assert (one | Fingerprint(tensors={"b": "3", "c": "4"})).tensors == {"a": "1", "b": "3", "c": "4"}
    with pytest.raises(CheckpointError, match=r"ranks hold different weights: a$"):
        one | other


def split_mix_64(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = torch.empty(0, dtype=dtype).element_size()
    octets = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return octets.view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(16,), (3, 8), (5, 7), (2, 3, 24), (40, 9000)])
def test_the_sum_as_python_computes_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random(dtype, *shape)
    size = tensor.element_size()
    word = 8 if shape[-1] * size % 8 == 0 else size
    octets = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    words = [octets[i : i + word] for i in range(0, len(octets), word)]
    # Of words shorter than 8 bytes torch extends the sign, but of single bytes.
    numbers = [int.from_bytes(w, "little", signed=word > 1) & MASK for w in words]
    mixed = (split_mix_64(number ^ (place + 1) * 0x9E3779B97F4A7C15 & MASK) for place, number in enumerate(numbers))
    assert part_sum(tensor).item() & MASK == sum(mixed) & MASK


@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 2), (2, 3, 2)])
def test_parts_add_up(cuts: tuple[int, ...]) -> None:
    whole = random(torch.bfloat16, 4, 6, 16)
    sizes = [n // cut for n, cut in zip(whole.shape, cuts, strict=True)]
    total = 0
    for corner in itertools.product(*(range(0, n, size) for n, size in zip(whole.shape, sizes, strict=True))):
        part = whole[tuple(slice(a, a + size) for a, size in zip(corner, sizes, strict=True))]
        total += part_sum(part, whole.shape, corner).item()
    assert total & MASK == part_sum(whole).item() & MASK
    # The twin: a part that says it is somewhere else.
    assert part_sum(whole[:2], whole.shape, (2, 0, 0)).item() != part_sum(whole[:2], whole.shape).item()


def test_a_part_that_cuts_a_word() -> None:
    with pytest.raises(ValueError, match="cuts words of 8 bytes"):
        part_sum(torch.zeros(2, 2, dtype=torch.bfloat16), (2, 8), (0, 2))


@pytest.mark.parametrize("place", [(0, 0), (1, 5), (3, 7)])
def test_one_bit_and_one_exchange_are_seen(place: tuple[int, int]) -> None:
    tensor = random(torch.bfloat16, 4, 8)
    flipped = tensor.clone()
    flipped.view(torch.int16)[place] ^= 1
    rows, columns = tensor.flip(0), tensor.flip(1)
    digests = [fingerprint_of_tensors({"a": x}).digest for x in (tensor, flipped, rows, columns, tensor.view(8, 4))]
    renamed = fingerprint_of_tensors({"b": tensor}).digest
    assert len({*digests, renamed, fingerprint_of_tensors({"a": tensor.view(torch.int16)}).digest}) == 7
    assert fingerprint_of_tensors({"a": tensor.clone()}).digest == digests[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_a_model_holds_its_checkpoint(tiny_checkpoint, dtype: str) -> None:
    reader = CheckpointReader(tiny_checkpoint(dtype))
    ops = bind_ops(reader.config, reader.profile(), torch.device("cpu"))
    main = fingerprint(load_model(reader, ops), reader.config, "main")
    mtp = fingerprint(load_mtp(reader, ops), reader.config, "mtp")
    assert not main.tensors.keys() & mtp.tensors.keys()
    stored = fingerprint_of_checkpoint(reader)
    assert main | mtp == stored and mtp | main == stored
    placed = {name for name, spec in checkpoint_tensors(reader.config).items() if spec.targets}
    assert stored.tensors.keys() == placed
    assert Fingerprint.model_validate_json(stored.model_dump_json()) == stored


def test_a_checkpoint_held_in_another_dtype(tiny_checkpoint) -> None:
    reader = CheckpointReader(tiny_checkpoint("fp32"))
    ops = bind_ops(reader.config, BF16, torch.device("cpu"))
    held = fingerprint(load_model(reader, ops), reader.config, "main")
    expected = fingerprint_of_checkpoint(reader, BF16)
    assert held.tensors.items() <= expected.tensors.items()
    assert not held.tensors.items() <= fingerprint_of_checkpoint(reader).tensors.items()


def test_an_update_takes_the_new_fingerprint(tiny_checkpoint, tmp_path: Path) -> None:
    old, new = CheckpointReader(tiny_checkpoint("bf16")), make_checkpoint(read_config("tiny"), tmp_path / "new", 2)
    ops = bind_ops(old.config, old.profile(), torch.device("cpu"))
    model = load_model(old, ops)
    attention = model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention, MLA)
    attention.absorbed_weights()
    before, wanted = fingerprint(model, old.config, "main"), fingerprint_of_checkpoint(new)
    WeightLoader(model, old.config, "main", holds_weights=True).load(new.tensors())
    after = fingerprint(model, old.config, "main")
    assert after.tensors.items() <= wanted.tensors.items()
    assert len(after.difference(before)) > 0.9 * len(before.tensors)
    # The twin: weights that were written behind the model's back.
    attention.kv_b_proj.weight.data.neg_()
    with pytest.raises(CheckpointError, match="derived from its weights is of other weights"):
        fingerprint(model, old.config, "main")
    attention.weights_changed()
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert fingerprint(model, old.config, "main").difference(after) == [name]
