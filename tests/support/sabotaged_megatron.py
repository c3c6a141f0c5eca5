"""The Megatron testee with one property broken.

    SABOTAGE=experts|reduction|prompts python sabotaged_megatron.py ...

`experts`: their rows are added up in Megatron's order and precision. `reduction`: the partial sums of tensor-parallel
ranks are rounded before they travel, as in Megatron's own layers. `prompts`: where they end is forgotten.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import unpermute

from dsv3_plugin.conformance.testees import megatron
from dsv3_plugin.megatron_backend import sequences
from dsv3_plugin.megatron_backend.moe import MoE
from dsv3_plugin.megatron_backend.tensor_parallel import RankSlices


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


_fold = RankSlices.fold


def fold(self: RankSlices, branch: torch.Tensor) -> torch.Tensor:
    """The sum of bf16 numbers."""
    return _fold(self, branch.bfloat16().float())


_whole_sequences = sequences.whole_sequences


def without_prompts(starts: torch.Tensor | None, *shape: Any) -> sequences.Sequences:
    """All tokens are taken for prompts'."""
    return _whole_sequences(None if starts is None else torch.atleast_2d(starts)[0], *shape)


if __name__ == "__main__":
    what = os.environ["SABOTAGE"]
    if what == "experts":
        MoE.postprocess = postprocess
    elif what == "prompts":
        sequences.whole_sequences = without_prompts
    else:
        assert what == "reduction"
        RankSlices.fold = fold
    megatron.main()
