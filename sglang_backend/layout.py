"""Which part of the model an SGLang rank holds: the core's `Layout`, from SGLang's process groups.

SGLang's ranks form pipeline stages, each of which is one TP group. With `--enable-dp-attention` a TP group falls into
data-parallel parts, the attention TP groups: the ranks of one have the same tokens, and share heads, vocabulary and
dense features. Routed experts are spread over the whole TP group, whatever `--ep-size` says: none is ever cut.
"""

from __future__ import annotations

from typing import Any, TypeVar

from sglang.srt.distributed.parallel_state import get_attn_tp_group, get_pp_group, get_tp_group
from sglang.srt.distributed.utils import get_pp_indices

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layout import Group, Layout

T = TypeVar("T")


def layout_of(config: DeepseekV3Config) -> Layout:
    """The part of this process. A draft is built where SGLang says that there is one stage."""
    stages = get_pp_group()
    layers = None
    if stages.world_size > 1:
        layers = range(*get_pp_indices(config.num_hidden_layers, stages.rank_in_group, stages.world_size))
    return Layout(group_of(get_attn_tp_group()), group_of(get_tp_group()), layers)


def most_tokens(forward_batch: Any) -> int | None:
    """Of the data-parallel rank that has the most in this pass; None if SGLang did not ask them. A rank without any
    computes one (`attention.compute`).
    """
    of_ranks = forward_batch.global_num_tokens_cpu
    return None if of_ranks is None else max(1, *of_ranks)


def group_of(coordinator: Any) -> Group:
    """One of SGLang's `GroupCoordinator`s in the core's form."""
    return Group(coordinator.rank_in_group, coordinator.world_size, coordinator.device_group)


def of_all_ranks(answer: T) -> list[T]:
    """What each rank of this stage answers, in their order; all of them make this call."""
    ranks = get_tp_group()
    return ranks.all_gather_object(answer) if ranks.world_size > 1 else [answer]
