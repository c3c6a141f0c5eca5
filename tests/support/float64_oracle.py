"""DeepSeek-V3 in float64, written from the reports and from DeepSeek's own modelling code.

It says what the model *means*, so it shares no operation with the package: heads keep their own keys and values (no
absorption), nothing is cached, batched, tiled or ordered, and every function is the textbook one. A test compares the
package with it, and then with a subclass that overrides one method by a known mistake, which the same comparison must
catch.

Sources: DeepSeek-V2 report (arXiv 2405.04434) section 2.1 for attention; DeepSeek-V3 report (arXiv 2412.19437)
sections 2.1.2 for routing and 2.2 for multi-token prediction; YaRN (arXiv 2309.00071) section 3 with the two `mscale`
factors of DeepSeek's `modeling_deepseek.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from dsv3_plugin.config import DeepseekV3Config

Tensor = torch.Tensor
FP8_BLOCK = 128


def float64_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of one file, in float64; FP8 weights are multiplied by their blocks' scales."""
    stored = load_file(checkpoint / "model.safetensors")
    tensors = {name: tensor.double() for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name, scale in stored.items():
        if name.endswith("_scale_inv"):
            weight = tensors[name.removesuffix("_scale_inv")]
            for i, row in enumerate(scale.tolist()):
                for j, value in enumerate(row):
                    rows = slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK)
                    weight[rows, j * FP8_BLOCK : (j + 1) * FP8_BLOCK] *= value
    return tensors


class Float64Oracle:
    """The model of `tensors` (Hugging Face's names, float64); one sequence at a time, all positions at once."""

    def __init__(self, config: DeepseekV3Config, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors

    def logits(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] to logits [T, vocab_size]."""
        return self.linear("lm_head", self.hidden_states(token_ids))

    def hidden_states(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] to the hidden states after the final norm [T, hidden]."""
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        for layer_idx in range(self.config.num_hidden_layers):
            x = self.layer(layer_idx, x)
        return self.rms_norm("model.norm", x)

    def mtp_logits(self, token_ids: Tensor) -> Tensor:
        """token_ids [T + 1] to logits [T, vocab_size]: row i sees tokens 0..i + 1 and predicts token i + 2."""
        prefix = f"model.layers.{self.config.num_hidden_layers}"
        hidden = self.mtp_hidden_states(token_ids[:-1])
        embeds = self.tensors["model.embed_tokens.weight"][token_ids[1:]]
        x = self.linear(f"{prefix}.eh_proj", self.mtp_input(prefix, embeds, hidden))
        x = self.layer(self.config.num_hidden_layers, x)
        return self.linear("lm_head", self.rms_norm(f"{prefix}.shared_head.norm", x))

    def mtp_hidden_states(self, token_ids: Tensor) -> Tensor:
        return self.hidden_states(token_ids)

    def mtp_input(self, prefix: str, embeds: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.rms_norm(f"{prefix}.enorm", embeds), self.rms_norm(f"{prefix}.hnorm", hidden)), -1)

    def layer(self, layer_idx: int, x: Tensor) -> Tensor:
        prefix = f"model.layers.{layer_idx}"
        x = x + self.attention(f"{prefix}.self_attn", self.rms_norm(f"{prefix}.input_layernorm", x))
        y = self.rms_norm(f"{prefix}.post_attention_layernorm", x)
        dense = layer_idx < self.config.first_k_dense_replace
        return x + (self.mlp(f"{prefix}.mlp", y) if dense else self.experts(f"{prefix}.mlp", y))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.tensors[f"{name}.weight"]
        )

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self.linear(f"{name}.gate_proj", x))
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    # Attention

    def attention(self, name: str, x: Tensor) -> Tensor:
        c = self.config
        heads, nope, rotary = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        if c.q_lora_rank is None:
            q = self.linear(f"{name}.q_proj", x)
        else:
            q = self.linear(
                f"{name}.q_b_proj", self.rms_norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", x))
            )
        q_nope, q_pe = q.unflatten(1, (heads, -1)).split([nope, rotary], -1)
        compressed, k_pe = self.linear(f"{name}.kv_a_proj_with_mqa", x).split([c.kv_lora_rank, rotary], -1)
        kv = self.linear(f"{name}.kv_b_proj", self.rms_norm(f"{name}.kv_a_layernorm", compressed))
        k_nope, v = kv.unflatten(1, (heads, -1)).split([nope, c.v_head_dim], -1)
        k_pe = self.rotate(k_pe.unsqueeze(1)).expand(-1, heads, -1)
        q, k = torch.cat((q_nope, self.rotate(q_pe)), -1), torch.cat((k_nope, k_pe), -1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.softmax_scale()
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.linear(f"{name}.o_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

    def rotate(self, x: Tensor) -> Tensor:
        """x [T, H, P] at positions 0..T - 1: each pair (2i, 2i + 1) is a complex number, turned by its angle."""
        turn = torch.polar(torch.full((), self.rotary_scale(), dtype=torch.float64), self.angles(len(x)))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn.unsqueeze(1)).flatten(-2)

    def angles(self, length: int) -> Tensor:
        """[length, P / 2]. With YaRN, what turns often in the original context stays, what hardly turns is slowed."""
        c, yarn, size = self.config, self.config.rope_scaling, self.config.qk_rope_head_dim
        frequencies = c.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        if yarn is not None:

            def dim_of(turns: float) -> float:
                wavelength = yarn.original_max_position_embeddings / turns
                return size / 2 * math.log(wavelength / (2 * math.pi), c.rope_theta)

            low, high = max(math.floor(dim_of(yarn.beta_fast)), 0), min(math.ceil(dim_of(yarn.beta_slow)), size - 1)
            stretched = ((torch.arange(size // 2) - low) / (high - low or 0.001)).clamp(0, 1).double()
            frequencies = frequencies * (1 - stretched) + frequencies / yarn.factor * stretched
        return torch.outer(torch.arange(length, dtype=torch.float64), frequencies)

    def temperature(self, mscale: float) -> float:
        factor = self.config.rope_scaling.factor if self.config.rope_scaling else 1.0
        return 0.1 * mscale * math.log(factor) + 1

    def rotary_scale(self) -> float:
        yarn = self.config.rope_scaling
        return self.temperature(yarn.mscale) / self.temperature(yarn.mscale_all_dim) if yarn else 1.0

    def softmax_scale(self) -> float:
        yarn = self.config.rope_scaling
        return (self.temperature(yarn.mscale_all_dim) ** 2 if yarn else 1.0) / math.sqrt(self.config.qk_head_dim)

    # Experts

    def experts(self, name: str, x: Tensor) -> Tensor:
        scores = self.router_logits(name, x).sigmoid()
        biased = scores + self.tensors[f"{name}.gate.e_score_correction_bias"]
        chosen = self.choose(biased)
        weights = self.expert_weights(scores, biased, chosen)
        out = self.mlp(f"{name}.shared_experts", x)
        for expert in range(self.config.n_routed_experts):
            rows = chosen[:, expert]
            out[rows] += weights[rows, expert, None] * self.mlp(f"{name}.experts.{expert}", x[rows])
        return out

    def router_logits(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.gate", x)

    def choose(self, biased: Tensor) -> Tensor:
        """Biased scores [T, E] to which experts each token takes, bool [T, E]."""
        c = self.config
        groups = biased.unflatten(1, (c.n_group, -1))
        if c.n_group > 1:
            group_scores = groups.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(group_scores, dtype=torch.bool)
            kept.scatter_(1, group_scores.topk(c.topk_group, -1).indices, True)
            groups = groups.masked_fill(~kept.unsqueeze(-1), self.score_of_masked_groups())
        ids = groups.flatten(1).topk(c.num_experts_per_tok, -1).indices
        return torch.zeros_like(biased, dtype=torch.bool).scatter_(1, ids, True)

    def score_of_masked_groups(self) -> float:
        return -math.inf

    def expert_weights(self, scores: Tensor, biased: Tensor, chosen: Tensor) -> Tensor:
        """[T, E], zero where not chosen."""
        weights = scores * chosen
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.config.routed_scaling_factor
