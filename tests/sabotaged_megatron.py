"""The Megatron testee with one property broken: the experts' rows are added up in Megatron's order and precision."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import unpermute

from dsv3_plugin.conformance.testees import megatron
from dsv3_plugin.megatron_backend.moe import MoE


def postprocess(self: MoE, output: torch.Tensor, shared_expert_output: Any) -> torch.Tensor:
    """Weighted in bf16, added up by Megatron, the shared expert last."""
    dispatcher = self.token_dispatcher
    probs = dispatcher.probs.T.contiguous().masked_select(dispatcher.routing_map.T.contiguous())
    weighted = output * probs.unsqueeze(1).to(output.dtype)
    combined = unpermute(
        weighted,
        dispatcher.reversed_local_input_permutation_mapping,
        restore_shape=dispatcher.hidden_shape_before_permute,
        routing_map=dispatcher.routing_map,
    )
    return combined.view(dispatcher.hidden_shape) + shared_expert_output


if __name__ == "__main__":
    MoE.postprocess = postprocess
    megatron.main()
