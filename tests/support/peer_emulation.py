"""Ranks, each a process, whose shared memory is that of this machine, with the kernels of peers.cu on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import compile_kernel

from dsv3_plugin.kernels.cuda import compiler, peers

_SMALL = {"_THREADS": 1, "_CHUNK": 8, "_CTAS": 3, "_PARTS": 2, "_PATIENCE_SECONDS": 20}
_SMALL |= {"_AT_ONCE_BYTES": 576, "_AT_ONCE_WORDS": 24, "_AT_ONCE_STEP": 1}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few CTAs, each one thread, with small chunks, so that little data takes many."""
    for name, value in _SMALL.items():
        monkeypatch.setattr(peers, name, value)


def build(folder: Path, ranks: int, replacements: Sequence[tuple[str, str]] = ()) -> Any:
    """The kernels for so many ranks as a library."""
    return compile_kernel(folder, peers.program(ranks), "peers_emulated.cpp", replacements)


def launch_on(library: Any, microseconds: int) -> Any:
    """What replaces `compiler.launch`. Ranks lag behind each other by up to so many microseconds at every turn."""

    def launch(program: compiler.Program, name: str, how: compiler.Launch, arguments: Sequence[Any]) -> None:
        assert 1 <= how.grid < 2**31
        library.lag_at_most(microseconds)
        getattr(library, f"emulate_{name}")(how.grid, *(_argument(x) for x in arguments))

    return launch


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        assert x.is_contiguous()
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_int(x) if isinstance(x, int) else ctypes.byref(x)


@dataclass(frozen=True)
class SharedMemory:
    """Each rank's memory, made before the ranks are forked; so it has one address in all of them."""

    parts: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, ranks: int, size: int, fill: int = peers.FILL) -> SharedMemory:
        """As it is before the first call."""
        return cls(tuple(torch.full((size,), fill, dtype=torch.uint8).share_memory_() for _ in range(ranks)))

    def view(self, rank: int) -> peers.View:
        """What a rank sees."""
        return peers.View(self.parts[rank], tuple(part.data_ptr() for part in self.parts), rank)
