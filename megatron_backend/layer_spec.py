"""Our modules in Megatron's places; its `TransformerLayer`, residual sums, schedules and checkpoints stay."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from dsv3_plugin.megatron_backend.layers import Attention, Binding, DenseMLP, EHProjection, Norm, SharedExpert
from dsv3_plugin.megatron_backend.moe import LocalExperts, MoE, Router


def layer_spec(binding: Binding, layer_idx: int) -> ModuleSpec:
    """Layer `layer_idx` of the model; the MTP layer's index is `mtp_layer_idx`."""
    config = binding.config
    if config.is_moe_layer(layer_idx):
        submodules = MoESubmodules(
            router=partial(Router, binding),
            experts=partial(LocalExperts, binding),
            shared_experts=partial(SharedExpert, binding, config.shared_intermediate_size),
        )
        mlp = partial(MoE, binding, submodules=submodules)
    else:
        mlp = partial(DenseMLP, binding, config.intermediate_size)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=partial(Norm, binding),
            self_attention=ModuleSpec(
                module=Attention, params={"binding": binding, "attn_mask_type": AttnMaskType.causal}
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=partial(Norm, binding),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    binding: Binding, transformer_config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage, and the final norm."""
    first = get_transformer_layer_offset(transformer_config, vp_stage)
    count = get_num_layers_to_build(transformer_config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(binding, i) for i in range(first, first + count)], layer_norm=partial(Norm, binding)
    )


def mtp_spec(binding: Binding) -> MultiTokenPredictionBlockSubmodules | None:
    """The MTP layer, where the model has one."""
    if not binding.config.num_nextn_predict_layers:
        return None
    norm = partial(Norm, binding)
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        layer_norm=norm,
        eh_proj=ModuleSpec(module=EHProjection, params={"binding": binding}),
        mtp_model_layer=layer_spec(binding, binding.config.mtp_layer_idx),
    )
    return MultiTokenPredictionBlockSubmodules([ModuleSpec(MultiTokenPredictionLayer, submodules=submodules)])
