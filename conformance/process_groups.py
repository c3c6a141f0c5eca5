"""A rank of the core without an engine: its device, and its place in the process groups of a layout."""

from __future__ import annotations

import atexit
from collections.abc import Sequence

import torch
from torch import distributed as dist

from dsv3_plugin.conformance.layouts import RankOf
from dsv3_plugin.layout import Group, Layout
from dsv3_plugin.peers import announcement, connected

_TOKENS = 1024
"""Of a rank's pass, for which experts' rows have room in peers' memory."""


def join(place: RankOf, device: str) -> tuple[torch.device, Layout]:
    """Meet the other ranks of a layout without stages, until this process ends. With fewer cards than ranks, ranks
    share the cards.
    """
    layout = place.layout
    cards = torch.cuda.device_count() if device == "cuda" else 0
    own = torch.device("cuda", place.rank % cards) if cards else torch.device("cpu")
    if cards:
        torch.cuda.set_device(own)
    store = dist.TCPStore("127.0.0.1", place.ports[0], layout.ranks, place.rank == 0)  # type: ignore[attr-defined]
    # NCCL refuses two ranks on one card.
    backend = "nccl" if cards >= layout.ranks else "gloo"
    if 0 < cards < layout.ranks and place.rank == 0:
        print(f"{layout}: {layout.ranks} ranks share {cards} cards, with gloo between them through the host's memory")
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=layout.ranks)
    atexit.register(dist.destroy_process_group)  # threads of gloo's that are left then may abort the interpreter
    first = place.dp_rank * layout.tp
    tensor = [[dp * layout.tp + tp for tp in range(layout.tp)] for dp in range(layout.dp)]
    groups = Layout(_group(place.tp_rank, tensor, first), _group(place.rank, [list(range(layout.ranks))], 0))
    held, reason = connected(groups, own, _TOKENS)
    if cards and place.rank == 0:
        print(announcement(reason))
    return own, held


def _group(rank: int, groups: Sequence[Sequence[int]], own: int) -> Group:
    """The group that begins at rank `own`; every rank makes every group."""
    made = {members[0]: dist.new_group(list(members)) for members in groups}
    return Group(rank, len(groups[0]), made[own] if len(groups[0]) > 1 else None)
