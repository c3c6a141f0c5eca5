"""One transformer layer: attention, then a dense MLP or experts, each behind an RMSNorm and a residual sum.

The sum behind a layer is left to the norm that follows, which makes both in one kernel.
"""

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

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] and, behind another layer, the residual [T, hidden] that it is added to; cos, sin fp32 [T,
        qk_rope_head_dim / 2] at the tokens' positions; to x and the residual of the layer or norm that follows.
        """
        if residual is None:
            residual, activation = x, self.input_layernorm.for_projection(x)
        else:
            residual, _, activation = self.input_layernorm.of_sum(residual, x)
        attention = self.self_attn(activation, cos, sin, attend)
        residual, normalised, activation = self.post_attention_layernorm.of_sum(residual, attention)
        return self.mlp(normalised, activation) if isinstance(self.mlp, MoE) else self.mlp(activation), residual
