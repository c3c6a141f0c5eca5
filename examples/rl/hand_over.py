"""New weights from the trainer's memory into that of servers on the same host, with no file between.

Tensors are copied into a block of bytes, which trainer and server both map: of the card by CUDA IPC, on a CPU by shared
memory. Such a bucket has a bounded size, so that nobody holds the model twice, and a server copies out of it what it
keeps before it answers. Only handles of the block travel over HTTP, in the forms of vLLM's `ipc` weight transfer and of
SGLang's `flattened_bucket`.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.reductions import reduce_tensor

ALIGNMENT = 16  # bytes: of any dtype
DEVICE = 6  # where the arguments of torch's `rebuild_cuda_tensor` have the device


@dataclass(frozen=True)
class Bucket:
    """Some tensors of a model, one behind the other."""

    block: torch.Tensor
    """uint8 [bytes]."""
    tensors: list[tuple[str, torch.Tensor]]
    """Views of it, under Hugging Face's names."""

    def for_vllm(self) -> dict[str, Any]:
        """The body of `POST /update_weights`, the same for all tested versions: a handle of each tensor."""
        card = card_of(self.block)
        handles = [{card: reduce_tensor(tensor)[1]} for _, tensor in self.tensors]
        update = {
            "names": [name for name, _ in self.tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in self.tensors],
            "shapes": [list(tensor.shape) for _, tensor in self.tensors],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }
        return {"update_info": update}

    def for_sglang(self, version: str) -> dict[str, Any]:
        """The body of `POST /update_weights_from_tensor`: a handle of the block, and what is where in it."""
        places = [
            # By its attributes SGLang's own `FlattenedTensorMetadata`, of which the trainer needs no SGLang.
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=(start := tensor.storage_offset() * tensor.itemsize),
                end_idx=start + tensor.nbytes,
                numel=tensor.nbytes,
            )
            for name, tensor in self.tensors
        ]
        sent = pickled({"flattened_tensor": Shared(self.block), "metadata": places})
        return {
            "serialized_named_tensors": [base64.b64encode(sent).decode()],
            "load_format": "flattened_bucket",
            "weight_version": version,
        }


@dataclass(frozen=True)
class Weights:
    """What servers are to hold."""

    tensors: Callable[[Callable[[str], bool]], Iterator[tuple[str, torch.Tensor]]]
    """The weights of wanted names, Hugging Face's, each with its scale."""
    of_draft: Callable[[str], bool] | None
    """Whether a weight is one of the draft's alone; None where servers do not draft."""
    bucket_bytes: int = 1 << 30

    def buckets(self, *, draft: bool = False) -> Iterator[Bucket]:
        """All of them, or the draft's alone."""
        if not draft:
            return buckets(self.tensors(lambda name: True), self.bucket_bytes)
        return buckets(self.tensors(self.of_draft or (lambda name: False)), self.bucket_bytes)


def buckets(tensors: Iterable[tuple[str, torch.Tensor]], size: int) -> Iterator[Bucket]:
    """Tensors in blocks of at most `size` bytes, a larger tensor in one of its own.

    A block is not written again: a process that still reads it keeps it.
    """
    some: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in tensors:
        if some and filled + room(tensor) > size:
            yield bucket_of(some, filled)
            some, filled = [], 0
        some.append((name, tensor))
        filled += room(tensor)
    if some:
        yield bucket_of(some, filled)


def room(tensor: torch.Tensor) -> int:
    """Bytes that it takes in a block."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def bucket_of(tensors: list[tuple[str, torch.Tensor]], size: int) -> Bucket:
    """Copies of tensors in a new block of `size` bytes."""
    bucket, start = Bucket(torch.empty(size, dtype=torch.uint8, device=tensors[0][1].device), []), 0
    for name, tensor in tensors:
        place = bucket.block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        bucket.tensors.append((name, place.copy_(tensor.detach())))
        start += room(tensor)
    return bucket


class Shared:
    """A tensor that another process of this host gets as it is in memory, when it is pickled by `pickled`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """How the other process makes it. Its cards may have other numbers: SGLang knows them by their UUID."""
        rebuild, arguments = reduce_tensor(self.tensor)
        if self.tensor.is_cuda:
            arguments = (*arguments[:DEVICE], card_of(self.tensor), *arguments[DEVICE + 1 :])
        return rebuild, arguments


def card_of(tensor: torch.Tensor) -> str:
    """The UUID of the card that it is on."""
    return str(torch.cuda.get_device_properties(tensor.device).uuid)


def pickled(value: Any) -> bytes:
    """By torch's own reductions of memory. A server is no child of this process: it opens shared memory by its name."""
    strategy = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        return bytes(ForkingPickler.dumps(value))
    finally:
        multiprocessing.set_sharing_strategy(strategy)
