"""Megatron's configuration of a DeepSeek-V3 model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.profile import Profile, profile_for


def of_model(config: DeepseekV3Config, profile: Profile) -> dict[str, Any]:
    """What a checkpoint's configuration says, by every name that Megatron's arguments and configuration have for it:
    `dsv3_plugin.megatron_backend.options.OF_MODEL`.
    """
    dense = config.first_k_dense_replace
    yarn = config.rope_scaling
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rotary_base": config.rope_theta,
        "rope_type": "yarn" if yarn else "rope",
        # Without YaRN they are Megatron's, which then does not read them.
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "original_max_position_embeddings": yarn.original_max_position_embeddings if yarn else 4096,
        "beta_fast": yarn.beta_fast if yarn else 32,
        "beta_slow": yarn.beta_slow if yarn else 1,
        "mscale": yarn.mscale if yarn else 1.0,
        "mscale_all_dim": yarn.mscale_all_dim if yarn else 0.0,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": config.vocab_size,
        "num_experts": config.n_routed_experts,
        "num_moe_experts": config.n_routed_experts,
        "moe_layer_freq": [0] * dense + [1] * (config.num_hidden_layers - dense),
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_num_groups": config.n_group,
        "moe_router_group_topk": config.topk_group,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "mtp_num_layers": config.num_nextn_predict_layers or None,
        "bf16": profile.dtype == torch.bfloat16,
        "params_dtype": profile.dtype,
    }


_TRAINING: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
    "moe_token_dispatcher_type": "alltoall",
    "mtp_loss_scaling_factor": 0.3,
    # Fusions are kernels of Megatron's own arithmetic.
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}
"""How the report trains (section 4.2), and what the layers ask for."""


def transformer_config(config: DeepseekV3Config, profile: Profile, **settings: Any) -> MLATransformerConfig:
    """What a Megatron training script needs to know of a model; `settings` are Megatron's own fields and win.

    The defaults train as the DeepSeek-V3 report does (section 4.2): bias update at 0.001, complementary sequence-wise
    balance loss at 0.0001, MTP loss at 0.3. Raises `EngineError` for a field that Megatron does not have, and for
    values that it refuses.
    """
    known = {field.name for field in fields(MLATransformerConfig)}
    if unknown := sorted(settings.keys() - known):
        raise EngineError(f"Megatron's MLATransformerConfig has no {', '.join(unknown)}")
    chosen: dict[str, Any] = {
        **{name: value for name, value in of_model(config, profile).items() if name in known},
        **_TRAINING,
        "activation_func": torch.nn.functional.silu,
        "pipeline_dtype": profile.dtype,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # What tensor parallelism needs here; see `tensor_parallel`.
        "sequence_parallel": settings.get("tensor_model_parallel_size", 1) > 1,
        "expert_tensor_parallel_size": 1,
        "bias_activation_fusion": False,
    }
    try:
        return MLATransformerConfig(**(chosen | settings))
    except (ValueError, AssertionError) as error:
        raise EngineError(f"Megatron refuses these settings: {error or 'it does not say why'}") from error


def megatron_arguments(config: DeepseekV3Config) -> dict[str, Any]:
    """The model as Megatron's command line names it: for `args` in its checkpoints, and a script's defaults."""
    described = of_model(config, profile_for(config))
    # Megatron derives these from other arguments.
    for name in ("num_moe_experts", "gated_linear_unit", "params_dtype"):
        del described[name]
    return {
        **described,
        **_TRAINING,
        "vocab_size": config.vocab_size,
        "ckpt_format": "torch_dist",
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
    }
