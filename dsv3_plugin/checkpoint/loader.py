"""Copying a checkpoint's tensors into our modules, in place.

The same function serves a first load, which must be complete, and a trainer's weight updates, which come in buckets.
Dtypes change only between bf16 and fp32: FP8 weights are copied as they are, and never made here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, Part, Target, TensorSpec, checkpoint_tensors, dtype_name
from dsv3_plugin.checkpoint.reader import IGNORED_SUFFIX, CheckpointReader, check_finite, some_names
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.model import DeepseekV3, weights_changed
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.ops.fp8 import E4M3
from dsv3_plugin.registry import Ops


@torch.no_grad()
def load_weights(
    model: nn.Module,
    config: DeepseekV3Config,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    part: Part,
    complete: bool = True,
) -> set[str]:
    """Copy tensors with Hugging Face's names into a model's parameters; returns the names that were used.

    Args:
        model: a `DeepseekV3` for the part `main`, a `DeepseekV3MTP` for `mtp`, or a module with their parameters.
        config: the checkpoint's configuration.
        named_tensors: (name, tensor) on any device, in any order; those of the other part are passed over.
        part: which part of the checkpoint `model` is.
        complete: whether every tensor of the part must come; False for one bucket of an update.

    Raises `CheckpointError` for an unknown name, a wrong shape or dtype, a bias that is not finite, or, if
    `complete`, for what is missing. The tensors before the offending one are written by then.
    """
    specs = checkpoint_tensors(config)
    parameters = dict(model.named_parameters())
    used: set[str] = set()
    for name, tensor in named_tensors:
        if name.endswith(IGNORED_SUFFIX):
            continue
        spec = specs.get(name)
        if spec is None:
            raise CheckpointError(f"tensor {name} is unknown to this configuration; it would have been dropped")
        if problem := spec.mismatch(tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(problem)
        if part in spec.targets:
            _copy(spec, tensor, parameters, spec.targets[part])
            used.add(name)
    weights_changed(model)
    if complete:
        missing = [n for n, spec in specs.items() if part in spec.targets and not spec.optional and n not in used]
        if missing:
            raise CheckpointError(f"missing tensors of the {part} model ({len(missing)}): {some_names(missing)}")
    return used


def load_model(reader: CheckpointReader, ops: Ops) -> DeepseekV3:
    """Validate a checkpoint and load its main model for `ops`, on the device that they were bound for."""
    reader.validate()
    with torch.device(ops.setting.device_type):
        model = DeepseekV3(ops, reader.config)
    load_weights(model, reader.config, reader.tensors(), part="main")
    return model


def load_mtp(reader: CheckpointReader, ops: Ops) -> DeepseekV3MTP:
    """Validate a checkpoint and load its MTP layer with embedding and head. Raises `CheckpointError` without one."""
    if not reader.config.num_nextn_predict_layers:
        raise CheckpointError(f"{reader.path}: has no MTP layer (num_nextn_predict_layers is 0)")
    reader.validate()
    with torch.device(ops.setting.device_type):
        model = DeepseekV3MTP(ops, reader.config)
    load_weights(model, reader.config, reader.tensors(), part="mtp")
    return model


def _copy(spec: TensorSpec, tensor: torch.Tensor, parameters: dict[str, nn.Parameter], target: Target) -> None:
    if target.parameter not in parameters:
        raise CheckpointError(
            f"tensor {spec.name} belongs to parameter {target.parameter}, which the model was built without;"
            " the model's profile or configuration is not the checkpoint's"
        )
    place = parameters[target.parameter][target.index]
    if place.shape != tensor.shape:
        raise CheckpointError(
            f"tensor {spec.name} has shape {list(tensor.shape)},"
            f" its place in parameter {target.parameter} has {list(place.shape)}"
        )
    if place.dtype != tensor.dtype and E4M3 in (place.dtype, tensor.dtype):
        raise CheckpointError(
            f"tensor {spec.name} is {dtype_name(tensor.dtype)}, parameter {target.parameter} is"
            f" {dtype_name(place.dtype)}; nothing is converted to or from fp8"
        )
    if spec.name.endswith(BIAS_SUFFIX):
        check_finite(f"tensor {spec.name}", tensor)
    place.copy_(tensor)
