"""The MTP layer as SGLang's draft model (`--speculative-algorithm EAGLE`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from torch import nn

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.engines import switched_off
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.sglang_backend.attention import LatentAttend
from dsv3_plugin.sglang_backend.models.deepseek_v3 import CoreHead, prepare


class DeepseekV3ForCausalLMNextN(nn.Module):
    """SGLang gives it the target's embedding and head, and at each position the target's hidden state and the next
    token.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.ops, self.config = prepare(config, "DeepseekV3ForCausalLMNextN")
        self.model = DeepseekV3MTP(self.ops, self.config)
        self.lm_head = self.model.lm_head
        self.lm_head.quant_method = CoreHead()  # type: ignore[assignment]
        self.logits_processor = LogitsProcessor(config)
        self.weight_loader = WeightLoader(self.model, self.config, "mtp")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        """Next tokens' ids [T] to SGLang's logits output; the hidden states in it feed a further draft step."""
        attend = LatentAttend(self.ops, self.config, self.config.mtp_layer_idx, positions, forward_batch)
        hidden = self.model(input_ids, positions, forward_batch.spec_info.hidden_states, attend)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def set_embed_and_head(self, embed: nn.Parameter, head: nn.Parameter) -> None:
        """Take the target's, and free the copies."""
        self.model.embed_tokens.weight = embed
        self.lm_head.weight = head

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the MTP layer; embedding and head are the target's."""
        self.weight_loader.load(weights)


EntryClass: Any = [] if switched_off() else DeepseekV3ForCausalLMNextN
