"""Making a test checkpoint: random weights with which drafts are accepted, and the same bytes on every machine.

*Same bytes.* Every number is an integer from `torch.Generator` times a power of two. Both are exact, unlike a normal
distribution, whose last bits depend on the CPU's instructions. Each tensor has its own generator, seeded by its name,
so that no order matters. The integers have 8 bits, so that bf16 holds them: a bf16 and an fp32 checkpoint of one seed
hold equal numbers.

*Drafts.* Between random weights the MTP layer would never guess what the main model says. Here token v has a successor,
v + stride (modulo the vocabulary): the head's row of a successor is its predecessor's embedding, and noise. The layers
turn the final hidden state 60 degrees away from the token's embedding, which leaves a successor likely and every layer
visible in the logits. `eh_proj` hands on the embedding of the next token, so that the MTP layer guesses its successor.
With the numbers below about 70 % of greedy tokens are successors, nearly all guesses are, and every expert is used.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from threading import Event
from typing import Any

import torch

from dsv3_plugin.checkpoint.masters import as_written
from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, SCALE_SUFFIX, TensorSpec, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.tokenizer import tokenizer_files
from dsv3_plugin.checkpoint.traps import is_planted, plant
from dsv3_plugin.checkpoint.writer import DEFAULT_SHARD_BYTES, Progress, new_folder, write_weights
from dsv3_plugin.config import FP8_BLOCK, DeepseekV3Config
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import profile_for

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_AHEAD = DEFAULT_SHARD_BYTES  # of weights made before they are asked for: while one file is written, another's
_CHUNK = 1 << 22  # numbers drawn at a time: the largest tensor must not be held as integers too

_NORM_STD = 0.1  # around 1
_BIAS_STD = 0.12  # routing scores deviate by 0.3: the bias changes choices, and starves no expert
# Gains multiply a matrix's standard deviation, fan_in ** -0.5, which keeps the power of its input.
_QUERY_GAIN = 2.0  # attention that prefers some keys; an average over all would vanish in long texts
_ROUTER_GAIN = 1.5
_EH_GAIN = 0.3
_RESIDUAL_POWER = 2.5  # of the layers together; it gives the 60 degrees

_Tensors = dict[str, torch.Tensor]
"""Of a weight: itself, and its scales if it is quantized."""


class CheckpointDtype(StrEnum):
    """The three kinds of checkpoint, one for each numerics profile."""

    BF16 = "bf16"
    FP32 = "fp32"
    FP8 = "fp8"


def make_checkpoint(
    config: dict[str, Any],
    directory: str | Path,
    seed: int,
    *,
    dtype: CheckpointDtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> CheckpointReader:
    """Write a checkpoint of random weights, with a tokenizer where the vocabulary allows one.

    Args:
        config: a parsed `config.json`; it is written as it is, but for what `dtype` changes.
        directory: must not exist, or be empty. It appears complete or not at all.
        seed: any integer. The bytes of all files depend on nothing else but `config`, `dtype` and `max_shard_bytes`.
        dtype: replaces the configuration's `torch_dtype` and `quantization_config`; fp8 has power-of-two scales unless
            the configuration says otherwise.
        max_shard_bytes: a file holds at most so much, or one tensor; more than one file means an index.
        progress: called with the bytes written and to be written, after each tensor.

    Returns a reader of the result. Raises `ConfigError` or `CheckpointError`, for bad input before anything is written.
    """
    config = with_dtype(config, dtype)
    maker = _Maker(DeepseekV3Config.from_dict(config), seed, is_planted(config))
    texts = {"config.json": json.dumps(config, indent=2) + "\n", **tokenizer_files(maker.config.vocab_size)}
    sizes = {spec.name: maker.size(spec) for spec in maker.weights}
    with new_folder(directory, sum(sizes.values())) as folder, _making(maker, sizes) as made:

        def tensors(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
            return chain.from_iterable(each.items() for each in islice(made, len(names)))

        write_weights(folder, sizes, tensors, max_shard_bytes, progress)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
    return CheckpointReader(directory)


@contextmanager
def _making(maker: _Maker, sizes: Mapping[str, int]) -> Iterator[Iterator[_Tensors]]:
    """The tensors of each weight in order, made by a thread a core: torch draws one on one thread. Where the block ends
    early, what is being made is left as it is, and nothing else is begun.
    """
    own = torch.get_num_threads()
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield _made_ahead(threads, maker, sizes)
    finally:
        maker.stopped.set()
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(own)


def _made_ahead(threads: ThreadPoolExecutor, maker: _Maker, sizes: Mapping[str, int]) -> Iterator[_Tensors]:
    """Some weights are made before they are asked for: while a file is written, and while one thread draws an
    embedding. They are counted in bytes, by `sizes`, since some weights are a thousand times as large as others.
    """
    making: deque[tuple[int, Future[_Tensors]]] = deque()
    held = 0
    for spec in maker.weights:
        making.append((sizes[spec.name], threads.submit(maker.tensors, spec)))
        held += sizes[spec.name]
        while held - making[0][0] > _AHEAD:
            held -= making[0][0]
            yield making.popleft()[1].result()
    while making:
        yield making.popleft()[1].result()


def with_dtype(config: dict[str, Any], dtype: CheckpointDtype | None) -> dict[str, Any]:
    """A parsed `config.json` for a checkpoint of a kind: see `make_checkpoint`."""
    if dtype is None:
        return config
    config = {name: value for name, value in config.items() if name != "dtype"}
    config["torch_dtype"] = "float32" if dtype == CheckpointDtype.FP32 else "bfloat16"
    quantization = config.pop("quantization_config", None)
    if dtype == CheckpointDtype.FP8:
        config["quantization_config"] = quantization or {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    return config


@dataclass(frozen=True)
class _Maker:
    """Draws the tensors of one configuration and seed."""

    config: DeepseekV3Config
    seed: int
    traps: bool = False
    stopped: Event = field(default_factory=Event)
    """Once it is set nobody waits for a tensor."""

    @property
    def weights(self) -> list[TensorSpec]:
        """All tensors but the scales, which come with their weights."""
        return [spec for name, spec in checkpoint_tensors(self.config).items() if not name.endswith(SCALE_SUFFIX)]

    def size(self, spec: TensorSpec) -> int:
        """Bytes of a tensor and its scales in the file."""
        scale = checkpoint_tensors(self.config).get(spec.name + SCALE_SUFFIX)
        scale_size = math.prod(scale.shape) * torch.float32.itemsize if scale else 0
        return math.prod(spec.shape) * self.dtype(spec).itemsize + scale_size

    def dtype(self, spec: TensorSpec) -> torch.dtype:
        """The dtype that the file holds a tensor in."""
        if spec.name.endswith(BIAS_SUFFIX) or spec.dtypes == (E4M3,):
            return spec.dtypes[0]
        return profile_for(self.config).dtype

    def tensors(self, spec: TensorSpec) -> _Tensors:
        """A weight, and its scales if it is quantized, as the file holds them."""
        weight = self.draw(spec)
        if self.traps:
            plant(spec.name, weight)
        return dict(as_written(spec.name, weight, self.config))

    def draw(self, spec: TensorSpec) -> torch.Tensor:
        """The numbers of a weight, in bf16 (a router's bias: fp32, and not of bf16's grid)."""
        name, shape, config = spec.name, spec.shape, self.config
        if name.endswith(BIAS_SUFFIX):
            return self.uniform(name, shape, _BIAS_STD, bits=14, dtype=torch.float32)
        if name.endswith("norm.weight"):
            return 1 + self.uniform(name, shape, _NORM_STD)
        if name.endswith("embed_tokens.weight"):
            return self.uniform(_EMBEDDING, shape, 1)
        if name == _HEAD or name.endswith("shared_head.head.weight"):
            return self.head(shape)
        gain = 1.0
        if name.endswith(("q_proj.weight", "q_b_proj.weight")):
            gain = _QUERY_GAIN
        elif name.endswith("mlp.gate.weight"):
            gain = _ROUTER_GAIN
        elif name.endswith("eh_proj.weight"):
            gain = _EH_GAIN
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            gain = math.sqrt(_RESIDUAL_POWER / config.num_hidden_layers)
        weight = self.uniform(name, shape, gain / math.sqrt(shape[1]))
        if name.endswith("eh_proj.weight"):
            weight.diagonal().add_(1)
        return weight

    def head(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Row v + stride is the embedding of v, and noise, at such a ratio that most greedy tokens are successors.

        A logit of another token is a sum of `hidden` random terms, so that the largest of `vocab` ones is about
        sqrt(2 ln vocab) deviations. A successor's is `share * cosine * sqrt(hidden)` of them, where `share` is the
        embedding's part of the row's deviation and the cosine is a half: `share` makes the two about equal.
        """
        vocab, hidden = shape
        # 2 ln(2) < 1.4; bits instead of a logarithm, which mathematical libraries round differently.
        largest = math.sqrt(1.4 * vocab.bit_length())
        share = min(1.0, largest / (0.5 * math.sqrt(hidden)))
        std = 1 / math.sqrt(hidden)
        head = self.uniform(_EMBEDDING, shape, 1).roll(_stride(vocab), 0).mul_(share * std)
        head += self.uniform(_HEAD, shape, math.sqrt(1 - share * share) * std)
        return head

    def uniform(
        self, name: str, shape: tuple[int, ...], std: float, *, bits: int = 8, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """Uniform numbers around zero, deviating by about `std`: integers of `bits` bits times a power of two."""
        if std == 0:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        fraction, exponent = math.frexp(std * math.sqrt(3))
        largest, step = round(math.ldexp(fraction, bits)), math.ldexp(1.0, exponent - bits)
        # The Mersenne twister of torch's CPU generator takes 32 bits of seed.
        digest = sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        out = torch.empty(shape, dtype=dtype, device="cpu")
        for chunk in torch.split(out.view(-1), _CHUNK):
            if self.stopped.is_set():
                raise CancelledError
            integers = torch.empty(chunk.shape, dtype=torch.int16, device="cpu")
            chunk.copy_(integers.random_(-largest, largest + 1, generator=generator))
            chunk.mul_(step)
        return out


def _stride(vocab: int) -> int:
    """The distance to a token's successor: coprime with the vocabulary, so that greedy text runs through all of it."""
    return next(stride for stride in range(vocab * 5 // 8 + 1, 2 * vocab + 2) if math.gcd(stride, vocab) == 1)
