"""Attention in two forms: a prompt's rows by heads, generated ones absorbed (the `two_form` profile).

Both read the same pages. For the rows of prompts the latent vectors that they may see are taken out of the pages, and
`kv_b_proj` makes keys and values of each head, rounded to the profile's dtype, one product a head. That has a third of
the absorbed form's arithmetic for many rows, and more than it for few.
"""

from __future__ import annotations

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import InputError
from dsv3_plugin.layers.attend import attend_to_pages, select_all
from dsv3_plugin.ops.absorb import of_parts
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.ops.linear import head_linear
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.prompt_batch import GeneratedRows, PromptBatch, PromptRows
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope, softmax_scale
from dsv3_plugin.registry import Ops


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
    if not isinstance(batch, PromptBatch):
        raise InputError(f"{batch}: the two_form profile needs the lengths of the prompts, a PromptBatch")
    out = q.new_zeros(batch.num_tokens, *w_uv.shape[:2])
    if batch.prompts is not None:
        out.index_copy_(0, batch.prompts.rows, _by_heads(ops, config, q, w_uk, w_uv, pages, batch.prompts))
    if batch.generated is not None:
        out.index_copy_(0, batch.generated.rows, _absorbed(ops, config, q, w_uk, w_uv, pages, batch.generated))
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
    of_each_head = compressed.unsqueeze(1).expand(-1, len(w_uk), -1)
    k = ops[head_linear](of_each_head, w_uk.transpose(1, 2).contiguous())
    v = ops[head_linear](of_each_head, w_uv)
    starts = part.query_starts, part.key_starts
    return ops[head_attention](q[part.rows], k, k_rope, v, *starts, scale=softmax_scale(config))


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
