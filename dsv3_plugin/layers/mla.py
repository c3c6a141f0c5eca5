"""Multi-head latent attention in its absorbed form (DeepSeek-V2 report, section 2.1.2).

`kv_b_proj` is never applied to a key or value. Its key half is folded into the query, its value half into the output,
so that attention reads the cached latent vectors themselves and prefill, decode and training share one arithmetic.
In the `two_form` profile that is so of generated tokens alone (`two_form`). The gradient has a form of its own
(`mla_gradient`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.layers.attend import Attend, OverPages, WholeSequences
from dsv3_plugin.layers.beside import beside
from dsv3_plugin.layers.linear import Activation, ColumnLinear, Linear, Quantized, RowLinear
from dsv3_plugin.layers.mla_gradient import GradientByHeads, heads_of
from dsv3_plugin.layers.norm import RMSNorm
from dsv3_plugin.layers.two_form import attend_in_two_forms, rotated
from dsv3_plugin.ops.absorb import absorb
from dsv3_plugin.ops.head_attention_gradients import has_head_gradients
from dsv3_plugin.ops.linear import head_linear, head_linear_fp8
from dsv3_plugin.ops.rope import softmax_scale
from dsv3_plugin.profile import ATTENTION_VARIABLE
from dsv3_plugin.registry import Ops


class MLA(nn.Module):
    """Self-attention of one layer, or of a tensor-parallel rank's heads: then `num_attention_heads` is their number."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.ops = ops
        self.config = config
        self.layer_idx = layer_idx
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = ColumnLinear(ops, hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(ops, hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(ops, config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = ColumnLinear(ops, config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(ops, hidden, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(ops, config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = ColumnLinear(ops, config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = RowLinear(ops, heads * config.v_head_dim, hidden)
        self._absorbed: tuple[torch.Tensor, torch.Tensor] | None = None

    def weights_changed(self) -> None:
        """Derive again, in place, what was derived from `kv_b_proj`: a CUDA graph reads it where it is."""
        if self._absorbed is not None:
            for kept, new in zip(self._absorbed, self._absorb(), strict=True):
                kept.copy_(new)

    def derived_is_current(self) -> bool:
        """Whether what was derived from `kv_b_proj` is that of the weight it holds now."""
        return self._absorbed is None or all(map(torch.equal, self._absorbed, self._absorb()))

    def absorbed_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The halves of `kv_b_proj` for each head, in the profile's dtype: (w_uk [H, kv_lora_rank, qk_nope_head_dim],
        w_uv [H, v_head_dim, kv_lora_rank]).

        FP8 values are multiplied by their scales and rounded to bf16, which is exact with power-of-two scales.
        """
        if self.kv_b_proj.weight.requires_grad:
            return self._absorb()
        if self._absorbed is None:
            self._absorbed = self._absorb()
        return self._absorbed

    def _absorb(self) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        weight = self.kv_b_proj.dequantize().view(config.num_attention_heads, -1, config.kv_lora_rank)
        w_uk, w_uv = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return w_uk.transpose(1, 2).contiguous(), w_uv.contiguous()

    def compress(self, x: Activation) -> tuple[Activation, torch.Tensor]:
        """x [T, hidden] to what the up projections read: queries [T, q_lora_rank], or x itself where the model has no
        q_lora_rank, and keys and values [T, latent_dim].
        """
        if self.config.q_lora_rank is None:
            return x, self.kv_a_proj_with_mqa(x)
        latent = beside(lambda: self.kv_a_proj_with_mqa(x), self.kv_a_proj_with_mqa.weight.device)
        return self.q_a_proj(x), latent()

    def up_project(self, queries: Activation) -> torch.Tensor:
        """The queries that `compress` gave, to those of each head [T, H, qk_head_dim], before they are rotated."""
        if self.config.q_lora_rank is None:
            heads = self.q_proj(queries)
        else:
            assert isinstance(queries, torch.Tensor)
            heads = self.q_b_proj(self.q_a_layernorm.for_projection(queries))
        return heads.view(-1, self.config.num_attention_heads, self.config.qk_head_dim)

    def attention(
        self, heads: torch.Tensor, latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> Activation:
        """heads [T, H, qk_head_dim] and latent [T, latent_dim], before its norm, to [T, H * v_head_dim] as `o_proj`
        reads it.
        """
        norm, ops = self.kv_a_layernorm, self.ops
        operands = heads, latent, norm.weight, *self.absorbed_weights()

        def absorbed(
            heads: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor, w_uk: torch.Tensor, w_uv: torch.Tensor
        ) -> Activation:
            q, cached = ops[absorb](heads, w_uk, latent, weight, norm.eps, cos, sin)
            return self.values(attend(self.layer_idx, q, cached), w_uv)

        def in_two_forms(
            heads: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor, w_uk: torch.Tensor, w_uv: torch.Tensor
        ) -> Activation:
            assert isinstance(attend, OverPages)
            q, cached = rotated(ops, heads, latent, weight, w_uk, norm.eps, cos, sin)
            compute = partial(attend_in_two_forms, ops, self.config, q, w_uk, w_uv)
            return attend.over_pages(self.layer_idx, cached, compute).flatten(1)

        form = in_two_forms if self._has_prompts(attend) else absorbed
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
        if trains and isinstance(attend, WholeSequences) and has_head_gradients(heads, self.config.v_head_dim):
            by_heads = partial(heads_of, ops, eps=norm.eps, cos=cos, sin=sin)
            lengths, scale = attend.seq_lens(len(latent)), softmax_scale(self.config)
            return GradientByHeads.apply(form, by_heads, lengths, scale, ops.mode == "strict", *operands)
        return form(*operands)

    def _has_prompts(self, attend: Attend) -> bool:
        """Whether rows of the pass take the form of prompts. Raises `EngineError` where the engine knows of none."""
        if self.ops.setting.profile.attention == "absorbed":
            return False
        if not isinstance(attend, OverPages):
            raise EngineError(f"the two_form profile is not yet served here: unset {ATTENTION_VARIABLE}")
        return attend.has_prompts()

    def values(self, out: torch.Tensor, w_uv: torch.Tensor) -> Activation:
        """What attention found [T, H, kv_lora_rank], and the value half of `absorbed_weights`, to [T, H * v_head_dim]
        as `o_proj` reads it.
        """
        if self.ops.quantizes_ahead:
            return Quantized(*self.ops[head_linear_fp8](out, w_uv, self.ops.scale_format))
        return self.ops[head_linear](out, w_uv).flatten(1)

    def forward(self, x: Activation, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """x [T, hidden]; cos, sin fp32 [T, qk_rope_head_dim / 2] at the tokens' positions; to [T, hidden]."""
        queries, latent = self.compress(x)
        return self.o_proj(self.attention(self.up_project(queries), latent, cos, sin, attend))
