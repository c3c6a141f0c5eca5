"""One transformer layer: attention, then a dense MLP or experts, each behind an RMSNorm and a residual sum."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.attend import Attend
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.mlp import MLP
from dsv3_plugin.layers.moe import MoE
from dsv3_plugin.layers.norm import RMSNorm
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.registry import Ops


class DecoderLayer(nn.Module):
    """Layer `layer_idx` of a model. Residual sums are in the profile's dtype, one rounding each."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layer_idx: int, layout: Layout = WHOLE) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(ops, layout.own_heads(config), layer_idx)
        self.post_attention_layernorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if not config.is_moe_layer(layer_idx):
            self.mlp = MLP(ops, config.hidden_size, config.intermediate_size // layout.tensor.size)
        elif layout.experts.size == 1:
            self.mlp = MoE(ops, config, layer_idx)
        else:
            self.mlp = ExpertParallelMoE(ops, config, layer_idx, layout)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """x [T, hidden]; cos, sin fp32 [T, qk_rope_head_dim / 2] at the tokens' positions; to [T, hidden]."""
        attention = self.self_attn(self.input_layernorm.for_projection(x), cos, sin, attend)
        x, normalised, activation = self.post_attention_layernorm.of_sum(x, attention)
        return x + (self.mlp(normalised, activation) if isinstance(self.mlp, MoE) else self.mlp(activation))
