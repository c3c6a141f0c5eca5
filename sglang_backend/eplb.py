"""Experts that SGLang places and moves between ranks: `--ep-num-redundant-experts`, `--init-expert-location`,
`--enable-eplb`.

SGLang decides where each expert lies, and moves weights and scales in place between two passes; the core's layers read
both where they are, and send an expert's rows to its replicas in turns, which are equal bytes: a move changes no bit.
The draft's experts stay where they begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation, get_global_expert_location_metadata

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.model import DeepseekV3Model, expert_parallel_layers
from dsv3_plugin.layout import Layout, Placement


def placed(layout: Layout, config: DeepseekV3Config) -> Layout:
    """`layout` with the experts where SGLang has them now."""
    metadata = get_global_expert_location_metadata()
    if layout.experts.size == 1 or metadata is None:
        return layout
    experts_of_layers = metadata.physical_to_logical_map_cpu.tolist()
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    return replace(layout, placements={i: Placement(tuple(experts_of_layers[i])) for i in layers})


class MovableExperts:
    """What SGLang reads of a model whose experts it moves."""

    layout: Layout
    config: DeepseekV3Config
    weight_loader: WeightLoader
    model: DeepseekV3Model
    followed: torch.Tensor | None = None
    """SGLang's `physical_to_logical_map` [layers, slots] that the layers have; None: that of the model's start."""

    @classmethod
    def get_model_config_for_expert_location(cls, config: Any) -> ModelConfigForExpertLocation:
        """The sizes of SGLang's maps, from config.json."""
        return ModelConfigForExpertLocation(
            num_layers=config.num_hidden_layers, num_logical_experts=config.n_routed_experts, num_groups=config.n_group
        )

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
        """Of each layer its stacked weights, and scales: [experts of this rank, ...]. As bytes where they are fp8,
        which gloo does not know.
        """
        return {
            i: [_movable(weight) for weight in layer.experts.parameters()]
            for i, layer in expert_parallel_layers(self.model).items()
        }

    def follow_experts(self) -> None:
        """Before a pass, and before weights are read or written by their names: know what SGLang has moved."""
        metadata, layers = get_global_expert_location_metadata(), expert_parallel_layers(self.model)
        if metadata is None or not layers:
            return
        now = metadata.physical_to_logical_map_cpu
        if self.followed is not None and torch.equal(self.followed, now):
            return
        self.followed = now.clone()
        self.layout = placed(self.layout, self.config)
        self.weight_loader.follow(self.layout)
        for i, layer in layers.items():
            layer.place(self.layout.placement(self.config, i))

    @contextmanager
    def following_experts(self) -> Iterator[None]:
        """Around a pass: experts are where SGLang has moved them, and where it counts, it is told how many rows this
        rank sends to each slot.
        """
        self.follow_experts()
        recorder = get_global_expert_distribution_recorder()
        counted = expert_parallel_layers(self.model) if recorder.recording else {}
        for layer in counted.values():
            layer.expert_load = torch.zeros(layer.num_slots, dtype=torch.int64, device=layer.gate.weight.device)
        yield
        for i, layer in counted.items():
            assert layer.expert_load is not None
            slots = torch.arange(layer.num_slots, device=layer.expert_load.device)
            with recorder.with_current_layer(i):
                recorder.on_select_experts(topk_ids=slots.repeat_interleave(layer.expert_load))
            layer.expert_load = None


def _movable(weight: torch.Tensor) -> torch.Tensor:
    return weight.data.view(torch.uint8) if weight.element_size() == 1 else weight.data
