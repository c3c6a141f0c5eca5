"""The whole model under its Hugging Face names, on every rank, one tensor at a time: what a server is sent.

Ranks hold parts of a model: a pipeline stage, some experts, a tensor-parallel cut. All of them walk over the
checkpoint's names together. Who holds a tensor hands it on, first to the ranks of its stage, then to the other stages.
Nothing but names, dtypes and tensors is sent, and no more than one tensor is held besides the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import distributed as dist

from dsv3_plugin.checkpoint.masters import as_written
from dsv3_plugin.checkpoint.names import TensorSpec, checkpoint_tensors
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.megatron_backend.compat import require_device
from dsv3_plugin.megatron_backend.weights import Chunks, local_tensors, whole

EXPERTS = ".mlp.experts."
"""In the name of every routed expert's tensor, and in no other."""


class Owner(NamedTuple):
    """Who holds a tensor, as ranks in this rank's groups of the pipeline and of the experts."""

    stage: int
    expert_rank: int
    dtype: torch.dtype


@torch.no_grad()
def hf_tensors(
    model: Chunks, config: DeepseekV3Config, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint that these weights are, in the order of its files, on every rank's device.

    The bits are those that `save_checkpoint` writes: the router's biases in fp32, fp8 weights quantized, each followed
    by its `weight_scale_inv`, the MTP layer where the model has one (its copies of embedding and head are left out).
    Every rank makes this call and takes every tensor: others wait for it. A tensor is a view of the model or new; it
    is right until the next optimizer step.

    Args:
        model: this rank's part of the model.
        config: the configuration of the checkpoint that the weights are for.
        wanted: says of a weight's name whether it is to come, all by default, and alike on every rank.
    """
    own = local_tensors(model, config)
    owners = _owners(own)
    for name, spec in checkpoint_tensors(config.model_copy(update={"quantization_config": None})).items():
        if name in owners and wanted(name):
            yield from as_written(name, _shared(own.get(name), spec, owners[name]), config)


def _owners(own: dict[str, torch.Tensor]) -> dict[str, Owner]:
    """Of every tensor of the model; of several owners the first."""
    in_stage: dict[str, tuple[int, torch.dtype]] = {}
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    for expert_rank, held in enumerate(_gather(dtypes, parallel_state.get_expert_model_parallel_group())):
        in_stage = {name: (expert_rank, dtype) for name, dtype in held.items()} | in_stage
    owners: dict[str, Owner] = {}
    for stage, held in enumerate(_gather(in_stage, parallel_state.get_pipeline_model_parallel_group())):
        owners = {name: Owner(stage, *found) for name, found in held.items()} | owners
    return owners


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _shared(own: torch.Tensor | None, spec: TensorSpec, owner: Owner) -> torch.Tensor:
    """A whole tensor, on every rank."""
    tensor = own
    if parallel_state.get_pipeline_model_parallel_rank() == owner.stage:
        if EXPERTS in spec.name:
            tensor = _sent(
                tensor, spec, owner.dtype, owner.expert_rank, parallel_state.get_expert_model_parallel_group()
            )
        else:
            assert tensor is not None
            tensor = whole(tensor, spec.shape)
    return _sent(tensor, spec, owner.dtype, owner.stage, parallel_state.get_pipeline_model_parallel_group())


def _sent(
    tensor: torch.Tensor | None, spec: TensorSpec, dtype: torch.dtype, source: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """What rank `source` of a group holds, on all of them."""
    if group.size() == 1:
        assert tensor is not None
        return tensor
    if group.rank() == source:
        assert tensor is not None
        tensor = tensor.contiguous()
    else:
        tensor = torch.empty(spec.shape, dtype=dtype, device=require_device())
    dist.broadcast(tensor, group_src=source, group=group)
    return tensor
