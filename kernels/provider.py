"""The entry point of this package's kernels. Importing it imports neither Triton nor any other GPU library."""

from __future__ import annotations

from dsv3_plugin.hooks import Kernel, hookimpl
from dsv3_plugin.kernels import sm90_model


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """The model of Hopper on a CPU, and the kernels for Hopper itself."""
    return sm90_model.kernels()
