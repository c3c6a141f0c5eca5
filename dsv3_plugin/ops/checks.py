"""What is checked of an operation's arguments before a launch."""

from __future__ import annotations

import torch

from dsv3_plugin.errors import InputError


def require(condition: bool, op: str, message: str) -> None:
    """Raise `InputError` that names the operation unless `condition` holds."""
    if not condition:
        raise InputError(f"{op}: {message}")


def require_matrix(op: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Require a contiguous two-dimensional tensor of one of `dtypes`."""
    require(tensor.dim() == 2, op, f"{name} has shape {tuple(tensor.shape)}, expected two dimensions")
    require(tensor.dtype in dtypes, op, f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    require(tensor.is_contiguous(), op, f"{name} of shape {tuple(tensor.shape)} is not contiguous")
