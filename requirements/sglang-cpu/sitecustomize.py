"""What must happen before SGLang is imported; Python imports this module by its name when it starts.

SGLang imports torchvision unconditionally. torchvision's published build needs CUDA: beside a CPU build of torch its
operators are missing and its import fails where it describes two of them to the tracer. They are declared here first.

SGLang moves its bookkeeping (which token is in which slot) with Triton kernels. Triton's interpreter runs them on a
CPU; the variable is read when the kernels are defined. torch.compile, which SGLang puts around its sampling of seeded
requests, cannot trace that interpreter.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from typing import Any


class TorchvisionOperators(MetaPathFinder):
    """Declares torchvision's operators when torchvision is about to be imported, and finds nothing itself."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called by Python for each import."""
        if name == "torchvision" and TorchvisionOperators.library is None:
            import torch

            library = TorchvisionOperators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, TorchvisionOperators())
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
