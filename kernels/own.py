"""This package's own implementations of each operation: what of them a certificate is of, and where their code begins.

Nothing here imports Triton.
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
from dsv3_plugin.kernels import cuda, selection

# Operation to the module that serves it; the function has the operation's name.
MODULES = {
    "linear": "bf16_linear",
    "head_linear": "bf16_linear",
    "grouped_linear": "bf16_linear",
    "quantize_fp8": "quantize",
    "fp8_linear": "fp8_linear",
    "grouped_fp8_linear": "fp8_linear",
    "rms_norm": "rms_norm",
    "rope": "rope",
    "silu_and_mul": "silu_and_mul",
    "router_linear": "router",
    "route": "router",
    "moe_router": "router",
    "combine": "combine",
    "mla_attention": "mla",
    "add_rms_norm": "rms_norm",
    "rms_norm_fp8": "rms_norm",
    "add_rms_norm_fp8": "rms_norm",
    "silu_and_mul_fp8": "silu_and_mul",
    "permute": "permute",
    "permute_fp8": "permute",
}
_FP8_PRODUCTS = ("fp8_linear", "grouped_fp8_linear")
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


def parts(op: str, *, shapes: str = "every shape") -> tuple[Implementation, ...]:
    """What may compute an operation on this machine, in Triton or, where it is faster, in CUDA C++."""
    if op in _FP8_PRODUCTS:
        makers = ("stream", "gluon", "triton") if cuda.available() else ("gluon", "triton")
        return tuple(_fp8_product(op, maker) for maker in makers)
    module = MODULES[op]
    return (
        Implementation(module, on_first_call(module, op), f"{_PACKAGE}.{module}:{op}", versions=_TRITON, shapes=shapes),
    )


def mla_hopper() -> Implementation:
    """Attention with V3's latent in CUDA C++."""
    return Implementation(
        "mla_hopper",
        on_first_call("mla_hopper", "mla_attention"),
        f"{_PACKAGE}.mla_hopper:mla_attention",
        versions=cuda.versions,
        shapes="V3's latent, 512 + 64",
    )


def _fp8_product(op: str, maker: str) -> Implementation:
    """One of the makers between which `selection` decides."""
    grouped = op == "grouped_fp8_linear"
    front = f"{_PACKAGE}.fp8_linear"
    launches = {
        "stream": f"{_PACKAGE}.fp8_stream:launch",
        "gluon": f"{_PACKAGE}.fp8_gluon:launch",
        "triton": f"{front}:_launch_grouped" if grouped else f"{front}:_launch",
    }
    others = [launch for name, launch in launches.items() if name != maker]
    decides = [f"{_PACKAGE}.selection:choose", f"{front}:makers"]
    if maker != "stream":
        others.append(f"{_PACKAGE}.selection:Choice")  # it holds how fp8_stream.cu is cut
    return Implementation(
        selection.IMPLEMENTATIONS[maker],
        partial(on_first_call("fp8_linear", "made_by"), maker, grouped),
        f"{front}:{op}",
        (*others, *decides),
        settings=partial(_cuts, grouped) if maker == "stream" else str,
        versions=cuda.versions if maker == "stream" else _TRITON,
        shapes="products in which selection.json finds it the fastest",
    )


def _cuts(grouped: bool) -> str:
    """The ways to cut fp8_stream.cu that are compared, and serve."""
    return "\n".join(sorted(map(repr, selection.cuts_to_check(grouped))))
