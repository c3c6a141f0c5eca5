"""Small cases and what a Hopper card printed, in a file for machines without one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_plugin.kernels import provider
from dsv3_plugin.kernels.certify.compare import copied
from dsv3_plugin.ops.drawing import SMALL, Case
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.ops.paged_batch import PagedBatch


def record(path: Path, *, per_op: int = 2, device: str = "cuda") -> None:
    """Write `per_op` small cases of each operation with the results of this package's own kernels."""
    tensors: dict[str, torch.Tensor] = {}
    versions = {op.name: op.version for op in operations().values()}
    plain: dict[str, str] = {"card": torch.cuda.get_device_name(), "contracts": json.dumps(versions)}
    for kernel in map(provider.own_kernel, operations().values()):
        for number in range(per_op):
            name = f"{kernel.op}/{number}"
            case = operations()[kernel.op].draw(random.Random(f"golden/{name}"), SMALL)
            # Views carry gaps of the tensors that they were cut from.
            args = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in case.args]
            results = kernel.run(*(copied(x, device) for x in args), **case.kwargs)
            args = [part for x in args for part in (x.tensors if isinstance(x, PagedBatch) else (x,))]
            for i, x in enumerate(args):
                if isinstance(x, torch.Tensor):
                    tensors[f"{name}/arg{i}"] = x
            for i, x in enumerate(results if isinstance(results, tuple) else (results,)):
                tensors[f"{name}/out{i}"] = x.cpu().contiguous()
            kwargs = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in case.kwargs.items()}
            plain[name] = json.dumps([[None if isinstance(x, torch.Tensor) else x for x in args], kwargs])
    save_file(tensors, path, metadata=plain)


def recorded(path: Path) -> dict[str, tuple[Case, tuple[torch.Tensor, ...]]]:
    """The cases of a file that `record` wrote, by name, each with what the GPU printed."""
    cases: dict[str, tuple[Case, tuple[torch.Tensor, ...]]] = {}
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for name, text in file.metadata().items():
            if "/" not in name:
                continue
            plain, kwargs = json.loads(text)
            places = [f"{name}/arg{i}" for i in range(len(plain))]
            args = [file.get_tensor(place) if place in keys else x for place, x in zip(places, plain, strict=True)]
            if "out_dtype" in kwargs:
                kwargs["out_dtype"] = getattr(torch, str(kwargs["out_dtype"]).removeprefix("torch."), None)
            if name.startswith(f"{mla_attention.name}/"):
                q, cache, *numbers = args
                args = [q, cache, PagedBatch.of(q, cache, *numbers)]
            outs = sorted(key for key in keys if key.startswith(f"{name}/out"))
            cases[name] = Case(tuple(args), kwargs), tuple(file.get_tensor(key) for key in outs)
    return cases
