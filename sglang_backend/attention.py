"""SGLang's latent cache behind the core's `Attend`.

SGLang keeps one vector a token in a pool of slots, and a table of the slots of each request; a slot is a page of one
token. A pass brings the tokens of several requests, at consecutive positions each, so a request's length is its last
position plus one, in every phase: prefill, chunks, decode, draft, verification. `LatentAttend` writes the vectors and
calls the bound `mla_attention`: it moves data and computes nothing, and needs none of SGLang's attention backends.
`LatentBackend` is the backend of that kind to choose: it prepares nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_context import get_attn_backend

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.ops.rope import softmax_scale
from dsv3_plugin.registry import Ops

NAME = "dsv3"


class LatentAttend:
    """`Attend` for the tokens of one pass; layer `first_layer` of the model is layer 0 of the pool."""

    def __init__(
        self, ops: Ops, config: DeepseekV3Config, first_layer: int, positions: torch.Tensor, forward_batch: Any
    ) -> None:
        backend = get_attn_backend()
        self.ops = ops
        self.config = config
        self.scale = softmax_scale(config)
        self.first_layer = first_layer
        self.pool = backend.token_to_kv_pool
        self.slots = forward_batch.out_cache_loc
        counts = query_counts(forward_batch, len(positions))
        ends = counts.cumsum(0)
        self.query_start_loc = torch.cat((ends.new_zeros(1), ends))
        self.seq_lens = positions[ends - 1] + 1
        self.block_table = backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]

    def __call__(self, layer_idx: int, q: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """See `dsv3_plugin.layers.mla.Attend`."""
        # [slots, 1, latent_dim]: blocks of one token, as `mla_attention` takes them.
        pages = self.pool.get_key_buffer(layer_idx - self.first_layer + self.pool.start_layer)
        pages[self.slots, 0] = latent
        return self.ops.mla_attention(
            q,
            pages,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            kv_lora_rank=self.config.kv_lora_rank,
            scale=self.scale,
        )


def query_counts(forward_batch: Any, tokens: int) -> torch.Tensor:
    """How many of a pass's `tokens` belong to each request, integers [requests]."""
    mode, requests = forward_batch.forward_mode, forward_batch.req_pool_indices
    if mode.is_extend() and not mode.is_target_verify():
        return forward_batch.extend_seq_lens
    # Decode, draft and verification: the same number for each.
    return torch.full_like(requests, tokens // max(len(requests), 1))


class LatentBackend(AttentionBackend):
    """Holds the pools, which is all that `LatentAttend` asks for."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.max_context_len = runner.model_config.context_len

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Nothing: `LatentAttend` reads the batch itself."""


class DraftSteps:
    """What SGLang's draft loop asks for: a backend for each of its steps."""

    def __init__(self, backend: LatentBackend, steps: int) -> None:
        self.attn_backends = [backend] * steps

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Nothing."""


def create_decode_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """Around `DraftBackendFactory.create_decode_backend`, which knows SGLang's own backends only."""
    backend = factory.draft_model_runner.attn_backend
    if not isinstance(backend, LatentBackend) or factory.speculative_num_steps <= 1:
        return original(factory)
    return DraftSteps(backend, factory.speculative_num_steps)


def create_draft_extend_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """Around `DraftBackendFactory.create_draft_extend_backend`."""
    backend = factory.draft_model_runner.attn_backend
    return backend if isinstance(backend, LatentBackend) else original(factory)
