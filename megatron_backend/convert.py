"""Hugging Face checkpoints to Megatron's distributed checkpoints and back, without a model.

Each tensor of a Hugging Face checkpoint is one regular piece of a tensor in Megatron's: the whole, one expert, or the
upper or lower half of gate and up. `ShardedTensor` says which, and Megatron's own library cuts and joins; so both ways
are one table, and any tensor, expert or pipeline parallel layout can load the result.

What is exact: bf16 and fp32 come back with equal bytes, each tensor in the dtype that it had (but for fp32 tensors of
a bf16 model, which Megatron trains in bf16: a remark says so). FP8 weights are kept as the bf16 numbers that they stand
for, and quantized again on the way back. With power-of-two scales every number comes back; every byte does, too, if
each block's scale was the smallest that fits its largest value, as quantizers choose it. With fp32 scales neither
holds, and only `dequantize` takes them: to a bf16 model, each number rounded once.
"""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from textwrap import shorten
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_plugin.checkpoint.masters import as_written, dequantize_weights
from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, SCALE_SUFFIX, Target, TensorSpec, checkpoint_tensors, copied_from
from dsv3_plugin.checkpoint.reader import IGNORED_SUFFIX, CheckpointReader, Header, some_names
from dsv3_plugin.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    Progress,
    copy_side_files,
    in_bytes,
    new_folder,
    write_weights,
)
from dsv3_plugin.config import DeepseekV3Config, read_json_object
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.megatron_backend import compat
from dsv3_plugin.megatron_backend.config import megatron_arguments
from dsv3_plugin.megatron_backend.names import checkpoint_key, module_name
from dsv3_plugin.profile import profile_for

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's word for weights without an optimizer's state, in `TRACKER` and as the folder's name."""

_ODD = "hugging_face"
"""Key beside the weights in a release: what of the Hugging Face files a configuration does not tell, see `_odd`."""

_MODEL_KEYS = ("embedding.", "decoder.", "mtp.", "output_layer.")


def to_megatron(
    source: str | Path,
    destination: str | Path,
    *,
    dequantize: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Convert a Hugging Face checkpoint; returns remarks for the user.

    Args:
        source: a Hugging Face folder.
        destination: a new folder, for Megatron's `--load`: the weights in its folder `release`, and beside it the
            configuration and tokenizer. Its `args` are Megatron's, for `--use-checkpoint-args`.
        dequantize: write a bf16 model from an fp8 one.
        progress: called with the bytes read and to be read.

    Needs memory for the weights, in the dtype that Megatron trains. Raises `CheckpointError` for bad input, before
    anything is written, and `EngineError` without a GPU.
    """
    compat.require_device()  # Megatron's writer waits for one
    reader = CheckpointReader(source)
    headers = reader.validate()
    config = reader.config
    config.require_one_mtp_layer()
    if config.quantization_config and dequantize:
        config = config.model_copy(update={"quantization_config": None})
    if profile_for(config).scale_format == "float32":
        raise CheckpointError(
            f"{reader.path}: fp8 weights with fp32 scales (no scale_fmt ue8m0) do not survive quantizing again;"
            " --dequantize converts them to a bf16 model"
        )
    specs = _pieces(config)
    total = sum(_bytes(spec, config) for spec in specs.values())
    odd = _odd(headers, config)
    remarks = [
        f"{name} differs from {copied_from(name)} and is dropped: the MTP layer shares it"
        for name in reader.copies_that_differ()
    ]
    if buffers := [name for name in reader.headers() if name.endswith(IGNORED_SUFFIX)]:
        remarks.append(f"{len(buffers)} buffers {IGNORED_SUFFIX} are dropped: they follow from config.json")
    rounded = 0
    with new_folder(destination, total) as folder, _one_process():
        done = 0
        state: dict[str, Any] = {}
        for name, tensor in dequantize_weights(reader, specs.__contains__):
            data = tensor.to(_dtype(name, config))
            if config.quantization_config and not torch.equal(data.to(tensor.dtype), tensor):
                raise CheckpointError(f"{reader.path}: {name} has numbers beyond bf16's, which do not survive")
            rounded += tensor.dtype.itemsize > data.dtype.itemsize and not reader.config.quantization_config
            state[name] = _piece(specs[name], config, data)
            done += data.nbytes
            progress(done, total)
        arguments = Namespace(**megatron_arguments(config))
        (folder / RELEASE).mkdir()
        with _writable(destination):
            dist_checkpointing.save(
                {"model": state, "args": arguments, "checkpoint_version": 3.0, "iteration": 0, _ODD: odd},
                str(folder / RELEASE),
                content_metadata={"singleton_local_shards": False},
            )
        copy_side_files(reader.path, folder)
        if config != reader.config:
            settings = read_json_object(reader.path / "config.json")
            del settings["quantization_config"]
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (folder / TRACKER).write_text(RELEASE)
    if rounded:
        remarks.append(f"{rounded} tensors were float32 and are {config.torch_dtype} now, as every engine loads them")
    return remarks


def to_hugging_face(
    source: str | Path,
    destination: str | Path,
    *,
    like: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> CheckpointReader:
    """Convert a Megatron checkpoint, of this package's model or Megatron's own DeepSeek-V3.

    Args:
        source: a folder for Megatron's `--load`, of which the latest iteration is taken, or one iteration's folder.
        destination: a new folder.
        like: where config.json and tokenizer are, if not in `source`.
        max_shard_bytes: the largest file; memory is needed for one, and for the experts of one layer.
        progress: called with the bytes written and to be written.

    The MTP layer's copies of embedding and head are written, as in released checkpoints. Returns a reader of the
    result. Raises `CheckpointError` for bad input, before anything is written.
    """
    checkpoint, beside = find_checkpoint(source)
    side_files = Path(like) if like is not None else beside
    if not (side_files / "config.json").is_file():
        raise CheckpointError(
            f"{side_files}: has no config.json; name a Hugging Face folder of the same model with --like"
        )
    config = DeepseekV3Config.from_pretrained(side_files)
    config.require_one_mtp_layer()
    if profile_for(config).scale_format == "float32":
        raise CheckpointError(
            f"{side_files / 'config.json'}: asks for fp8 with fp32 scales, which are not written;"
            ' set scale_fmt to "ue8m0" in its quantization_config or remove it'
        )
    with _one_process():
        _check_arguments(checkpoint, config, side_files)
        odd = _stored_odd(checkpoint, config)
        specs = {
            name: spec
            for name, spec in checkpoint_tensors(config).items()
            if not name.endswith(SCALE_SUFFIX) and odd.get(name) != _ABSENT
        }
        reader = _Reader(checkpoint, config, specs, odd)
        sizes = {name: _written_bytes(spec, config, odd.get(name)) for name, spec in specs.items()}
        with new_folder(destination, sum(sizes.values())) as folder:
            write_weights(folder, sizes, reader.read, max_shard_bytes, progress)
            copy_side_files(side_files, folder)
            CheckpointReader(folder).validate()
    return CheckpointReader(destination)


def _pieces(config: DeepseekV3Config) -> dict[str, TensorSpec]:
    """The tensors that Megatron has a place for, not quantized: all but the MTP layer's copies."""
    specs = checkpoint_tensors(config.model_copy(update={"quantization_config": None}))
    return {name: spec for name, spec in specs.items() if spec.targets}


def _piece(spec: TensorSpec, config: DeepseekV3Config, data: torch.Tensor) -> ShardedTensor:
    """A Hugging Face tensor as a piece of Megatron's."""
    offsets = []
    for place in _target(spec).index:
        if isinstance(place, int):  # an axis of experts, which the piece lacks
            offsets.append((0, place, config.n_routed_experts))
        else:
            offsets.append((len(offsets), place.start // spec.shape[0], 2))
    experts = int(any(isinstance(place, int) for place in _target(spec).index))
    return ShardedTensor.from_rank_offsets(_key(spec, config), data, *offsets, prepend_axis_num=experts)


def _target(spec: TensorSpec) -> Target:
    return spec.targets["main"] if "main" in spec.targets else spec.targets["mtp"]


def _key(spec: TensorSpec, config: DeepseekV3Config) -> str:
    return checkpoint_key(module_name(_target(spec).parameter), config)


def _dtype(name: str, config: DeepseekV3Config) -> torch.dtype:
    return torch.float32 if name.endswith(BIAS_SUFFIX) else profile_for(config).dtype


def _bytes(spec: TensorSpec, config: DeepseekV3Config) -> int:
    return math.prod(spec.shape) * _dtype(spec.name, config).itemsize


def _written_bytes(spec: TensorSpec, config: DeepseekV3Config, dtype: str | None) -> int:
    """Bytes in a Hugging Face file, those of the scales included; `dtype` is an odd one."""
    if dtype is not None:
        return math.prod(spec.shape) * _ODD_DTYPES[dtype].itemsize
    scale = checkpoint_tensors(config).get(spec.name + SCALE_SUFFIX)
    if scale is None:
        return _bytes(spec, config)
    return math.prod(spec.shape) + math.prod(scale.shape) * torch.float32.itemsize


_ABSENT = "absent"
_ODD_DTYPES = {"bfloat16": torch.bfloat16}


def _odd(headers: Mapping[str, Header], config: DeepseekV3Config) -> dict[str, str]:
    """What the way back must know to write the same bytes: bf16 tensors that are fp32 in Megatron, which is exact, and
    MTP copies that the files do not have. Training or saving again loses this, and then all is written as usual.
    """
    narrow = {
        name: "bfloat16"
        for name, header in headers.items()
        if header.dtype == torch.bfloat16 and _dtype(name, config) == torch.float32
    }
    return narrow | {name: _ABSENT for name in checkpoint_tensors(config) if name not in headers}


def _stored_odd(checkpoint: Path, config: DeepseekV3Config) -> dict[str, str]:
    """What `_odd` stored, as far as it goes with the configuration that is written now."""
    with readable(checkpoint):
        odd: dict[str, str] = dist_checkpointing.load_common_state_dict(str(checkpoint)).get(_ODD, {})
        specs = checkpoint_tensors(config)
        return {
            name: word
            for name, word in odd.items()
            if name in specs and (specs[name].optional if word == _ABSENT else _ODD_DTYPES[word] in specs[name].dtypes)
        }


def find_checkpoint(source: str | Path) -> tuple[Path, Path]:
    """The folder of one iteration, and the folder where configuration and tokenizer would be.

    `source` is what Megatron's `--load` takes, of which the latest iteration is meant, or one iteration's folder.
    Raises `CheckpointError` for anything else.
    """
    source = Path(source)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    tracker = source / TRACKER
    if tracker.is_file():
        try:
            word = tracker.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{tracker}: cannot be read: {error}") from None
        checkpoint = source / (RELEASE if word == RELEASE else f"iter_{word.zfill(7)}")
        if not checkpoint.is_dir():
            raise CheckpointError(f"{tracker}: says {word}, but {checkpoint} does not exist")
        beside = source
    else:
        checkpoint = source
        beside = source if (source / "config.json").is_file() else source.parent
    with readable(checkpoint):
        is_one = dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint))
    if not is_one:
        raise CheckpointError(f"{checkpoint}: is no distributed checkpoint of Megatron (it has no metadata.json)")
    return checkpoint, beside


def _stored(checkpoint: Path, config: DeepseekV3Config) -> Mapping[str, ShardedTensor]:
    """The checkpoint's tensors by key, without data. Raises `CheckpointError` unless they are this model's."""
    with readable(checkpoint):
        stored: dict[str, ShardedTensor] = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    expected = {}
    for spec in _pieces(config).values():
        piece = _piece(spec, config, torch.empty(spec.shape, device="meta"))
        expected[piece.key] = tuple(piece.global_shape)
    missing = [key for key in expected if key not in stored]
    if missing:
        raise CheckpointError(
            f"{checkpoint}: is of another model: it lacks tensors ({len(missing)}): {some_names(missing)}"
        )
    for key, shape in expected.items():
        found = tuple(stored[key].global_shape)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint}: is of another model: {key} has shape {list(found)}, config.json gives {list(shape)}"
            )
    unknown = [key for key in stored if key.startswith(_MODEL_KEYS) and key not in expected]
    if unknown:
        raise CheckpointError(
            f"{checkpoint}: is of another model: config.json does not know ({len(unknown)}): {some_names(unknown)}"
        )
    return stored


# What no tensor's shape tells.
_TRAINED_WITH = (
    "layernorm_epsilon",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "rope_type",
    "rotary_base",
)
_TRAINED_WITH_YARN = (
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "rotary_scaling_factor",
)


def _check_arguments(checkpoint: Path, config: DeepseekV3Config, side_files: Path) -> None:
    """Raise `CheckpointError` where the arguments that were saved with the weights make another model of them."""
    with readable(checkpoint):
        saved = vars(dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args", Namespace()))
    if "norm_epsilon" in saved:  # of Megatron's command line
        saved = saved | {"layernorm_epsilon": saved["norm_epsilon"]}
    expected = megatron_arguments(config)
    names = _TRAINED_WITH + (_TRAINED_WITH_YARN if config.rope_scaling else ())
    other = [name for name in names if saved.get(name) not in (None, expected[name])]
    if other:
        said = ", ".join(f"{name} {saved[name]}, not {expected[name]}" for name in other)
        raise CheckpointError(
            f"{checkpoint}: was saved with {said} as in {side_files / 'config.json'}; convert it with the configuration"
            " that it was trained with, and change that of the result"
        )


class _Reader:
    """Hugging Face tensors out of Megatron's, which are kept from the first piece that is wanted to the last."""

    def __init__(
        self, checkpoint: Path, config: DeepseekV3Config, names: Iterable[str], odd: Mapping[str, str]
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.odd = odd
        self.pieces = _pieces(config)
        self.stored = _stored(checkpoint, config)
        self.wanted = Counter(map(self.key, names))
        self.tensors: dict[str, torch.Tensor] = {}

    def spec(self, name: str) -> TensorSpec:
        """Of the tensor that holds the numbers of `name`."""
        return self.pieces.get(name) or self.pieces[copied_from(name)]

    def key(self, name: str) -> str:
        """Of Megatron's tensor."""
        return _key(self.spec(name), self.config)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of these names and their scales, as a Hugging Face file holds them."""
        request: dict[str, Any] = {}
        for key in {key: None for key in map(self.key, names) if key not in self.tensors}:
            like = self.stored[key]
            request[key] = ShardedTensor.from_rank_offsets(key, torch.empty(like.global_shape, dtype=like.dtype))
        if request:
            with readable(self.checkpoint):
                self.tensors |= dist_checkpointing.load(request, str(self.checkpoint))
        for name in names:
            key = self.key(name)
            tensor = self.tensors[key][_target(self.spec(name)).index].clone()
            if name in self.odd:
                yield name, tensor.to(_ODD_DTYPES[self.odd[name]])
            else:
                yield from as_written(name, tensor, self.config)
            self.wanted[key] -= 1
            if not self.wanted[key]:
                del self.tensors[key]


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turn what Megatron and torch raise for damaged files into one line. Those that hold pickled objects may raise
    anything; torch's exception is not even an `Exception`.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        known = isinstance(error, CheckpointingException | CheckpointException | OSError | RuntimeError | ValueError)
        kind, lines = type(error).__name__, str(error).strip().splitlines()
        reason = (lines[-1] if known else f"{kind}: {lines[0].partition('. ')[0]}") if lines else kind
        # Megatron names what it misses beside all that there is.
        reason = shorten(reason, 300, placeholder=" ...")
        raise CheckpointError(f"{checkpoint}: cannot be read: {reason}") from None


@contextmanager
def _writable(destination: str | Path) -> Iterator[None]:
    """Turn what Megatron raises where it cannot write into one line; torch's exception is not even an `Exception`."""
    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        free = in_bytes(shutil.disk_usage(Path(destination).resolve().parent).free)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(
            f"{destination}: cannot be written: {reason} ({free} free); nothing is left of it"
        ) from None


@contextmanager
def _one_process() -> Iterator[None]:
    """Alone: Megatron's library asks for its rank, and for a process that holds a queue, which would outlive a killed
    converter.
    """
    filesystem_async._results_queue, queue = Queue(), filesystem_async._results_queue
    try:
        with _process_group():
            yield
    finally:
        filesystem_async._results_queue = queue


@contextmanager
def _process_group() -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()
