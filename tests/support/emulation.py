"""Run the CUDA C++ kernels on a CPU: their source, compiled by g++ against emulated units."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.kernels.cuda import compiler, mla_hopper
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


def compile_kernel(
    folder: Path, program: compiler.Program, main: str, replacements: Sequence[tuple[str, str]] = ()
) -> Any:
    """A program as a library, its source changed by `replacements`, each of which must apply.

    `main` of the folder of emulated units gives it functions to call; the headers there replace the kernels' own.
    """
    source = (_KERNELS / program.file).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    (folder / program.file).write_text(source)
    for file in (*_OWN.glob("*.cuh"), _OWN / main):
        shutil.copy(file, folder)
    defines = [f"-D{name}={value}" for name, value in program.parameters]
    options = ["-O2", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
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
            library.emulate_fold(min(how.grid, 3), ctypes.byref(described), rows, groups)

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(compiler, "tensor_map", tensor_map)
    monkeypatch.setattr(mla_hopper, "_processors", lambda device: processors)
    out = torch.full((*q.shape[:2], mla_hopper.RANK), torch.nan, dtype=torch.bfloat16)
    mla_hopper.launch(q, latent_cache, batch, out, scale)
    return out
