"""Attention in two forms: a prompt's rows by heads, generated ones absorbed (the `two_form` profile).

Both read the same pages. For the rows of prompts the latent vectors that they may see are taken out of the pages, and
`kv_b_proj` makes keys and values of each head, rounded to the profile's dtype, one product a head. That has a third of
the absorbed form's arithmetic for many rows, and more than it for few. Heads take turns where keys are many: a head
computes alone what it computes beside others.
"""

from __future__ import annotations

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.attend import attend_to_pages, select_all
from dsv3_plugin.ops.absorb import of_parts
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.ops.linear import head_linear
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.prompt_batch import GeneratedRows, PromptRows, of_prompts
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope, softmax_scale
from dsv3_plugin.registry import Ops

KEYS_AND_VALUES = 1 << 30
"""Bytes of keys and values of heads that are in memory at once, if one head's are not more."""


def take_memory(like: torch.Tensor) -> None:
    """Take on `like`'s device, and give back, what `attend_in_two_forms` takes for keys and values: for an engine that
    measures what a pass needs, and has no requests yet.
    """
    like.new_empty(KEYS_AND_VALUES, dtype=torch.uint8)


def rotated(
    ops: Ops,
    heads: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    w_uk: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `absorb` takes, to the queries of each head [T, H, N + P], not absorbed, and what is cached [T, R + P]."""
    return of_parts(lambda q_nope, _: q_nope, ops[rms_norm], ops[rope], heads, w_uk, latent, norm_weight, eps, cos, sin)


def attend_in_two_forms(
    ops: Ops,
    config: DeepseekV3Config,
    q: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    pages: torch.Tensor,
    batch: PagedBatch,
) -> torch.Tensor:
    """q [T, H, N + P] as `rotated` gives them, of which the first `num_tokens` are the batch's; w_uk [H, R, N] and
    w_uv [H, V, R], the halves of `kv_b_proj`; pages [num_blocks, block_size, cached_dim], with the step's tokens
    written; to [num_tokens, H, V]. Rows of padding are zero.

    Raises `InputError` where the batch does not say which rows are of prompts.
    """
    prompts, generated = of_prompts(batch).prompts, of_prompts(batch).generated
    out = q.new_zeros(batch.num_tokens, *w_uv.shape[:2])
    if prompts is not None:
        out.index_copy_(0, prompts.rows, _by_heads(ops, config, q, w_uk, w_uv, pages, prompts))
    if generated is not None:
        out.index_copy_(0, generated.rows, _absorbed(ops, config, q, w_uk, w_uv, pages, generated))
    return out


def _by_heads(
    ops: Ops,
    config: DeepseekV3Config,
    q: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    pages: torch.Tensor,
    part: PromptRows,
) -> torch.Tensor:
    latent = pages.flatten(0, 1)[part.keys]
    compressed, k_rope = latent[:, : config.latent_dim].split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    rows, starts, scale = q[part.rows], (part.query_starts, part.key_starts), softmax_scale(config)
    of_a_head = len(latent) * (w_uk.shape[2] + w_uv.shape[1]) * q.element_size()
    at_once = max(1, KEYS_AND_VALUES // of_a_head)
    found = []
    for some in (slice(first, first + at_once) for first in range(0, len(w_uk), at_once)):
        of_each_head = compressed.unsqueeze(1).expand(-1, len(w_uk[some]), -1)
        k = ops[head_linear](of_each_head, w_uk[some].transpose(1, 2).contiguous())
        v = ops[head_linear](of_each_head, w_uv[some])
        found.append(ops[head_attention](rows[:, some].contiguous(), k, k_rope, v, *starts, scale=scale))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _absorbed(
    ops: Ops,
    config: DeepseekV3Config,
    q: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    pages: torch.Tensor,
    part: GeneratedRows,
) -> torch.Tensor:
    """The products of `absorb` and `MLA.values`, so the absorbed profile's bits over the same pages."""
    q_nope, q_rope = q[part.rows].split([w_uk.shape[2], config.qk_rope_head_dim], -1)
    absorbed = torch.cat((ops[head_linear](q_nope, w_uk), q_rope), -1)
    return ops[head_linear](attend_to_pages(ops, config, absorbed, pages, part.batch, select_all), w_uv)
