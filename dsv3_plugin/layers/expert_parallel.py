"""DeepSeekMoE with its routed experts spread over ranks.

Each token has one rank that routes it: its own, or of the tensor-parallel ranks that all have it, one. That rank sends
a row to the rank of each chosen expert, fp8 with scales where experts multiply in fp8 (DeepSeek-V3 report, section
3.4), gets a row back, and combines: in ascending order of experts, in fp32, the shared expert last. No sum is split, so
no number of ranks can change a bit, and nothing that only moves data may add.

Where ranks write into each other's memory (`dsv3_plugin.peers`) and the host knows how many tokens the fullest rank
has, how many rows go where stays on the device, and no shape depends on it: a CUDA graph holds such a pass. Elsewhere
the host waits once a layer for the numbers of rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dsv3_plugin.config import FP8_BLOCK, DeepseekV3Config
from dsv3_plugin.layers.linear import Activation, Quantized, quantize
from dsv3_plugin.layers.moe import MoE, permute_activation
from dsv3_plugin.layout import Exchange, Layout, Placement
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.ops.permute import sort_by_expert
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.registry import Ops


class ExpertParallelMoE(MoE):
    """A rank's part of a mixture-of-experts layer. All ranks of `layout.experts` make each call together, also one that
    has no tokens.
    """

    logical_to_physical_map: torch.Tensor
    """Of each expert the slots that hold it, as in `Placement.maps`; an engine that moves experts writes to it."""
    logical_replica_count: torch.Tensor
    expert_load: torch.Tensor | None = None
    """Integers [num_slots], counts the rows that this rank sends to each slot, for an engine that moves experts."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layer_idx: int, layout: Layout) -> None:
        super().__init__(ops, config, layer_idx, layout)
        self.layout = layout
        self.hidden_size = config.hidden_size
        placement = layout.placement(config, layer_idx)
        self.num_slots = len(placement.experts)
        device = torch.get_default_device()
        for name in ("logical_to_physical_map", "logical_replica_count"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device), persistent=False)
        self.place(placement)
        self.exchange = self._exchange_over_peers()

    def _exchange_over_peers(self) -> Exchange | None:
        """Made by all ranks together; None where they have no such memory."""
        profile, peers = self.ops.setting.profile, self.layout.experts.peers
        returned = self.hidden_size * profile.dtype.itemsize
        if peers is None:
            return None
        sent = (self.hidden_size, 4 * _padded_scales(self.hidden_size)) if profile.is_fp8 else (returned,)
        return peers.exchange(self.num_slots, sent, returned, self._rows_of(peers.tokens))

    def _rows_of(self, tokens: int) -> int:
        """How many rows a rank sends at most of so many tokens."""
        return -(-tokens // self.layout.tensor.size) * self.gate.config.num_experts_per_tok

    def place(self, placement: Placement) -> None:
        """The experts lie so from now on: whoever says so has moved them."""
        device = self.logical_replica_count.device
        with torch.device("cpu"):
            slots, counts = placement.maps(self.gate.config.n_routed_experts)
        self.logical_to_physical_map, self.logical_replica_count = slots.to(device), counts.to(device)

    def forward(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `MoE.forward`; x is the same on each rank of `layout.tensor`."""
        shared = self.shared_experts(activation)
        own = self.layout.tensor.share_of(len(x))
        topk_ids, topk_weights = self.gate(x[own])
        rows, slots, slot_counts = self.ops[sort_by_expert](self._chosen_slots(topk_ids), self.num_slots)
        if self.expert_load is not None:
            self.expert_load += slot_counts
        routed = permute_activation(self.ops, activation, rows + own.start)
        expert_out = self._at_the_experts(routed, slot_counts, len(x))
        combined = self.ops[combine](expert_out, slots, topk_weights, shared[own].contiguous())
        return self.layout.tensor.gather_shares(combined, len(x))

    def _chosen_slots(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Experts int64 [T, k] to slots [T, k]; ranks take an expert's replicas in turns."""
        replica = self.layout.experts.rank % self.logical_replica_count[topk_ids]
        return self.logical_to_physical_map[topk_ids, replica]

    def _most_rows(self, tokens: int) -> int | None:
        """How many rows a rank sends at most in this pass, where this one has `tokens`; None if the host does not know,
        or they have no room in peers' memory.
        """
        layout, peers = self.layout, self.layout.experts.peers
        assert peers is not None
        most = tokens if layout.experts.size == layout.tensor.size else peers.most_tokens
        return None if most is None or most > peers.tokens else self._rows_of(most)

    def _at_the_experts(self, x: Activation, slot_counts: torch.Tensor, tokens: int) -> torch.Tensor:
        """x [S, hidden], sorted by slot, and how many rows each slot of all ranks gets, [num_slots], to what the
        experts make of them, [S, hidden], in a pass of `tokens`.
        """
        if self.exchange is not None and (most_rows := self._most_rows(tokens)) is not None:
            return self._over_peers(self.exchange, x, slot_counts, most_rows)
        group = self.layout.experts
        of_ranks = slot_counts.view(group.size, -1)
        counts = group.exchange(of_ranks, [1] * group.size, [1] * group.size)
        sent, received = torch.stack((of_ranks.sum(1), counts.sum(1))).tolist()  # the host waits once
        came = self._unpacked(group.exchange(self._packed(x), sent, received))
        # They came by rank, and by expert from each.
        local = torch.arange(counts.shape[1], device=counts.device).repeat(group.size)
        experts = local.repeat_interleave(counts.flatten())[:, None]
        order, places, own_counts = self.ops[sort_by_expert](experts, counts.shape[1])
        out = self.experts(permute_activation(self.ops, came, order), own_counts)
        return group.exchange(out[places.flatten()], received, sent)

    def _over_peers(self, exchange: Exchange, x: Activation, slot_counts: torch.Tensor, most_rows: int) -> torch.Tensor:
        """The same where no rank sends more than `most_rows` rows: as many from each have room at the experts."""
        rows_there = most_rows * self.layout.experts.size
        assert len(x[0] if isinstance(x, Quantized) else x) <= most_rows, "a rank has more tokens than its engine said"
        if not self.ops.setting.profile.is_fp8:
            assert isinstance(x, torch.Tensor)
            (came,), own_counts = exchange.send((x,), slot_counts, rows_there)
            out = self.experts(came.view(x.dtype), own_counts)
            return exchange.send_back(out, len(x))
        values, scale = quantize(self.ops, x)
        blocks = scale.shape[1]
        padded = functional.pad(scale, (0, _padded_scales(self.hidden_size) - blocks)).contiguous()
        (came, scales), own_counts = exchange.send((values, padded), slot_counts, rows_there)
        activation = Quantized(came.view(E4M3), scales.view(torch.float32)[:, :blocks])
        return exchange.send_back(self.experts(activation, own_counts), len(values))

    def _packed(self, x: Activation) -> torch.Tensor:
        """One tensor [S, ...] of all that travels."""
        if isinstance(x, torch.Tensor) and not self.ops.setting.profile.is_fp8:
            return x
        values, scale = quantize(self.ops, x)
        return torch.cat((values.view(torch.uint8), scale.contiguous().view(torch.uint8)), dim=1)

    def _unpacked(self, x: torch.Tensor) -> Activation:
        if x.dtype != torch.uint8:
            return x
        values, scale = x.split([self.hidden_size, x.shape[1] - self.hidden_size], dim=1)
        return Quantized(values.contiguous().view(E4M3), scale.contiguous().view(torch.float32))


def _padded_scales(hidden_size: int) -> int:
    """The scales of a row as they travel between peers, a whole number of 16 bytes."""
    return -(-hidden_size // (4 * FP8_BLOCK)) * 4
