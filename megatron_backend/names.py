"""The same tensor by three names: the core's parameter, the module in Megatron, the key in a distributed checkpoint.

The keys are those of Megatron's own DeepSeek-V3 (MLA and MoE with TransformerEngine, which keeps some norms inside
the next linear layer), so that its checkpoints and ours are the same files.
"""

from __future__ import annotations

import re

from dsv3_plugin.config import DeepseekV3Config

# The core's modules, and Megatron's. `layer` is the MTP layer.
_IN_MODEL = {
    "model.embed_tokens": "embedding.word_embeddings",
    "embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
    "layer.enorm": "mtp.layers.0.enorm",
    "layer.hnorm": "mtp.layers.0.hnorm",
    "layer.eh_proj": "mtp.layers.0.eh_proj.core",
    "layer.shared_head.norm": "mtp.layers.0.final_layernorm",
}
_IN_LAYER = (
    ("self_attn.", "self_attention.core."),
    ("post_attention_layernorm.", "pre_mlp_layernorm."),
    ("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias"),
    ("mlp.gate.weight", "mlp.router.weight"),
    ("mlp.experts.", "mlp.experts.core."),
    ("mlp.shared_experts.", "mlp.shared_experts.core."),
    ("mlp.", "mlp.core."),
    ("", ""),
)

# Megatron's modules with our layers in them, and the keys of its own layers.
_KEYS = (
    ("mtp_model_layer.", "transformer_layer."),
    ("eh_proj.core.", "eh_proj."),
    ("self_attention.core.q_proj.", "self_attention.linear_q_proj."),
    ("self_attention.core.q_a_proj.", "self_attention.linear_q_down_proj."),
    ("self_attention.core.q_a_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.core.q_b_proj.", "self_attention.linear_q_up_proj."),
    ("self_attention.core.kv_a_proj_with_mqa.", "self_attention.linear_kv_down_proj."),
    ("self_attention.core.kv_a_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
    ("self_attention.core.kv_b_proj.", "self_attention.linear_kv_up_proj."),
    ("self_attention.core.o_proj.", "self_attention.linear_proj."),
    ("mlp.experts.core.", "mlp.experts.experts."),
    ("mlp.shared_experts.core.", "mlp.shared_experts."),
    ("mlp.core.", "mlp."),
    (".gate_up_proj.", ".linear_fc1."),
    (".down_proj.", ".linear_fc2."),
)


def module_name(parameter: str, first_layer: int = 0) -> str:
    """Megatron's name for a parameter of `DeepseekV3` or `DeepseekV3MTP`, on the stage that begins at `first_layer`.

    The name of an earlier stage's layer has a negative number, which no module has.
    """
    module, _, leaf = parameter.rpartition(".")
    if module in _IN_MODEL:
        return f"{_IN_MODEL[module]}.{leaf}"
    found = re.fullmatch(r"(?:model\.layers\.(\d+)|layer)\.(.+)", parameter)
    assert found is not None, parameter
    number, rest = found.groups()
    prefix = "mtp.layers.0.mtp_model_layer" if number is None else f"decoder.layers.{int(number) - first_layer}"
    core, ours = next(pair for pair in _IN_LAYER if rest.startswith(pair[0]))
    return f"{prefix}.{ours}{rest.removeprefix(core)}"


def checkpoint_key(module_name: str, config: DeepseekV3Config) -> str:
    """The key in a distributed checkpoint of what the whole model calls `module_name`."""
    key = module_name
    for ours, megatrons in _KEYS:
        key = key.replace(ours, megatrons)
    layer = re.match(r"decoder\.layers\.(\d+)\.", key)
    if layer is not None and not config.is_moe_layer(int(layer[1])):
        key = key.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return key
