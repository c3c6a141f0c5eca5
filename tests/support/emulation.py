"""Run the CUDA C++ kernels on a CPU: their source, compiled by g++ against emulated units."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.kernels.cuda import compiler, head_hopper, mla_hopper
from dsv3_plugin.ops.paged_batch import PagedBatch

_OWN = Path(__file__).with_name("emulated")
_KERNELS = Path(mla_hopper.__file__).parent


class TensorMap(ctypes.Structure):
    """The emulated struct `TensorMap`: numbers, bytes (the inner dimension's are not read) and numbers."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_longlong * 4),
        ("stride", ctypes.c_longlong * 4),
        ("box", ctypes.c_longlong * 4),
    )


def tensor_map(kind: str, address: int, size: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """What `compiler.tensor_map` encodes."""
    assert kind != "e4m3" or box[0] == 128, "the emulated copies of numbers of one byte know boxes of 128"
    four = ctypes.c_longlong * 4
    sizes, boxes = ((*x, 1, 1, 1)[:4] for x in (size, box))
    return TensorMap(address, four(*sizes), four(*(0, *strides, 0, 0)[:4]), four(*boxes))


def _files(name: str) -> list[str]:
    """A source of the kernels' folder and the headers there that it includes, each once."""
    found, waiting = [], [name]
    while waiting:
        name = waiting.pop()
        if name not in found and (_KERNELS / name).exists():
            found.append(name)
            waiting += re.findall(r'^#include "(.+)"', (_KERNELS / name).read_text(), re.MULTILINE)
    return found


def compile_kernel(
    folder: Path, program: compiler.Program, main: str, replacements: Sequence[tuple[str, str]] = ()
) -> Any:
    """A program as a library, its sources changed by `replacements`, each of which must apply once.

    `main` of the folder of emulated units gives it functions to call; the headers there replace the kernels' own.
    """
    own = {file.name for file in _OWN.glob("*.cuh")}
    sources = {file: (_KERNELS / file).read_text() for file in _files(program.file) if file not in own}
    for old, new in replacements:
        counts = {file: text.count(old) for file, text in sources.items()}
        assert sum(counts.values()) == 1, (counts, old)
        file = max(counts, key=lambda file: counts[file])
        sources[file] = sources[file].replace(old, new)
    for name, text in sources.items():
        (folder / name).write_text(text)
    for path in (*_OWN.glob("*.cuh"), _OWN / main):
        shutil.copy(path, folder)
    defines = [f"-D{name}={value}" for name, value in program.parameters]
    options = ["-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    library = folder / "emulated.so"
    subprocess.run(["g++", *options, *defines, folder / main, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def build(folder: Path, replacements: Sequence[tuple[str, str]] = ()) -> Any:
    """The attention kernels as a library."""
    return compile_kernel(folder, mla_hopper.PROGRAM, "mla_emulated.cpp", replacements)


def attend(
    monkeypatch: Any,
    library: Any,
    processors: int,
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    scale: float,
) -> torch.Tensor:
    """`mla_attention` of tensors on a CPU by the emulated kernels, on a card of so many multiprocessors."""

    def launch(program: compiler.Program, name: str, how: compiler.Launch, arguments: Sequence[Any]) -> None:
        if name == "attend":
            library.emulate_attend(how.grid, *(ctypes.byref(x) for x in arguments))
        else:
            described, rows, groups = arguments
            library.emulate_combine(min(how.grid, 3), ctypes.byref(described), rows, groups)

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(compiler, "tensor_map", tensor_map)
    monkeypatch.setattr(mla_hopper, "_processors", lambda device: processors)
    out = torch.full((*q.shape[:2], mla_hopper.RANK), torch.nan, dtype=torch.bfloat16)
    mla_hopper.launch(q, latent_cache, batch, out, scale)
    return out


def attend_by_heads(
    monkeypatch: Any, library: Any, processors: int, args: Sequence[torch.Tensor], *, scale: float
) -> torch.Tensor:
    """`head_attention` of tensors on a CPU by the emulated kernel, on a card of so many multiprocessors."""

    def launch(program: compiler.Program, name: str, how: compiler.Launch, arguments: Sequence[Any]) -> None:
        library.emulate_attend_heads(how.grid, *(ctypes.byref(x) for x in arguments))

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(compiler, "tensor_map", tensor_map)
    monkeypatch.setattr(head_hopper, "_processors", lambda device: processors)
    q, k, k_rope, v, query_starts, key_starts = args
    return head_hopper.head_attention(q, k, k_rope, v, query_starts, key_starts, scale=scale)
