"""Which part of a model a process holds, when several ranks share it.

Three ways of sharing, none of which changes a bit. Tensor-parallel ranks hold heads, vocabulary and the features of
dense MLPs, in whole slices of the sums (`dsv3_plugin.ops.slices`). Expert-parallel ranks hold whole routed experts, in
blocks of neighbours: also where tensor parallelism alone is asked for, since a routed expert is never cut. Pipeline
stages hold layers. Embedding, norms, router and latent projections are whole on each rank that runs them.

An adapter builds a `Layout` from its engine's process groups. A `Group` moves tensors between ranks and adds nothing:
whoever adds says in which order. Ranks of one host that write into each other's memory do both without the process
group, `dsv3_plugin.peers`; the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import distributed as dist

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError
from dsv3_plugin.ops.slices import Slices, tree_sum
from dsv3_plugin.profile import SLICES_VARIABLE, Profile


class Exchange(Protocol):
    """Rows that go to the ranks of their experts, and back. All ranks make each call together."""

    def send(
        self, rows: Sequence[torch.Tensor], slot_counts: torch.Tensor, rows_there: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Rows [S, ...] sorted by slot, in as many tensors as hold them, and how many go to each slot of all ranks,
        int64 [num_slots], to what came, [rows_there, ...] sorted by slot, and how many for each slot held here.

        More rows than came mean nothing; `rows_there` is at least as many as can come.
        """

    def send_back(self, x: torch.Tensor, own_rows: int) -> torch.Tensor:
        """What was made of the rows that came, [rows_there, N], to what was made of this rank's own, [own_rows, N]."""


class Peers(Protocol):
    """What ranks do over memory that all of them write to. All ranks make each call together."""

    tokens: int
    """Tokens of a rank for which exchanges have room."""
    most_tokens: int | None
    """See `Layout.begin_pass`."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether a tensor has a size that can be summed and gathered so."""

    def tree_sum(self, x: torch.Tensor) -> torch.Tensor:
        """`tree_sum` of every rank's x, fp32 and contiguous, in the order of ranks."""

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's contiguous x in the order of ranks."""

    def exchange(self, slots: int, sent: tuple[int, ...], returned: int, own_rows: int) -> Exchange:
        """For experts in `slots` slots of all ranks: bytes of a row in each tensor on its way there, and on its way
        back, multiples of 16, and how many rows a rank sends at most.
        """


@dataclass(frozen=True)
class Group:
    """Ranks that share something, and this process's place among them."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = field(default=None, compare=False)
    """None for one rank, and where only the sizes are asked for."""
    peers: Peers | None = field(default=None, compare=False)
    """Where the ranks write into each other's memory."""

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, of one shape and dtype on all, in the order of ranks."""
        if self.size == 1:
            return [x]
        if self.peers is not None and self.peers.takes(x):
            return self.peers.gather(x.contiguous())
        sent = self._reachable(x)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.process_group)
        return [part.to(x.device) for part in parts]

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, N] of every rank to [T, N size]."""
        return x if self.size == 1 else torch.cat(self.gather(x), dim=1)

    def gather_cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensor of which every rank holds a part x of any dtype, cut along `dim`."""
        parts = self.gather(x.contiguous().view(torch.uint8))  # gloo knows no fp8
        return torch.cat(parts, dim).view(x.dtype)

    def exchange(self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Send the first `sent[0]` rows of x [sum(sent), ...] to rank 0, the next `sent[1]` to rank 1, and so on;
        returns what came, `received[i]` rows from rank i, in the order of ranks.
        """
        rows = self._reachable(x)
        out = rows.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, rows, list(received), list(sent), group=self.process_group)
        return out.to(x.device)

    def _reachable(self, x: torch.Tensor) -> torch.Tensor:
        """x, contiguous, where the group's backend can read it: gloo reads no GPU, for which x is copied to pinned
        memory of the host. That is slow, and meant for tests: NCCL refuses several ranks on one card, gloo does not.
        """
        if x.is_cuda and dist.get_backend(self.process_group) == dist.Backend.GLOO:
            return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x)
        return x.contiguous()

    def share_of(self, count: int) -> slice:
        """This rank's part of `count` rows, of which each rank has as many but the last ones."""
        most = -(-count // self.size)
        return slice(min(self.rank * most, count), min((self.rank + 1) * most, count))

    def gather_shares(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Every rank's share of `count` rows, x [share, N], to [count, N]."""
        if self.size == 1:
            return x
        most = -(-count // self.size)
        padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
        return torch.cat(self.gather(padded))[:count]


ALONE = Group()


@dataclass(frozen=True)
class GroupSlices(Slices):
    """The slices of one tensor-parallel rank."""

    group: Group

    def fold(self, branch: torch.Tensor) -> torch.Tensor:
        """See `Slices.fold`: every rank adds all ranks' sums, each in the tree's order."""
        rows, peers = len(branch), self.group.peers
        if peers is not None and peers.takes(branch):
            return peers.tree_sum(branch.contiguous())
        if rows < self.group.size:
            return tree_sum(self.group.gather(branch))
        # Each rank adds a share of the rows: of what all send, a part has to travel.
        shares = [Group(rank, self.group.size).share_of(rows) for rank in range(self.group.size)]
        sent = [share.stop - share.start for share in shares]
        own = sent[self.group.rank]
        came = self.group.exchange(branch, sent, [own] * self.group.size)
        return self.group.gather_shares(tree_sum(came.split(own)) if own else branch[:0], rows)


@dataclass(frozen=True)
class Placement:
    """Which expert lies in which *slot* of the ranks that share them, an equal number of slots each.

    An expert may lie in several slots, its replicas (redundant experts: DeepSeek-V3 report, section 3.4): all are equal
    bytes, so that it changes no bit which of them a token is sent to.
    """

    experts: tuple[int, ...]
    """Of each slot of all ranks. EPLB's `physical_to_logical_map`."""

    @staticmethod
    @lru_cache(maxsize=8)
    def linear(num_experts: int, num_replicas: int = 0) -> Placement:
        """All experts in order, then replicas of the first ones: where engines begin."""
        return Placement((*range(num_experts), *(i % num_experts for i in range(num_replicas))))

    def of_rank(self, ranks: Group) -> tuple[int, ...]:
        """The experts in this rank's slots."""
        count = len(self.experts) // ranks.size
        return self.experts[ranks.rank * count : (ranks.rank + 1) * count]

    def maps(self, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """EPLB's `logical_to_physical_map`, int64 [num_experts, most replicas], -1 behind an expert's last slot, and
        `logical_replica_count`, int64 [num_experts].
        """
        slots: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(self.experts):
            slots[expert].append(slot)
        most = max(map(len, slots))
        padded = [own + [-1] * (most - len(own)) for own in slots]
        return torch.tensor(padded), torch.tensor([len(own) for own in slots])

    def require_possible(self, num_experts: int, ranks: Group) -> None:
        """Raise `ConfigError` unless each rank has as many slots and each expert has one."""
        if len(self.experts) % ranks.size:
            raise ConfigError(
                f"{len(self.experts)} experts, replicas included (n_routed_experts={num_experts}), have no"
                f" {ranks.size} equal parts for as many ranks"
            )
        if set(self.experts) != set(range(num_experts)):
            raise ConfigError(f"a placement of experts has {sorted(set(self.experts))}, not each of {num_experts}")


@dataclass(frozen=True)
class Layout:
    """The part of a model that this process holds."""

    tensor: Group = ALONE
    """Shares heads, vocabulary and dense features, and has the same tokens on each rank."""
    experts: Group = ALONE
    """Shares routed experts: all ranks of `tensor`, and of those with other tokens (data parallelism)."""
    layers: range | None = None
    """The decoder layers of this pipeline stage; None: all."""
    placements: Mapping[int, Placement] = field(default_factory=dict, hash=False)
    """Of a decoder layer, which expert lies where; of one that is not named, `Placement.linear` without replicas."""

    def needs_no_host(self) -> bool:
        """Whether nothing that ranks exchange waits for the host, so that CUDA graphs hold a pass."""
        return all(group.size == 1 or group.peers is not None for group in (self.tensor, self.experts))

    def begin_pass(self, most_tokens: int | None) -> None:
        """An adapter says, before a pass and alike on all ranks of `experts`, how many tokens the rank has that has the
        most; None if its host does not know. Ranks that all have the same tokens need not be told.
        """
        if (peers := self.experts.peers) is not None:
            peers.most_tokens = most_tokens

    def layers_of(self, config: DeepseekV3Config) -> range:
        """The decoder layers that are held here."""
        return range(config.num_hidden_layers) if self.layers is None else self.layers

    def is_first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.layers is None or self.layers.start == 0

    def is_last(self, config: DeepseekV3Config) -> bool:
        """Whether this stage has the last norm and the head."""
        return self.layers_of(config).stop == config.num_hidden_layers

    def own_heads(self, config: DeepseekV3Config) -> DeepseekV3Config:
        """`config` for attention with this rank's heads."""
        if self.tensor.size == 1:
            return config
        return config.model_copy(update={"num_attention_heads": config.num_attention_heads // self.tensor.size})

    def placement(self, config: DeepseekV3Config, layer_idx: int) -> Placement:
        """Which expert lies where, in a layer."""
        return self.placements.get(layer_idx) or Placement.linear(config.n_routed_experts)

    def own_experts(self, config: DeepseekV3Config, layer_idx: int) -> tuple[int, ...]:
        """The routed experts that are held here, slot by slot."""
        return self.placement(config, layer_idx).of_rank(self.experts)

    def slices(self, profile: Profile) -> Slices:
        """The slices of a profile's sums that are held here."""
        held = profile.reduction_slices // self.tensor.size
        return Slices(held) if self.tensor.size == 1 else GroupSlices(held, self.tensor)

    def require_possible(self, config: DeepseekV3Config, profile: Profile) -> None:
        """Raise `ConfigError` where a model cannot be shared so."""
        ranks = self.tensor.size
        if profile.reduction_slices % ranks:
            raise ConfigError(
                f"{ranks} tensor-parallel ranks share the slices of each sum, of which there are"
                f" {profile.reduction_slices}: set {SLICES_VARIABLE} to a power of two that {ranks} divides,"
                " the same in every program whose bits shall be equal"
            )
        for layer_idx in range(config.first_k_dense_replace, config.num_hidden_layers):
            placement = self.placement(config, layer_idx)
            placement.require_possible(config.n_routed_experts, self.experts)


WHOLE = Layout()
"""One rank holds the model."""
