"""The weights that all contenders begin with: each tensor drawn by its key in Megatron's own checkpoints.

This package's layers and Megatron's have the same keys (`megatron_backend.names`). Gate and up are one tensor in both;
experts are stacked in one and a module each in the other, so each expert is drawn on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.megatron_backend.names import checkpoint_key

STD = 0.006
"""Of the report (section 4.2)."""
_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight\d+)$")
_STACKED = "mlp.experts.experts."


def tensors(model: nn.Module, config: DeepseekV3Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Key and place of each tensor that learns, an expert at a time."""
    for name, parameter in model.named_parameters():
        key = _EXPERT.sub(rf"{_STACKED}\1", checkpoint_key(name, config))
        if _STACKED in key and parameter.dim() == 3:
            yield from ((f"{key}{expert}", one) for expert, one in enumerate(parameter))
        else:
            yield key, parameter


@torch.no_grad()
def fill(model: nn.Module, config: DeepseekV3Config, seed: int) -> str:
    """Draw all weights, norms as ones; returns a digest of the keys, shapes and dtypes, and of the seed."""
    digest = sha256(str(seed).encode())
    for key, tensor in sorted(tensors(model, config), key=lambda pair: pair[0]):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.dim() == 1:
            tensor.fill_(1)
            continue
        drawn = int.from_bytes(sha256(f"{seed} {key}".encode()).digest()[:4], "little")
        tensor.normal_(0, STD, generator=torch.Generator(tensor.device).manual_seed(drawn))
    return digest.hexdigest()[:16]
