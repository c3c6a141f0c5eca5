"""A fixed question to a draft model, for an engine's process and for the reference's."""

from __future__ import annotations

import hashlib

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.mtp import DeepseekV3MTP


@torch.inference_mode()
def draft_digest(model: DeepseekV3MTP, config: DeepseekV3Config) -> str:
    """Of the draft's logits for some tokens and hidden states."""
    count = 6
    token_ids = torch.arange(50, 50 + count)
    hidden = torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(0))
    states = hidden.to(model.ops.setting.profile.dtype)
    logits = model.lm_head(model(token_ids, torch.arange(count), states, WholeSequences(model.ops, config)))
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()
