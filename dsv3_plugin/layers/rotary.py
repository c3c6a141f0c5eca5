"""The rotary table of a model, one for all its layers."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.ops.rope import rope_table


class RotaryTable(nn.Module):
    """cos and sin, fp32 [max_position_embeddings, qk_rope_head_dim / 2], built once and not saved."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        # On the CPU whatever the default device is: a table that another device computed could differ in a bit.
        with torch.device("cpu"):
            cos, sin = rope_table(config)
        device = torch.get_default_device()
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions, integers [T], to their rows of cos and sin, each fp32 [T, qk_rope_head_dim / 2]."""
        return self.cos[positions], self.sin[positions]
