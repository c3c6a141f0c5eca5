"""What is run before requests come: every kind of layer and the head, and nothing that a model holds changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ranks import group, on_ranks
from torch import nn

from dsv3_plugin.checkpoint.loader import load_model, load_mtp
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers import warm_up as warm_ups
from dsv3_plugin.layers.embedding import Head
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.model import DeepseekV3, DeepseekV3Model, bind_ops, expert_parallel_layers
from dsv3_plugin.layers.moe import Router
from dsv3_plugin.layers.warm_up import one_of_each_kind, token_counts, warm_up
from dsv3_plugin.layout import WHOLE, Group, Layout
from dsv3_plugin.profile import ATTENTION_VARIABLE
from dsv3_plugin.registry import AnyOperation

CPU = torch.device("cpu")


def test_token_counts():
    assert token_counts(1) == [1]
    assert token_counts(20) == list(range(1, 21))
    counts = token_counts(5000)
    assert counts[:255] == list(range(1, 256)) and counts[-1] == 5000
    assert {511, 512, 513, 4095, 4096, 4097} < set(counts)
    assert max(b - a for a, b in pairwise(counts)) <= 128


@pytest.mark.parametrize("part", ["main", "mtp"])
def test_every_kind_of_layer_runs(tiny_checkpoint: Callable[[str], Path], part: str) -> None:
    reader = CheckpointReader(tiny_checkpoint("bf16"))
    ops = bind_ops(reader.config, reader.profile(), CPU)
    model = load_model(reader, ops) if part == "main" else load_mtp(reader, ops)
    network = model.model if isinstance(model, DeepseekV3) else model
    kinds = len(one_of_each_kind(network)) if isinstance(network, DeepseekV3Model) else 1
    assert kinds == (1 if part == "mtp" else 2 + (reader.config.first_k_dense_replace > 1))
    met: dict[type, list[int]] = {MLA: [], Router: [], Head: []}

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        met[type(module)].append(len(args[0]))

    for module in model.modules():
        if type(module) in met:
            module.register_forward_pre_hook(count)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert warm_up(network, model.lm_head, WHOLE, block_size=16, most_tokens=9, most_logits=4) > 0
    each = list(range(1, 10))
    assert met[MLA] == [n for n in each for _ in range(kinds)]
    assert met[Router] == each
    assert met[Head] == [1, 2, 3, 4]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_prompts_and_generated_tokens_take_their_forms(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the `two_form` profile, both alone and side by side; another profile has one form."""
    reader = CheckpointReader(tiny_checkpoint("bf16"))

    def calls() -> dict[str, int]:
        ops = bind_ops(reader.config, reader.profile(), CPU)
        model, met = load_model(reader, ops).model, Counter[str]()

        def count(op: AnyOperation, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            met[op.name] += 1
            return run(*args, **kwargs)

        ops.tap(count)
        warm_up(model, None, WHOLE, block_size=16, most_tokens=3, most_logits=1)
        return {name: met[name] for name in ("absorb", "mla_attention", "head_attention")}

    layers = 3 * 2
    assert calls() == {"absorb": layers, "mla_attention": layers, "head_attention": 0}
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")
    assert calls() == {"absorb": layers, "mla_attention": 2 * layers, "head_attention": layers}


def test_ranks_warm_up_together_and_count_no_load(tiny_checkpoint: Callable[[str], Path]) -> None:
    reader = CheckpointReader(tiny_checkpoint("fp8"))

    def of_rank(rank: int) -> int:
        layout = Layout(experts=group([0, 1]))
        model = load_model(reader, bind_ops(reader.config, reader.profile(), CPU, layout=layout), layout)
        layers = expert_parallel_layers(model.model).values()
        for layer in layers:
            layer.expert_load = torch.zeros(layer.num_slots, dtype=torch.int64)
        warm_up(model.model, model.lm_head, layout, block_size=1, most_tokens=3, most_logits=3)
        return sum(int(layer.expert_load.sum()) for layer in layers if layer.expert_load is not None)

    assert on_ranks(2, of_rank) == [0, 0]


@pytest.mark.parametrize("equal_rows", [False, True])
def test_tokens_choose_different_experts(
    tiny_checkpoint: Callable[[str], Path], equal_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that ranks get numbers of rows that fill no vector, as requests send them. The twin: equal rows."""
    reader = CheckpointReader(tiny_checkpoint("bf16"))
    model = load_model(reader, bind_ops(reader.config, reader.profile(), CPU)).model
    monkeypatch.setattr(warm_ups, "token_counts", lambda most: [most])
    if equal_rows:
        monkeypatch.setattr(warm_ups, "_different_rows", lambda tokens, like: like.new_ones(tokens, len(like)))
    chosen: set[int] = set()
    for router in filter(lambda each: isinstance(each, Router), model.modules()):
        router.register_forward_hook(lambda module, args, found: chosen.update(found[0].flatten().tolist()))
    warm_up(model, None, WHOLE, block_size=16, most_tokens=16, most_logits=1)
    assert (len(chosen) == reader.config.num_experts_per_tok) == equal_rows


@dataclass
class Peers:
    """Memory of other ranks, which takes nothing: it is told what each pass has."""

    told: list[int | None] = field(default_factory=list)

    def __setattr__(self, name: str, value: int | None) -> None:
        if name == "most_tokens":
            self.told.append(value)
        else:
            super().__setattr__(name, value)


def test_experts_on_other_ranks_are_told_of_each_pass(tiny_checkpoint: Callable[[str], Path]) -> None:
    """They have room for the tokens of the pass before, which an engine may have made to measure its graphs."""
    reader = CheckpointReader(tiny_checkpoint("bf16"))
    model = load_model(reader, bind_ops(reader.config, reader.profile(), CPU))
    peers = Peers()
    layout = Layout(experts=Group(0, 2, peers=cast(Any, peers)))
    layout.begin_pass(1)
    warm_up(model.model, None, layout, block_size=16, most_tokens=4, most_logits=1)
    assert peers.told == [1, 1, 2, 3, 4]
