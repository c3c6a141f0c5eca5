"""This package's own implementations of each operation: what of them a certificate is of, and where their code begins.

An operation's kernel in Triton is the function of its name in `triton/`, in the file that is called as that of its
declaration. Nothing here imports Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from dsv3_plugin.hooks import Implementation, versions_of
from dsv3_plugin.kernels import selection
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.ops.operation import Operation

_PACKAGE = __package__
_TRITON = versions_of("triton")


def on_first_call(module: str, function: str) -> Callable[..., Any]:
    """`function` of a module of this package that is imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)(*args, **kwargs)

    return call


def missing() -> str | None:
    """What Triton's kernels lack on this machine, and what to install; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler for its launchers: install gcc or clang, or name one in CC"
    return None


def triton_module(op: Operation[..., Any]) -> str:
    """Where an operation's kernel in Triton is."""
    return f"triton.{op.module}"


def front_module(op: Operation[..., Any]) -> str:
    """Where the function is that an operation's kernel begins with, which may choose by shape."""
    return "head_attention" if op is head_attention else triton_module(op)


def parts(op: Operation[..., Any], *, shapes: str = "every shape") -> tuple[Implementation, ...]:
    """What may compute an operation on this machine, in Triton or, where it is faster, in CUDA C++."""
    if op in (fp8_linear, grouped_fp8_linear):
        backends = ("cuda", "gluon", "triton") if compiler.available() else ("gluon", "triton")
        return tuple(_fp8_product(op, backend) for backend in backends)
    module = triton_module(op)
    by_heads = op is head_attention and compiler.available()
    run, entry = on_first_call(module, op.name), f"{_PACKAGE}.{module}:{op.name}"
    in_triton = Implementation(module, run, entry, versions=_TRITON, shapes="other heads" if by_heads else shapes)
    return (_in_cuda("head_hopper", op.name, "V3's heads, 128 + 64 and 128"), in_triton) if by_heads else (in_triton,)


def mla_hopper() -> Implementation:
    """Attention with V3's latent in CUDA C++."""
    return _in_cuda("mla_hopper", "mla_attention", "V3's latent, 512 + 64")


def _in_cuda(module: str, function: str, shapes: str) -> Implementation:
    """An implementation in CUDA C++."""
    module = f"cuda.{module}"
    run, entry = on_first_call(module, function), f"{_PACKAGE}.{module}:{function}"
    return Implementation(module, run, entry, versions=compiler.versions, shapes=shapes)


def _fp8_product(op: Operation[..., Any], backend: str) -> Implementation:
    """One of the backends between which `selection` decides."""
    grouped = op is grouped_fp8_linear
    front = f"{_PACKAGE}.triton.fp8_linear"
    launches = {
        "cuda": f"{_PACKAGE}.cuda.fp8_gemm:launch",
        "gluon": f"{_PACKAGE}.triton.fp8_gluon:launch",
        "triton": f"{front}:_launch_grouped" if grouped else f"{front}:_launch",
    }
    others = [launch for name, launch in launches.items() if name != backend]
    decides = [f"{_PACKAGE}.selection:choose", f"{front}:backends"]
    if backend != "cuda":
        others.append(f"{_PACKAGE}.selection:Choice")  # it holds the tile configuration of fp8_gemm.cu
    return Implementation(
        selection.IMPLEMENTATIONS[backend],
        partial(on_first_call("triton.fp8_linear", "by_backend"), backend, grouped),
        f"{front}:{op.name}",
        (*others, *decides),
        settings=partial(_configs, grouped) if backend == "cuda" else str,
        versions=compiler.versions if backend == "cuda" else _TRITON,
        shapes="products in which selection.json finds it the fastest",
    )


def _configs(grouped: bool) -> str:
    """The tile configurations of fp8_gemm.cu that are compared, and serve."""
    return "\n".join(sorted(map(repr, selection.configs_to_check(grouped))))
