"""A model that ranks share has the bits of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from mini_checkpoint import CPU, MINI
from ranks import group, on_ranks

from dsv3_plugin.checkpoint.fingerprint import fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import CheckpointError, ConfigError
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layers.moe import Router
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.layout import ALONE, WHOLE, Group, GroupSlices, Layout, Placement
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.registry import Ops

# Everything that is shared is a whole number of FP8 blocks for two ranks, or of numbers for four.
SHARED = MINI | {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "intermediate_size": 512,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
}
TOKENS = torch.arange(37) * 7 % 320


@dataclass(frozen=True)
class Computed:
    """Of one sequence; None where another stage has it."""

    hidden: torch.Tensor
    logits: torch.Tensor | None
    draft: torch.Tensor | None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("shared")

    def get(dtype: str) -> Path:
        if not (root / dtype).exists():
            make_checkpoint(SHARED, root / dtype, 1, dtype=CheckpointDtype(dtype))
        return root / dtype

    return get


def ops_of(reader: CheckpointReader, slices: int, layout: Layout) -> Ops:
    profile = replace(reader.profile(), reduction_slices=slices)
    return bind_ops(reader.config, profile, CPU, layout=layout)


def compute(
    path: Path, slices: int, layout: Layout, tokens: torch.Tensor, hidden: torch.Tensor | None = None
) -> Computed:
    """One pass over a sequence; `hidden` is what the stage before returned."""
    reader = CheckpointReader(path)
    ops, config = ops_of(reader, slices, layout), reader.config
    model, draft = DeepseekV3(ops, config, layout), DeepseekV3MTP(ops, config, layout)
    for module, part in (model, "main"), (draft, "mtp"):
        loader = WeightLoader(module, config, part, layout=layout)
        loader.load(reader.tensors())
        loader.finish()
    positions, attend = torch.arange(len(tokens)), WholeSequences(ops, config)
    with torch.inference_mode():
        embedded = model.model.embed_tokens(tokens) if hidden is None else hidden
        hidden = model.model(embedded, positions, attend)
        if not layout.is_last(config):
            return Computed(hidden, None, None)
        drafted = draft.lm_head(draft(tokens.roll(-1), positions, hidden, attend))
        return Computed(hidden, model.lm_head(hidden), drafted)


def same(left: Computed, right: Computed) -> bool:
    assert left.logits is not None and left.draft is not None and right.logits is not None and right.draft is not None
    return same_bits(left.logits, right.logits) and same_bits(left.draft, right.draft)


def test_what_travels_for_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows each rank adds a share and sends it on; few go to all at once, which is one exchange instead of two.
    One rank moves nothing.
    """
    moved: list[tuple[str, object]] = []

    def gather(group: Group, x: torch.Tensor) -> list[torch.Tensor]:
        moved.append(("all have", len(x)))
        return [x] * group.size

    def exchange(group: Group, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        moved.append(("each gets", sent))
        return x.new_zeros(sum(received), x.shape[1])

    x = torch.ones(6, 2)
    assert ALONE.gather_shares(x, 6) is x
    monkeypatch.setattr(Group, "gather", gather)
    monkeypatch.setattr(Group, "exchange", exchange)
    slices = GroupSlices(1, Group(0, 4))
    slices.fold(x)
    assert moved == [("each gets", [2, 2, 2, 0]), ("all have", 2)]
    moved.clear()
    slices.fold(x[:3])
    assert moved == [("all have", 3)]
    moved.clear()
    GroupSlices(1, Group(3, 4)).fold(x)
    assert moved == [("each gets", [2, 2, 2, 0]), ("all have", 2)], "a rank without a share, too"


def test_a_graph_holds_a_pass_whose_ranks_need_no_host() -> None:
    """One rank, or peers' memory, in both groups."""
    memory: Any = object()
    alone, by_process_group, by_memory = ALONE, Group(0, 2), Group(0, 2, peers=memory)
    assert WHOLE.needs_no_host() and Layout(by_memory, by_memory).needs_no_host()
    assert Layout(alone, by_memory).needs_no_host()
    for left, right in (alone, by_process_group), (by_memory, by_process_group), (by_process_group, by_memory):
        assert not Layout(left, right).needs_no_host()


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]], ids=len)
@pytest.mark.parametrize(
    ("dtype", "slices", "ranks"), [("bf16", 2, 2), ("bf16", 4, 4), ("bf16", 4, 2), ("fp8", 2, 2), ("fp32", 4, 2)]
)
def test_tensor_parallel_ranks_have_the_bits_of_one(
    dtype: str, slices: int, ranks: int, tokens: torch.Tensor, checkpoints: Callable[[str], Path]
) -> None:
    """One token has fewer shares than ranks."""
    path = checkpoints(dtype)
    alone = compute(path, slices, WHOLE, tokens)

    def work(rank: int) -> Computed:
        everyone = group(range(ranks))
        return compute(path, slices, Layout(everyone, everyone), tokens)

    for shared in on_ranks(ranks, work):
        assert same(shared, alone)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp32"])
@pytest.mark.parametrize("counts", [(37, 5), (1, 1), (3, 37, 1, 2)], ids=str)
def test_spread_experts_have_the_bits_of_one_rank(
    dtype: str, counts: tuple[int, ...], checkpoints: Callable[[str], Path]
) -> None:
    """Each rank has tokens of its own."""
    path = checkpoints(dtype)

    def work(rank: int) -> Computed:
        return compute(path, 1, Layout(experts=group(range(len(counts)))), TOKENS[: counts[rank]] + rank)

    for rank, shared in enumerate(on_ranks(len(counts), work)):
        assert same(shared, compute(path, 1, WHOLE, TOKENS[: counts[rank]] + rank))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_all_tokens_may_choose_one_rank_s_experts(
    dtype: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank's get no row."""
    path = checkpoints(dtype)
    forward = Router.forward

    def choose_the_first(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.e_score_correction_bias[:4] = 10.0
        return forward(self, x)

    monkeypatch.setattr(Router, "forward", choose_the_first)

    def work(rank: int) -> Computed:
        return compute(path, 1, Layout(experts=group(range(2))), TOKENS + rank)

    for rank, shared in enumerate(on_ranks(2, work)):
        assert same(shared, compute(path, 1, WHOLE, TOKENS + rank))


REPLICAS = Placement((0, 1, 2, 3, 4, 5, 6, 7, 3, 3, 0, 6))
MOVED = Placement((6, 3, 3, 0, 7, 1, 2, 4, 3, 5, 6, 0))


def place_all(placement: Placement) -> dict[int, Placement]:
    return dict.fromkeys(range(SHARED["num_hidden_layers"] + 1), placement)


@pytest.mark.parametrize("placement", [REPLICAS, MOVED], ids=["replicas", "two replicas on one rank"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_redundant_experts_change_no_bit(dtype: str, placement: Placement, checkpoints: Callable[[str], Path]) -> None:
    path = checkpoints(dtype)

    def work(rank: int) -> Computed:
        return compute(path, 1, Layout(experts=group(range(4)), placements=place_all(placement)), TOKENS + rank)

    for rank, shared in enumerate(on_ranks(4, work)):
        assert same(shared, compute(path, 1, WHOLE, TOKENS + rank))


@pytest.mark.parametrize("forgets", ["nothing", "the weights", "the maps"])
def test_experts_that_move_change_no_bit(forgets: str, checkpoints: Callable[[str], Path]) -> None:
    """As an engine's rebalancer does it: in place, between two passes. An expert left behind is caught."""
    path = checkpoints("bf16")
    reader = CheckpointReader(path)
    config = reader.config

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = Layout(experts=group(range(2)), placements=place_all(REPLICAS))
        after = replace(before, placements=place_all(MOVED))
        model = DeepseekV3(ops_of(reader, 1, before), config, before)
        loader = WeightLoader(model, config, "main", layout=before)
        loader.load(reader.tensors())
        forward = partial(model, TOKENS, torch.arange(len(TOKENS)), WholeSequences(model.ops, config))
        with torch.inference_mode():
            first = forward()
            loader.follow(after)
            if forgets != "the weights":
                loader.load(reader.tensors())
            for module in model.modules():
                if isinstance(module, ExpertParallelMoE) and forgets != "the maps":
                    module.logical_to_physical_map, module.logical_replica_count = MOVED.maps(8)
            return first, forward()

    for first, second in on_ranks(2, work):
        assert same_bits(first, second) == (forgets == "nothing")


def test_a_placement_says_where_each_expert_lies() -> None:
    """The first layer of the example that DeepSeek published with EPLB: 12 experts and 4 replicas on 8 ranks."""
    placement = Placement((5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1))
    placement.require_possible(12, Group(0, 8))
    assert [placement.of_rank(Group(rank, 8)) for rank in (0, 1, 7)] == [(5, 6), (5, 7), (11, 1)]
    slots, counts = placement.maps(12)
    assert counts.tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert slots.tolist() == [
        [12, -1], [13, 15], [11, -1], [6, -1], [5, 7], [0, 2], [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1],
    ]  # fmt: skip
    for too_few_or_many in 11, 13:
        with pytest.raises(ConfigError, match=f"not each of {too_few_or_many}"):
            placement.require_possible(too_few_or_many, Group(0, 8))
    with pytest.raises(ConfigError, match=r"16 experts, replicas included .* no 3 equal parts"):
        placement.require_possible(12, Group(0, 3))


def test_both_at_once(checkpoints: Callable[[str], Path]) -> None:
    """Two times two tensor-parallel ranks, experts over all four."""
    path = checkpoints("fp8")

    def work(rank: int) -> Computed:
        pair = rank // 2
        layout = Layout(group((2 * pair, 2 * pair + 1)), group(range(4)))
        return compute(path, 2, layout, TOKENS[: 5 + 30 * pair] + pair)

    for rank, shared in enumerate(on_ranks(4, work)):
        pair = rank // 2
        assert same(shared, compute(path, 2, WHOLE, TOKENS[: 5 + 30 * pair] + pair))


def test_stages_have_the_bits_of_one(checkpoints: Callable[[str], Path]) -> None:
    """No sum is shared, so that one process may compute them one after the other."""
    path = checkpoints("bf16")
    first = compute(path, 1, Layout(layers=range(2)), TOKENS)
    last = compute(path, 1, Layout(layers=range(2, 3)), TOKENS, first.hidden)
    assert same(last, compute(path, 1, WHOLE, TOKENS))


def test_what_ranks_hold_is_the_checkpoint(checkpoints: Callable[[str], Path]) -> None:
    """Each tensor is somewhere, and the parts' fingerprint is the whole's."""
    path = checkpoints("fp8")
    reader = CheckpointReader(path)

    def work(rank: int) -> dict[str, str]:
        everyone = group(range(2))
        layout = Layout(everyone, everyone)
        model = DeepseekV3(ops_of(reader, 2, layout), reader.config, layout)
        WeightLoader(model, reader.config, "main", layout=layout).load(reader.tensors())
        return fingerprint(model, reader.config, "main", layout).tensors

    one, other = on_ranks(2, work)
    whole = fingerprint_of_checkpoint(reader).tensors
    held = one | other
    assert held == {name: whole[name] for name in held}
    assert {name for name in whole if not name.startswith("model.layers.3.")} == held.keys()
    assert len(one) < len(held)


class CountingReader(CheckpointReader):
    """Knows how many numbers it read."""

    numbers = 0

    def tensors(
        self, wanted: Callable[[str], bool] = lambda name: True, part: Callable[[str], Any] = lambda name: ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().tensors(wanted, part):
            self.numbers += tensor.numel()
            yield name, tensor


def test_a_rank_reads_what_it_holds(checkpoints: Callable[[str], Path]) -> None:
    path = checkpoints("fp8")
    everyone = Group(1, 2), Group(1, 2)
    for layout in (WHOLE, Layout(*everyone), Layout(layers=range(2)), Layout(*everyone, range(2, 3))):
        reader = CountingReader(path)
        read, loaded = (DeepseekV3(ops_of(reader, 2, layout), reader.config, layout) for _ in range(2))
        WeightLoader(read, reader.config, "main", layout=layout).read(reader)
        assert reader.numbers == sum(parameter.numel() for parameter in read.parameters())
        loader = WeightLoader(loaded, reader.config, "main", layout=layout)
        loader.load(reader.tensors())
        loader.require_whole()
        for left, right in zip(read.parameters(), loaded.parameters(), strict=True):
            assert same_bits(left, right)


def test_ranks_agree_on_what_has_come(checkpoints: Callable[[str], Path]) -> None:
    """Whoever holds none of what lacks, or of what is wrong, may not answer either: the others would wait for it."""
    reader = CheckpointReader(checkpoints("bf16"))
    layouts = [Layout(Group(rank, 2), Group(rank, 2)) for rank in range(2)]
    of_the_last = "model.layers.1.mlp.experts.7.up_proj.weight"
    tensors = [item for item in reader.tensors() if item[0] != of_the_last]
    lacking = dict(reader.tensors())[of_the_last]
    for layout in layouts:
        model = DeepseekV3(ops_of(reader, 2, layout), reader.config, layout)
        loader = WeightLoader(model, reader.config, "main", layout=layout)
        loader.load(tensors)
        assert of_the_last in (loader.problem or "")
        with pytest.raises(CheckpointError, match=f"NaN or infinity in 1 tensors: {of_the_last}"):
            loader.load([(of_the_last, lacking * float("nan"))])
        assert loader.problem is not None
        loader.load([*tensors, (of_the_last, lacking)])
        assert loader.problem is None


def test_ranks_that_are_added_in_their_order_are_caught(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints("fp32")
    alone = compute(path, 4, WHOLE, TOKENS)
    monkeypatch.setattr(GroupSlices, "fold", lambda self, branch: sum(self.group.gather(branch)))

    def work(rank: int) -> Computed:
        everyone = group(range(4))
        return compute(path, 4, Layout(everyone, everyone), TOKENS)

    assert not same(on_ranks(4, work)[0], alone)


def test_experts_that_are_combined_as_they_arrive_are_caught(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a rank's own first, say."""
    path = checkpoints("fp32")
    alone = compute(path, 1, WHOLE, TOKENS)

    def backwards(out: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return combine(out, slots.flip(1), weights.flip(1), shared)

    right = ops_of

    def ops_with_another_order(reader: CheckpointReader, slices: int, layout: Layout) -> Ops:
        return right(reader, slices, layout).with_kernel(combine, backwards)

    monkeypatch.setitem(compute.__globals__, "ops_of", ops_with_another_order)

    def work(rank: int) -> Computed:
        return compute(path, 1, Layout(experts=group(range(2))), TOKENS)

    assert not same(on_ranks(2, work)[0], alone)


def test_a_part_that_no_rank_can_have_is_refused(checkpoints: Callable[[str], Path]) -> None:
    reader = CheckpointReader(checkpoints("bf16"))
    with pytest.raises(
        ConfigError, match=r"2 tensor-parallel ranks share the slices of each sum, of which there are 1"
    ):
        ops_of(reader, 1, Layout(Group(0, 2), Group(0, 2)))
    with pytest.raises(ConfigError, match=r"n_routed_experts=8\), have no 3 equal parts"):
        ops_of(reader, 1, Layout(experts=Group(0, 3)))
