"""Experts that vLLM moves between ranks (`--enable-eplb`): its `MixtureOfExperts` protocol over the core's layers.

vLLM owns the maps of where each expert lies, and moves weights and scales in place between two passes; the core's
layers read both where they are. A pass only tells how many rows went to each slot. A move changes no bit: replicas are
equal bytes, and a token's experts are combined in their own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.config import ParallelConfig

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
from dsv3_plugin.layers.model import DeepseekV3Model, expert_parallel_layers
from dsv3_plugin.layout import Layout, Placement


def with_replicas(layout: Layout, config: DeepseekV3Config, parallel_config: ParallelConfig) -> Layout:
    """`layout` with the redundant experts that the user asked for, where vLLM begins."""
    if not parallel_config.enable_eplb:
        return layout
    placement = Placement.linear(config.n_routed_experts, parallel_config.eplb_config.num_redundant_experts)
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    return replace(layout, placements=dict.fromkeys(layers, placement))


class MovableExperts:
    """What vLLM reads of a model whose experts it moves, and calls on it."""

    layout: Layout
    config: DeepseekV3Config
    weight_loader: WeightLoader
    model: DeepseekV3Model
    expert_weights: Sequence[Sequence[torch.Tensor]] = ()
    """Of each layer its stacked weights, and scales: [num_local_physical_experts, ...]."""

    @property
    def moe_layers(self) -> list[ExpertParallelMoE]:
        """The layers whose experts ranks share, in order."""
        return list(expert_parallel_layers(self.model).values())

    @property
    def num_moe_layers(self) -> int:
        """Of this pipeline stage."""
        return len(self.moe_layers)

    @property
    def num_expert_groups(self) -> int:
        """Groups among which the router chooses."""
        return self.config.n_group

    @property
    def num_logical_experts(self) -> int:
        """Without replicas."""
        return self.config.n_routed_experts

    num_routed_experts = num_logical_experts

    @property
    def num_shared_experts(self) -> int:
        """Every rank has its own."""
        return self.config.n_shared_experts

    @property
    def num_physical_experts(self) -> int:
        """With replicas, of all ranks."""
        return len(self.layout.placement(self.config, self.config.first_k_dense_replace).experts)

    @property
    def num_local_physical_experts(self) -> int:
        """Of this rank."""
        return self.num_physical_experts // self.layout.experts.size

    @property
    def num_redundant_experts(self) -> int:
        """Replicas."""
        return self.num_physical_experts - self.num_logical_experts

    def set_eplb_state(
        self,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
    ) -> None:
        """Take vLLM's tensors, which it goes on to change: the load int32 [layers, physical experts], and the maps
        int64 [layers, experts, most replicas] and [layers, experts].
        """
        self.expert_weights = [list(layer.experts.parameters()) for layer in self.moe_layers]
        for i, layer in enumerate(self.moe_layers):
            layer.expert_load = expert_load_view[i]
            layer.logical_to_physical_map = logical_to_physical_map[i]
            layer.logical_replica_count = logical_replica_count[i]

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """Called by elastic expert parallelism, which is refused."""
        raise NotImplementedError("the number of ranks is fixed")

    def follow_experts(self) -> None:
        """Tell the weight loader where vLLM has moved experts to."""
        layers = expert_parallel_layers(self.model)
        placements = {i: placement_of(layer) for i, layer in layers.items() if layer.expert_load is not None}
        if placements:
            self.layout = replace(self.layout, placements=placements)
            self.weight_loader.follow(self.layout)


def placement_of(layer: ExpertParallelMoE) -> Placement:
    """Where a layer's experts lie now."""
    experts = [0] * layer.num_slots
    counts = layer.logical_replica_count.tolist()
    for expert, slots in enumerate(layer.logical_to_physical_map[:, : max(counts)].tolist()):
        for slot in slots[: counts[expert]]:
            experts[slot] = expert
    return Placement(tuple(experts))
