"""Multi-token prediction: one more layer that predicts the token after next (DeepSeek-V3 report, section 2.2).

At position i it takes the main model's normalised hidden state h_i and the embedding of token i + 1:
`eh_proj([enorm(embedding); hnorm(h_i)])`, then a decoder layer at position i. `shared_head.norm` and the main model's
head give the logits of token i + 2. Embedding and head are the main model's own. No position is masked: position 0
sees its embedding in training, so it does in serving. When the layer drafts further tokens, h is its own normalised
output.
"""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.attend import Attend
from dsv3_plugin.layers.decoder import DecoderLayer
from dsv3_plugin.layers.embedding import Embedding, Head
from dsv3_plugin.layers.linear import ColumnLinear
from dsv3_plugin.layers.norm import RMSNorm
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.registry import Ops


class SharedHead(nn.Module):
    """The norm before the shared output head."""

    def __init__(self, ops: Ops, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """The MTP layer; its weights are those of `model.layers.{num_hidden_layers}`."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layout: Layout = WHOLE) -> None:
        super().__init__(ops, config, config.mtp_layer_idx, layout)
        self.ranks = layout.tensor
        self.enorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)
        own_size = config.hidden_size // self.ranks.size
        self.eh_proj = ColumnLinear(ops, 2 * config.hidden_size, own_size, quantized=False)
        self.shared_head = SharedHead(ops, config)

    def predict(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """inputs_embeds [T, hidden] of the *next* tokens, hidden_states [T, hidden] of these, to [T, hidden].

        The result is normalised; it goes to the shared head, and is the hidden state of a further draft step.
        """
        x = self.eh_proj(torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1))
        return self.shared_head.norm(*self.forward(self.ranks.gather_columns(x), None, cos, sin, attend))


class DeepseekV3MTP(nn.Module):
    """A draft model that stands alone: the MTP layer with the main model's embedding and head."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layout: Layout = WHOLE) -> None:
        super().__init__()
        self.ops = ops
        self.embed_tokens = Embedding(ops, config.vocab_size, config.hidden_size)
        self.layer = MTPLayer(ops, config, layout)
        self.lm_head = Head(ops, config.vocab_size, config.hidden_size, layout.tensor)
        self.rotary = RotaryTable(config)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """input_ids, integers [T], of the *next* tokens; positions [T] and hidden_states [T, hidden] of these.

        Returns the normalised [T, hidden], which `lm_head` and a further draft step take.
        """
        cos, sin = self.rotary(positions)
        return self.layer.predict(self.embed_tokens(input_ids), hidden_states, cos, sin, attend)
