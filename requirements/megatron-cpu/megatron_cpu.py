"""Megatron-Core 0.19.2 on a CPU with gloo: one small function for each symbol that it calls on CUDA unasked.

`install()` puts them in place before Megatron is imported (`sitecustomize`), and does nothing where there is a GPU.
Nothing here computes: a call that names a CUDA device gets the CPU, one that orders work between streams does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

CPU = torch.device("cpu")
PATCHES: list[tuple[object, str, Any]] = []
"""Owner, name and stand-in of every patched symbol."""


def patch(owner: object, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a stand-in for `owner.name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        PATCHES.append((owner, name, function))
        return function

    return register


def install() -> None:
    """Patch, once, unless there is a GPU."""
    if torch.cuda.is_available() or torch.cuda.current_device is current_device:
        return
    # Megatron fuses elementwise functions with torch.compile, which takes a minute on a CPU and changes their bits.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # It keeps a table of torch's functions, in which a stand-in must not appear under several names.
    importlib.import_module("torch._dynamo")
    # Its tracker warns of draws from the CPU's generator, which is the device's here.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    for owner, name, function in PATCHES:
        setattr(owner, name, function)


# The device. Megatron asks for the current one, or names "cuda" itself.


@patch(torch.cuda, "current_device")
def current_device() -> torch.device:
    """`device=torch.cuda.current_device()` in the router, the embeddings, the gradient buffers and elsewhere."""
    return CPU


def _on_cpu(device: Any) -> Any:
    kind = getattr(device, "type", device)
    return CPU if isinstance(kind, str) and kind.startswith("cuda") else device


def _factory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original(*args, **kwargs)

    return make


# `device="cuda"` is written out in the optimizers, the clipping of gradients and the pipeline schedules.
for _name in ("tensor", "zeros"):
    patch(torch, _name)(_factory(getattr(torch, _name)))


@patch(torch.Tensor, "cuda")
def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`weight.data.cuda()` where the first and the last pipeline stage share their embedding."""
    return self


_type = torch.Tensor.type


@patch(torch.Tensor, "type")
def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The optimizers tell parameters apart by `param.type() == "torch.cuda.FloatTensor"`."""
    found = _type(self, *args, **kwargs)
    return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and "cuda" not in found else found


# Streams and events. On a CPU all work is done in the order of the calls.


class Stream:
    """Stands for every stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Everything before is done."""

    def record_event(self, event: Any = None) -> Event:
        """An event that has happened."""
        return Event()


class Event:
    """An event that has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        """It has happened."""


PATCHES += [(torch.cuda, "Stream", Stream), (torch.cuda, "Event", Event)]


@patch(torch.cuda, "current_stream")
def current_stream(*args: Any) -> Stream:
    """The token dispatcher and the gradient buffers compare and wait for streams."""
    return Stream()


@patch(torch.cuda, "stream")
def stream(*args: Any) -> contextlib.AbstractContextManager[None]:
    """The token dispatcher copies the numbers of tokens on a stream of its own."""
    return contextlib.nullcontext()


@patch(torch.cuda, "synchronize")
def synchronize(*args: Any) -> None:
    """Pipeline stages wait for what they have sent and received."""


# Random numbers. Megatron's tracker keeps states of CUDA generators.


@patch(torch.cuda, "get_rng_state")
@patch(torch.cuda.random, "get_rng_state")
def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`model_parallel_cuda_manual_seed` saves the state under a name."""
    return torch.get_rng_state()


@patch(torch.cuda, "_lazy_call")
def lazy_call(function: Callable[[], None], **kwargs: Any) -> None:
    """The tracker sets its states by a call that would wait for CUDA; it takes a generator from the table below."""
    function()


PATCHES.append((torch.cuda, "default_generators", {CPU: torch.default_generator}))


@patch(torch.cuda, "manual_seed")
def manual_seed(seed: int) -> None:
    """`model_parallel_cuda_manual_seed` seeds each parallel region."""
    torch.manual_seed(seed)


# Communication.

_all_to_all_single = torch.distributed.all_to_all_single


@patch(torch.distributed, "all_to_all_single")
def all_to_all_single(
    output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any, input_split_sizes: Any, **kwargs: Any
) -> Any:
    """The token dispatcher turns split sizes into numbers only when it moves them off a GPU; gloo refuses tensors."""
    splits = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
    return _all_to_all_single(output, input, *splits, **kwargs)
