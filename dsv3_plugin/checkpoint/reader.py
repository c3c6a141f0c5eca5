"""Reading a checkpoint folder, and refusing one that is not what its configuration says.

`validate` reads the headers of the safetensors files and the routers' bias vectors, no other data, so that every
mistake shows in seconds and before any memory is taken. `tensors` streams the data, one shard after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, SCALE_SUFFIX, TensorSpec, checkpoint_tensors
from dsv3_plugin.config import DeepseekV3Config, read_json_object
from dsv3_plugin.errors import CheckpointError, ConfigError
from dsv3_plugin.ops.fp8 import E4M3
from dsv3_plugin.profile import Profile, profile_for

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""A buffer that old versions of transformers saved; it is computed from the configuration."""

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": E4M3}


@dataclass(frozen=True)
class Header:
    """A tensor as a safetensors file describes it; a dtype that no checkpoint of ours has stays safetensors' word."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class CheckpointReader:
    """A checkpoint folder: `config.json`, and `model.safetensors` or an index with its shards."""

    def __init__(self, path: str | Path) -> None:
        """Raises `CheckpointError` for a missing folder and `ConfigError` for its `config.json`; opens no weights."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder; a checkpoint is a folder with config.json")
        self.config = DeepseekV3Config.from_pretrained(self.path)

    def profile(self, dtype: torch.dtype | None = None) -> Profile:
        """The numerics profile of this checkpoint, `dtype` being an engine's explicit choice."""
        return profile_for(self.config, dtype)

    def files(self) -> list[Path]:
        """The safetensors files. Raises `CheckpointError` where there is none, or the index is wrong."""
        return [file for file, _ in self._shards()]

    def headers(self) -> dict[str, Header]:
        """Name to header of every tensor. Raises `CheckpointError` that names a file which cannot be read."""
        headers: dict[str, Header] = {}
        for file, indexed in self._shards():
            with _open(file) as shard:
                names = set(shard.keys())
                if indexed is not None and (lost := indexed - names):
                    raise CheckpointError(f"{file}: lacks {some_names(lost)}, which {INDEX_FILE} places there")
                if indexed is not None and (extra := names - indexed):
                    raise CheckpointError(f"{file}: holds {some_names(extra)}, which {INDEX_FILE} does not place there")
                for name in sorted(names):
                    view = shard.get_slice(name)
                    dtype = view.get_dtype()
                    headers[name] = Header(file, tuple(view.get_shape()), _DTYPES.get(dtype, dtype))
        return headers

    def tensors(self, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, torch.Tensor]]:
        """The wanted tensors on the CPU, shard by shard; a consumer that keeps none needs the memory of one."""
        for file, _ in self._shards():
            with _open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    if not name.endswith(IGNORED_SUFFIX) and wanted(name):
                        yield name, shard.get_tensor(name)

    def validate(self) -> dict[str, Header]:
        """Compare the files with the configuration; returns the headers.

        Raises `CheckpointError` that names the file or tensor for: unreadable files, missing or unknown tensors, a
        wrong shape or dtype, weights that are quantised where `quantization_config` says otherwise, and a router bias
        that is not finite.
        """
        headers = {name: h for name, h in self.headers().items() if not name.endswith(IGNORED_SUFFIX)}
        specs = checkpoint_tensors(self.config)
        self._check_quantization(headers, specs)
        self._check_presence(headers, specs)
        for name, header in headers.items():
            if problem := specs[name].mismatch(header.shape, header.dtype):
                raise CheckpointError(f"{header.file}: {problem}")
        for name, header in headers.items():
            if name.endswith(BIAS_SUFFIX):
                with _open(header.file) as shard:
                    check_finite(f"{header.file}: tensor {name}", shard.get_tensor(name))
        return headers

    def _check_quantization(self, headers: dict[str, Header], specs: Mapping[str, TensorSpec]) -> None:
        """Quantised exactly where the configuration says so. First, because else it would read as missing tensors."""
        for name, header in headers.items():
            scale = name + SCALE_SUFFIX
            if header.dtype == E4M3 and self.config.quantization_config is None:
                raise CheckpointError(
                    f"{header.file}: tensor {name} is float8_e4m3fn, but {self.path / 'config.json'} has no"
                    " quantization_config; restore it"
                )
            if header.dtype == E4M3 and scale not in headers:
                raise CheckpointError(
                    f"{header.file}: tensor {name} is float8_e4m3fn, but its scales {scale} are missing"
                )
            if name in specs and specs[name].dtypes == (E4M3,) and header.dtype != E4M3:
                raise CheckpointError(
                    f"{header.file}: {specs[name].mismatch(specs[name].shape, header.dtype)};"
                    f" remove quantization_config from {self.path / 'config.json'} or quantise the weights"
                )

    def _check_presence(self, headers: dict[str, Header], specs: Mapping[str, TensorSpec]) -> None:
        missing = [name for name, spec in specs.items() if not spec.optional and name not in headers]
        unknown = [name for name in headers if name not in specs]
        also = f"; unknown tensors ({len(unknown)}): {some_names(unknown)}" if unknown else ""
        if missing:
            mtp_only = all("main" not in specs[name].targets for name in missing)
            advice = "; without an MTP layer, config.json needs num_nextn_predict_layers 0" if mtp_only else ""
            raise CheckpointError(f"{self.path}: missing tensors ({len(missing)}): {some_names(missing)}{also}{advice}")
        if unknown:
            raise CheckpointError(
                f"{self.path}: tensors that this configuration does not know ({len(unknown)}): {some_names(unknown)}"
            )

    def _shards(self) -> list[tuple[Path, set[str] | None]]:
        """Each file with the names that the index places in it, None without an index."""
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.is_file():
            return [(single, None)]
        if not index.is_file():
            raise CheckpointError(f"{self.path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        try:
            weight_map = read_json_object(index).get("weight_map")
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        if not weight_map:
            raise CheckpointError(f"{index}: weight_map is empty")
        placed: dict[str, set[str]] = defaultdict(set)
        for name, file in weight_map.items():
            placed[file].add(name)
        for file, names in placed.items():
            if not (self.path / file).is_file():
                raise CheckpointError(f"{index}: names {file}, which does not exist, for {some_names(names)}")
        return [(self.path / file, placed[file]) for file in sorted(placed)]


def check_finite(tensor_name: str, tensor: torch.Tensor) -> None:
    """Raise `CheckpointError` if a router's bias has a NaN or an infinity: it would choose experts silently."""
    finite = tensor.isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise CheckpointError(f"{tensor_name} is {tensor[first].item()} at expert {first}; it must be finite")


def some_names(names: Iterable[str]) -> str:
    """The first few of some names, for one line."""
    ordered = sorted(names)
    rest = len(ordered) - 3
    return ", ".join(ordered[:3]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a safetensors file; what it raises names the file."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
