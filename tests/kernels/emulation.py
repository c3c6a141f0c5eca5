"""Run the CUDA C++ attention kernel on a CPU: its source, compiled by g++ against emulated units."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.kernels import cuda, mla_hopper

_OWN = Path(__file__).with_name("emulated")
_KERNELS = Path(mla_hopper.__file__).parent


class TensorMap(ctypes.Structure):
    """The emulated struct `TensorMap`."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_longlong * 4),
        ("stride", ctypes.c_longlong * 4),
        ("box_rows", ctypes.c_int),
        ("box_tiles", ctypes.c_int),
    )


def tensor_map(kind: str, address: int, size: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """What `cuda.tensor_map` encodes."""
    assert (kind, box[0]) == ("e4m3", 128), "numbers of one byte: the emulated copies know no others"
    four = ctypes.c_longlong * 4
    return TensorMap(address, four(*(*size, 1)[:4]), four(*(0, *strides, 0)[:4]), box[1], box[2])


def build(folder: Path, replacements: Sequence[tuple[str, str]] = ()) -> Any:
    """The kernels as a library, their source changed by `replacements`, each of which must apply."""
    source = (_KERNELS / "mla_hopper.cu").read_text()
    for old, new in replacements:
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    (folder / "mla_hopper.cu").write_text(source)
    for name in ("mla_units.cuh", "mla_emulated.cpp"):
        shutil.copy(_OWN / name, folder)
    defines = [f"-D{name}={value}" for name, value in mla_hopper.PROGRAM.parameters]
    options = ["-O2", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    library = folder / "emulated.so"
    subprocess.run(["g++", *options, *defines, folder / "mla_emulated.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def attend(monkeypatch: Any, library: Any, processors: int, *args: torch.Tensor, scale: float) -> torch.Tensor:
    """`mla_attention` of tensors on a CPU by the emulated kernels, on a card of so many multiprocessors."""

    def launch(program: cuda.Program, name: str, how: cuda.Launch, arguments: Sequence[Any]) -> None:
        if name == "attend":
            library.emulate_attend(how.grid, *(ctypes.byref(x) for x in arguments))
        else:
            batch, rows = arguments
            library.emulate_fold(min(how.grid, 3), ctypes.byref(batch), rows)

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "tensor_map", tensor_map)
    monkeypatch.setattr(mla_hopper, "_processors", lambda device: processors)
    q = args[0]
    out = torch.full((*q.shape[:2], mla_hopper.RANK), torch.nan, dtype=torch.bfloat16)
    mla_hopper.mla_attention(*args, out, scale)
    return out
