"""Which part of the model a rank of vLLM holds: the core's `Layout`, from vLLM's process groups."""

from __future__ import annotations

from vllm.distributed.parallel_state import GroupCoordinator, get_ep_group, get_pp_group, get_tp_group
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import get_forward_context

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layout import Group, Layout


def layout_of_this_rank(config: DeepseekV3Config) -> Layout:
    """What this process holds of a model or of its draft, once vLLM has made its groups.

    vLLM's expert group is all data- and tensor-parallel ranks of a pipeline stage, with `--enable-expert-parallel` and
    without. So routed experts are spread over them in both cases.
    """
    stages = get_pp_group()
    layers = range(*get_pp_indices(config.num_hidden_layers, stages.rank_in_group, stages.world_size))
    return Layout(_group(get_tp_group()), _group(get_ep_group()), layers if stages.world_size > 1 else None)


def most_tokens() -> int | None:
    """Of the data-parallel rank that has the most in this pass; None if vLLM did not ask them."""
    metadata = get_forward_context().dp_metadata
    return None if metadata is None else int(metadata.num_tokens_across_dp_cpu.max())


def _group(ranks: GroupCoordinator) -> Group:
    """vLLM's own collectives are not used: some add, and those of its CPU side know no rows of unequal number."""
    return Group(ranks.rank_in_group, ranks.world_size, ranks.device_group)
