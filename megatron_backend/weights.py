"""Hugging Face checkpoints in and out of a Megatron model.

Both ways work from the core's one table of tensors. A rank reads and writes what it holds: its pipeline stage's layers
and its experts. FP8 weights are read as the numbers that they stand for, into bf16 master weights, and quantized again
when they are written; with power-of-two scales neither step changes a number.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import distributed as dist
from torch import nn

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_tensors
from dsv3_plugin.checkpoint.masters import as_written, dequantize_weights
from dsv3_plugin.checkpoint.names import Part, Target, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import SINGLE_FILE, CheckpointReader, value_problem
from dsv3_plugin.checkpoint.writer import copy_side_files, write_file, write_index
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.megatron_backend.moe import LocalExperts
from dsv3_plugin.megatron_backend.names import module_name

Chunks = nn.Module | Sequence[nn.Module]
"""This rank's part of a model: one module, or the list of its virtual pipeline stages."""


def local_tensors(model: Chunks, config: DeepseekV3Config) -> dict[str, torch.Tensor]:
    """Views of this rank's parameters and router biases, by the checkpoint's names; FP8 weights as master weights."""
    places: dict[str, torch.Tensor] = {}
    for chunk in [model] if isinstance(model, nn.Module) else model:
        places |= _tensors_of_chunk(chunk, config)
    return places


def _tensors_of_chunk(model: nn.Module, config: DeepseekV3Config) -> dict[str, torch.Tensor]:
    while not hasattr(model, "decoder"):  # DDP and Float16Module
        if isinstance(model, DistributedDataParallel) and model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)  # other ranks' steps may still be on their way
        model = model.module  # type: ignore[assignment]
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    first_expert = next((m.first_expert for m in model.modules() if isinstance(m, LocalExperts)), 0)

    def place(part: Part, target: Target) -> torch.Tensor | None:
        tensor = state.get(module_name(target.parameter, first_layer))
        if tensor is None:
            return None
        index = target.index
        if ".experts." in target.parameter:
            expert = index[0] - first_expert  # type: ignore[operator]
            if not 0 <= expert < len(tensor):
                return None
            index = expert, *index[1:]
        elif index and getattr(tensor, "tensor_model_parallel", False):
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            (rows,) = index
            index = (slice(rows.start // ranks, rows.stop // ranks),)  # type: ignore[union-attr]
        return tensor.data[index]

    places = {}
    for name, spec in checkpoint_tensors(config.model_copy(update={"quantization_config": None})).items():
        found = [view for part, target in spec.targets.items() if (view := place(part, target)) is not None]
        if found:
            places[name] = found[0]
    return places


@torch.no_grad()
def load_checkpoint(model: Chunks, path: str | Path) -> None:
    """Read a Hugging Face checkpoint into this rank's part of a model.

    Raises `CheckpointError` for whatever is wrong with the files (`CheckpointReader.validate`).
    """
    reader = CheckpointReader(path)
    reader.validate()
    places = local_tensors(model, reader.config)
    for name, tensor in dequantize_weights(reader, places.__contains__):
        places[name].copy_(_own_part(tensor, places[name].shape))


def _own_part(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """This tensor-parallel rank's part, of `shape`, of a whole tensor."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for dim, size in enumerate(shape):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, rank * size, size)
    return tensor


def whole(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of `shape` whose parts the tensor-parallel ranks hold, on its device."""
    for dim, size in enumerate(shape):
        if size != tensor.shape[dim]:
            parts = [torch.empty_like(tensor) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
            dist.all_gather(parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            return torch.cat(parts, dim)
    return tensor


def _checkpoint_tensors(
    model: Chunks, config: DeepseekV3Config, *, copies: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank writes: of several ranks that hold the same tensor, the first; with `copies`, the embedding of the
    MTP layer's stage too.
    """
    writes = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    writes_experts = parallel_state.get_expert_data_parallel_rank() == 0
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    specs = checkpoint_tensors(config)
    for name, tensor in local_tensors(model, config).items():
        is_expert = ".mlp.experts." in name
        if not (writes_experts if is_expert else writes):
            continue
        if name == "model.embed_tokens.weight" and not copies and not parallel_state.is_pipeline_first_stage():
            continue
        # Every tensor-parallel rank sends its part.
        gathered = whole(tensor, specs[name].shape)
        if is_expert or is_first:
            yield from as_written(name, gathered, config)


@torch.no_grad()
def fingerprint(model: Chunks, config: DeepseekV3Config) -> Fingerprint:
    """Of the weights that all ranks hold, as `save_checkpoint` would write them. Every rank makes this call.

    It is equal to the servers' exactly where they hold these weights (`dsv3_plugin.checkpoint.fingerprint`).

    Args:
        model: this rank's part of the model.
        config: the configuration of the checkpoint that the weights are for: in FP8 they are quantized on the way.

    Raises `CheckpointError` where the MTP layer's stage has another embedding than the first stage.
    """
    tensors: dict[str, str] = {}
    for name, tensor in _checkpoint_tensors(model, config, copies=True):
        tensors |= fingerprint_of_tensors({name: tensor}).tensors
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensors)
    found: dict[str, str] = {}
    for name, digest in (item for part in parts for item in part.items()):
        if found.setdefault(name, digest) != digest:
            raise CheckpointError(f"{name}: two pipeline stages hold copies that differ")
    return Fingerprint(tensors=found)


def save_checkpoint(model: Chunks, like: str | Path, path: str | Path) -> None:
    """Write a Hugging Face checkpoint: every rank its tensors, the first one the index and what else `like` holds.

    Args:
        model: this rank's part of the model.
        like: a checkpoint folder; its configuration and tokenizer are copied.
        path: a new folder.

    Raises `CheckpointError` if the folder exists, and as `save_tensors` does; then nothing is left of it.
    """
    like, path = Path(like), Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already and is not overwritten")
    dist.barrier()
    path.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        copy_side_files(like, path)
    try:
        save_tensors(model, CheckpointReader(like).config, path)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(path)
        raise


def save_tensors(model: Chunks, config: DeepseekV3Config, path: Path) -> None:
    """Write the tensors of a checkpoint into a folder that holds its `config.json`: every rank its own, the first one
    the index.

    Every rank raises `CheckpointError` if any holds NaN or an infinity, before anything is written, or if the result,
    which is validated before this returns, is no checkpoint.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in _checkpoint_tensors(model, config)}
    file = SINGLE_FILE if world == 1 else f"model-{rank + 1:05d}-of-{world:05d}.safetensors"
    problems = filter(None, (value_problem(name, tensor, config) for name, tensor in tensors.items()))
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, (dict.fromkeys(tensors, file), next(problems, None)))
    if wrong := [problem for _, problem in parts if problem is not None]:
        raise CheckpointError(f"{path}: is not written: {wrong[0]}")
    if tensors:
        write_file(tensors, path / file)
    dist.barrier()
    found: list[str | None] = [None]
    if rank == 0:
        if world > 1:
            weight_map = {name: file for files, _ in parts for name, file in files.items()}
            write_index(path, weight_map, sum(file.stat().st_size for file in path.glob("*.safetensors")))
        try:
            CheckpointReader(path).validate()
        except CheckpointError as error:
            found = [str(error)]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        raise CheckpointError(found[0])
