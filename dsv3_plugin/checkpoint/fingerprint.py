"""Which weights does a program hold? A digest of each tensor under its Hugging Face name, and one of all of them.

A trainer and its servers hold the same weights exactly where their fingerprints are equal, whatever engine, parallel
layout or order they came in. A tensor's digest is made of a sum over its 8-byte words, each mixed with its place in the
whole tensor (SplitMix64's finaliser), modulo 2**64: parts of a tensor that ranks hold add up to the whole's, and a card
sums in any order. It finds mistakes, not forgers.

A fingerprint is of what is *held*: a float32 checkpoint that a server holds in bfloat16 has another one there than in
its file, and `fingerprint_of_checkpoint` says which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import nn

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, SCALE_SUFFIX, Part, TensorSpec, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader, some_names
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.model import derived_is_current
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import Profile

_MODULUS = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
# Words at a time: what a core's cache holds, and what keeps a card busy.
_WORDS = {"cpu": 1 << 15, "cuda": 1 << 24}


class Fingerprint(BaseModel):
    """The digests of some or all tensors of a model. Those of its parts are put together by `|`."""

    model_config = ConfigDict(frozen=True)

    tensors: dict[str, str]
    """Hugging Face's name to 16 hexadecimal digits."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def digest(self) -> str:
        """One for all tensors, whatever their order."""
        lines = "".join(f"{name} {value}\n" for name, value in sorted(self.tensors.items()))
        return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()

    def __or__(self, other: Fingerprint) -> Fingerprint:
        """Of the tensors of both. Raises `CheckpointError` where both have one of them, and not the same."""
        both = self.tensors.keys() & other.tensors.keys()
        if different := [name for name in both if self.tensors[name] != other.tensors[name]]:
            raise CheckpointError(f"ranks hold different weights: {some_names(different)}")
        return Fingerprint(tensors=self.tensors | other.tensors)

    def difference(self, other: Fingerprint) -> list[str]:
        """The names of tensors that differ, or that only one of both has."""
        names = self.tensors.keys() | other.tensors.keys()
        return sorted(name for name in names if self.tensors.get(name) != other.tensors.get(name))


def part_sum(part: torch.Tensor, whole: Sequence[int] | None = None, first: Sequence[int] = ()) -> torch.Tensor:
    """The sum over a part of a tensor, int64 [] on its device; sums of disjoint parts add up (modulo 2**64).

    Args:
        part: [...], any dtype.
        whole: the shape of the whole tensor; the part's if not given.
        first: where the part begins in it; at its beginning if not given.

    Raises `ValueError` where a part's rows begin or end within an 8-byte word of the whole's.
    """
    whole = tuple(whole if whole is not None else part.shape)
    first = tuple(first or (0,) * len(whole))
    size = part.element_size()
    # Rows of whole words, or else each element is one.
    word = 8 if whole[-1] * size % 8 == 0 else size
    if first[-1] * size % word or part.shape[-1] * size % word:
        raise ValueError(f"a part of {tuple(part.shape)} at {first} of {whole} cuts words of {word} bytes")
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word]
    rows = part.contiguous().view(torch.uint8).reshape(-1, part.shape[-1] * size).view(integers)
    width, whole_width = rows.shape[1], whole[-1] * size // word
    # The word's index in the whole tensor, of each row's first word: row-major over all but the last dimension.
    starts = torch.zeros((), dtype=torch.int64, device=part.device)
    for dim, offset, length in zip(whole[:-1], first[:-1], part.shape[:-1], strict=True):
        starts = starts[..., None] * dim + torch.arange(offset, offset + length, device=part.device)
    starts = starts.reshape(-1) * whole_width + first[-1] * size // word
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    columns = torch.arange(width, device=part.device)
    step = max(1, _WORDS.get(part.device.type, 1 << 15) // max(1, width))
    for row in range(0, len(rows), step):
        places = starts[row : row + step, None] + columns
        total += _mixed(rows[row : row + step].to(torch.int64), places).sum()
    return total


def _signed(value: int) -> int:
    return value - _MODULUS if value >= _MODULUS // 2 else value


def _mixed(words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser of words and their places, int64; overwrites `places`."""
    z = places.add_(1).mul_(_signed(_GOLDEN)).bitwise_xor_(words)
    for shift, factor in _MIX:
        # A logical shift: torch's is arithmetic.
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        if factor != 1:
            z *= _signed(factor)
    return z


def digest(name: str, dtype: torch.dtype, shape: Iterable[int], total: int) -> str:
    """A tensor's digest, from the sum over its parts."""
    text = f"{name} {dtype} {tuple(shape)} {total % _MODULUS}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint_of_tensors(named_tensors: Mapping[str, torch.Tensor]) -> Fingerprint:
    """Of whole tensors by Hugging Face's names, on any devices."""
    return _fingerprint(named_tensors.items())


def _fingerprint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """The same; no tensor is kept."""
    found = [(name, tensor.dtype, tensor.shape, part_sum(tensor)) for name, tensor in named_tensors]
    sums = _numbers([total for *_, total in found])
    return Fingerprint(
        tensors={name: digest(name, dtype, shape, n) for (name, dtype, shape, _), n in zip(found, sums, strict=True)}
    )


def _numbers(sums: list[torch.Tensor]) -> list[int]:
    """One transfer from a device, not one a tensor."""
    return torch.stack(sums).tolist() if sums else []


@torch.no_grad()
def fingerprint(model: nn.Module, config: DeepseekV3Config, part: Part, layout: Layout = WHOLE) -> Fingerprint:
    """Of the weights that a model holds on one rank. The draft's embedding and head are the main model's: not counted.

    Tensor-parallel ranks make this call together, and each answers for what all of them hold. A model's is that of all
    its experts and stages.

    Args:
        model: a `DeepseekV3` for the part `main`, a `DeepseekV3MTP` for `mtp`, or a module with their parameters.
        config: the checkpoint's configuration.
        part: which part of the checkpoint `model` is.
        layout: which part of that this rank holds.

    Raises `CheckpointError` where something that the model derived from its weights is not of those that it holds.
    """
    if not derived_is_current(model):
        raise CheckpointError(f"what the {part} model derived from its weights is of other weights than it holds")
    parameters = dict(model.named_parameters())
    owners = checkpoint_tensors(config)
    targets = {
        name: spec.targets[part]
        for name, spec in checkpoint_tensors(config, layout).items()
        if part in spec.targets and owner(owners[name]) == part
    }
    return _fingerprint(
        (name, target.whole(parameters[target.parameter][target.index], layout.tensor))
        for name, target in targets.items()
    )


def owner(spec: TensorSpec) -> Part | None:
    """The part whose fingerprint has a tensor; None for the copies that no part holds."""
    return "main" if "main" in spec.targets else next(iter(spec.targets), None)


def held_dtype(spec: TensorSpec, profile: Profile) -> torch.dtype:
    """The dtype in which a model of `profile` holds a tensor."""
    if spec.dtypes == (E4M3,):
        return E4M3
    return torch.float32 if spec.name.endswith((SCALE_SUFFIX, BIAS_SUFFIX)) else profile.dtype


def fingerprint_of_checkpoint(reader: CheckpointReader, profile: Profile | None = None) -> Fingerprint:
    """Of what a model holds that is loaded from a checkpoint; `profile` defaults to the checkpoint's own.

    Raises `CheckpointError` as `CheckpointReader.validate` does.
    """
    reader.validate()
    profile = profile or reader.profile()
    specs = checkpoint_tensors(reader.config)
    found = Fingerprint(tensors={})
    for name, tensor in reader.tensors(lambda name: owner(specs[name]) is not None):
        found.tensors.update(fingerprint_of_tensors({name: tensor.to(held_dtype(specs[name], profile))}).tensors)
    return found
