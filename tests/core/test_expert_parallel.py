"""What a layer with experts on many ranks asks of memory that they share: how large rows are, and when it goes there.

Here one rank sends rows to itself. The kernels that move them between ranks run in `test_peers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from bits import normal, same_bits
from mini_checkpoint import CPU, MINI

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
from dsv3_plugin.layers.linear import Activation, quantize
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.layers.moe import MoE
from dsv3_plugin.layout import Group, Layout

TOKENS, HIDDEN, CHOSEN = 8, 640, 2
"""640 are five FP8 blocks: scales of 20 bytes, which travel in 32."""


@dataclass
class OneRank:
    """Peer memory of a rank that is alone. It refuses rows of other sizes than it was asked to have room for."""

    tokens: int = TOKENS
    most_tokens: int | None = None
    asked: list[object] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """That came, by call."""

    def exchange(self, slots: int, sent: tuple[int, ...], returned: int, own_rows: int) -> OneRank:
        self.asked = [slots, sent, returned, own_rows]
        self.sent, self.returned = sent, returned
        return self

    def takes(self, x: torch.Tensor) -> bool:
        return False

    def send(
        self, rows: Sequence[torch.Tensor], slot_counts: torch.Tensor, rows_there: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        came = [x.view(torch.uint8) for x in rows]
        assert [x.shape for x in came] == [(rows_there, width) for width in self.sent]
        self.rows.append(rows_there)
        return came, slot_counts

    def send_back(self, x: torch.Tensor, own_rows: int) -> torch.Tensor:
        assert x.view(torch.uint8).shape == (own_rows, self.returned)
        return x


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointReader]:
    config = MINI | {"hidden_size": HIDDEN, "num_nextn_predict_layers": 0}
    root = tmp_path_factory.mktemp("wide rows")
    return {dtype: make_checkpoint(config, root / dtype, 1, dtype=CheckpointDtype(dtype)) for dtype in CheckpointDtype}


def layers_of(reader: CheckpointReader, layout: Layout) -> tuple[MoE, ExpertParallelMoE]:
    """The layer of one rank, and one of the same weights whose experts are spread."""
    ops = bind_ops(reader.config, reader.profile(), CPU)
    moe = load_model(reader, ops).get_submodule("model.layers.1.mlp")
    assert type(moe) is MoE
    spread = ExpertParallelMoE(ops, reader.config, 1, layout)
    if layout.experts.size == 1:
        spread.load_state_dict(moe.state_dict())
    return moe, spread


@pytest.mark.parametrize(
    ("dtype", "sent", "returned"),
    [("bf16", (2 * HIDDEN,), 2 * HIDDEN), ("fp32", (4 * HIDDEN,), 4 * HIDDEN), ("fp8", (HIDDEN, 32), 2 * HIDDEN)],
)
def test_rows_have_the_sizes_that_were_asked_for(
    dtype: str, sent: tuple[int, ...], returned: int, loaded: dict[str, CheckpointReader]
) -> None:
    """And what comes back is the layer of one rank, bit for bit."""
    peers = OneRank()
    moe, spread = layers_of(loaded[dtype], Layout(experts=Group(peers=peers)))
    assert peers.asked == [MINI["n_routed_experts"], sent, returned, CHOSEN * TOKENS]
    for tokens in TOKENS, 3:
        x = normal(tokens, HIDDEN).to(spread.gate.weight.dtype)
        activation: Activation = quantize(moe.ops, x) if dtype == "fp8" else x
        assert same_bits(spread(x, activation), moe(x, activation))
    assert peers.rows == [CHOSEN * TOKENS, CHOSEN * 3]


@pytest.mark.parametrize(
    ("tensor", "experts", "most_tokens", "tokens", "rows"),
    [
        (1, 4, 5, 3, CHOSEN * 5),
        (1, 4, TOKENS, 3, CHOSEN * TOKENS),
        (1, 4, TOKENS + 1, 3, None),
        (1, 4, None, 3, None),
        (2, 2, None, 5, CHOSEN * 3),
        (2, 2, None, TOKENS + 1, None),
    ],
)
def test_it_goes_there_if_the_host_knows_that_there_is_room(
    tensor: int,
    experts: int,
    most_tokens: int | None,
    tokens: int,
    rows: int | None,
    loaded: dict[str, CheckpointReader],
) -> None:
    """Ranks that all have the same tokens route a share each. Without room it is the process group that moves rows."""
    layout = Layout(tensor=Group(0, tensor), experts=Group(0, experts, peers=OneRank()))
    layout.begin_pass(most_tokens)
    assert layers_of(loaded["bf16"], layout)[1]._most_rows(tokens) == rows
