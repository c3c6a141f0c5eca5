"""The MTP layer as SGLang's draft model (`--speculative-algorithm EAGLE`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.engines import switched_off
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.sglang_backend import compat
from dsv3_plugin.sglang_backend.attention import LatentAttend, compute
from dsv3_plugin.sglang_backend.layout import most_tokens
from dsv3_plugin.sglang_backend.models.deepseek_v3 import CoreHead, load_checkpoint, plain_logits_processor, prepare
from dsv3_plugin.sglang_backend.updates import Bucket


class DeepseekV3ForCausalLMNextN(nn.Module):
    """SGLang gives it the target's embedding and head, and at each position the target's hidden state and the next
    token.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        path, load_format = compat.draft_checkpoint()
        self.ops, self.config, self.layout = prepare(config, "DeepseekV3ForCausalLMNextN", path, load_format)
        self.model = DeepseekV3MTP(self.ops, self.config, self.layout)
        self.lm_head = self.model.lm_head
        self.lm_head.quant_method = CoreHead()  # type: ignore[assignment]
        self.logits_processor = plain_logits_processor(config)
        self.weight_loader = WeightLoader(
            self.model, self.config, "mtp", layout=self.layout, holds_weights=load_format == "dummy"
        )
        self.prompt_lens: dict[str, int] = {}
        """Of the latest pass over prompts (`attention.note_prompts`)."""
        self.received: Bucket | None = None

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        """Next tokens' ids [T] to SGLang's logits output; the hidden states in it feed a further draft step."""
        self.weight_loader.require_whole()
        first = self.config.mtp_layer_idx
        attend = LatentAttend(self.ops, self.config, first, positions, forward_batch, self.prompt_lens)
        self.layout.begin_pass(most_tokens(forward_batch))
        hidden = compute(self.model, attend, input_ids, positions, forward_batch.spec_info.hidden_states)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def set_embed_and_head(self, embed: nn.Parameter, head: nn.Parameter) -> None:
        """Take the target's, and free the copies."""
        self.model.embed_tokens.weight = embed
        self.lm_head.weight = head
        self.weight_loader.share(("model.embed_tokens.weight", "lm_head.weight"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the MTP layer of a checkpoint; the parts of an update are left for `updates` to take."""
        if self.received is not None:
            self.received += weights
        else:
            load_checkpoint(self.weight_loader, weights, compat.draft_checkpoint()[0])


EntryClass: Any = [] if switched_off() else DeepseekV3ForCausalLMNextN
