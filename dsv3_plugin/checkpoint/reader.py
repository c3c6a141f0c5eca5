"""Reading a checkpoint folder, and refusing one that is not what its configuration says.

`validate` reads the headers of the safetensors files, the routers' bias vectors and the scales, no other data, so that
every mistake shows in seconds and before any memory is taken. `tensors` streams the data, one shard after the other.

Whoever reads the folder must read the same. vLLM and SGLang take the files that the index names, else every
`*.safetensors`; transformers takes `model.safetensors` first. So a folder must not hold a file that one of them would
take and another would not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, SCALE_SUFFIX, TensorSpec, checkpoint_tensors, copied_from
from dsv3_plugin.config import DeepseekV3Config, read_json_object
from dsv3_plugin.errors import CheckpointError, ConfigError
from dsv3_plugin.ops.quantize import E4M3, E4M3_MAX
from dsv3_plugin.profile import Profile, profile_for

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""A buffer that old versions of transformers saved; it is computed from the configuration."""

_CONFUSING = {
    "hf_quant_config.json": "vLLM and SGLang take the quantization from it; config.json is to say all",
    "quant_model_description.json": "SGLang takes the folder for ModelSlim's because of it; config.json is to say all",
    "adapter_config.json": "transformers adds the adapter to the weights, servers do not; merge it",
}
"""Files beside the weights that only some readers heed."""
_CHUNK = 1 << 24

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

    def tensors(
        self,
        wanted: Callable[[str], bool] = lambda name: True,
        part: Callable[[str], tuple[slice, ...]] = lambda name: (),
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The wanted tensors on the CPU, shard by shard, or a part of each: its slices, all of it where there are none.
        No more is read than that, and a consumer that keeps none needs the memory of one.
        """
        for _, name, tensor in self._located(wanted, part):
            yield name, tensor

    def validate(self) -> dict[str, Header]:
        """Compare the files with the configuration; returns the headers.

        Raises `CheckpointError` that names the file or tensor for: unreadable files, missing or unknown tensors, a
        wrong shape or dtype, fp32 weights where the configuration has no dtype, weights that are quantized where
        `quantization_config` says otherwise, a router bias that is not finite, and scales that are not positive,
        finite, or what `scale_fmt` says.
        """
        for name, reason in _CONFUSING.items():
            if (self.path / name).exists():
                raise CheckpointError(f"{self.path / name}: {reason}")
        headers = {name: h for name, h in self.headers().items() if not name.endswith(IGNORED_SUFFIX)}
        specs = checkpoint_tensors(self.config)
        self._check_quantization(headers, specs)
        self._check_presence(headers, specs)
        for name, header in headers.items():
            if problem := specs[name].mismatch(header.shape, header.dtype):
                raise CheckpointError(f"{header.file}: {problem}")
        self._check_dtype(headers)
        for where, name, tensor in self._located(lambda name: name.endswith((BIAS_SUFFIX, SCALE_SUFFIX))):
            if problem := value_problem(name, tensor, self.config):
                raise CheckpointError(f"{where}: {problem}")
        return headers

    def check_values(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Look at every number of the checkpoint, shard by shard; returns how many there are.

        Args:
            progress: called with the numbers seen and to be seen.

        Raises `CheckpointError` that names tensor, place and value of what no model computes with, for up to three
        tensors: NaN, infinities, fp8's NaN codes, and what `validate` refuses.
        """
        total = sum(math.prod(header.shape) for header in self.validate().values())
        done, problems = 0, []
        for where, name, tensor in self._located(lambda name: True):
            if problem := value_problem(name, tensor, self.config):
                problems.append(f"{where}: {problem}")
            done += tensor.numel()
            progress(done, total)
        if problems:
            rest = f"; and {len(problems) - 3} more tensors" if len(problems) > 3 else ""
            raise CheckpointError("; ".join(problems[:3]) + rest)
        return total

    def copies_that_differ(self) -> list[str]:
        """The MTP layer's copies of embedding and head whose original has other bytes.

        Nobody uses them: the layer shares the originals, here and in both servers (but where vLLM's own draft has an
        embedding of its own, beside a main model in pipeline stages). Needs memory for the copies and originals.
        """
        specs = checkpoint_tensors(self.config)
        copies = [name for name in self.headers() if name in specs and not specs[name].targets]
        wanted = {*copies, *map(copied_from, copies)}
        tensors = dict(self.tensors(wanted.__contains__))

        def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
            return one.dtype != other.dtype or not torch.equal(one, other)

        return [name for name in copies if differ(tensors[name], tensors[copied_from(name)])]

    def _located(
        self, wanted: Callable[[str], bool], part: Callable[[str], tuple[slice, ...]] = lambda name: ()
    ) -> Iterator[tuple[Path, str, torch.Tensor]]:
        """The wanted tensors, or parts of them, with their files."""
        for file, _ in self._shards():
            with _open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    if not name.endswith(IGNORED_SUFFIX) and wanted(name):
                        slices = part(name)
                        yield file, name, shard.get_slice(name)[slices] if slices else shard.get_tensor(name)

    def _check_quantization(self, headers: dict[str, Header], specs: Mapping[str, TensorSpec]) -> None:
        """Quantized exactly where the configuration says so. First, because else it would read as missing tensors."""
        self._check_exceptions(specs)
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
                    f" remove quantization_config from {self.path / 'config.json'} or quantize the weights"
                )

    def _check_exceptions(self, specs: Mapping[str, TensorSpec]) -> None:
        """Readers take the names of modules that are left in bf16 as names, as parts of names, or as patterns."""
        if (quantization := self.config.quantization_config) is None:
            return
        modules = [name.removesuffix(".weight") for name, spec in specs.items() if spec.dtypes == (E4M3,)]
        for field in ("modules_to_not_convert", "ignored_layers"):
            for word in getattr(quantization, field) or ():
                hit = next((m for m in modules if word in m or word.startswith("re:")), None)
                if hit is not None:
                    raise CheckpointError(
                        f"{self.path / 'config.json'}: quantization_config.{field} names {word!r}, but {hit} is always"
                        " fp8 here; remove it if the weights are fp8, else the model is not implemented"
                    )

    def _check_dtype(self, headers: dict[str, Header]) -> None:
        """Without `torch_dtype` vLLM takes the dtype of most tensors, transformers another, and the core bf16."""
        if "torch_dtype" in self.config.model_fields_set:
            return
        for name, header in headers.items():
            if header.dtype == torch.float32 and not name.endswith((BIAS_SUFFIX, SCALE_SUFFIX)):
                raise CheckpointError(
                    f"{self.path / 'config.json'}: has no torch_dtype, and {name} is float32; readers differ in what"
                    " they make of it: say bfloat16 or float32"
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
        index = self.path / INDEX_FILE
        placed = self._placed(index) if index.is_file() else {SINGLE_FILE: None}
        # Hidden files are no shell's `*`, which is how servers look for them.
        found = {file.name for file in self.path.glob("*.safetensors") if not file.name.startswith(".")}
        if not index.is_file() and SINGLE_FILE not in found:
            raise CheckpointError(f"{self.path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        if beside := found - placed.keys():
            raise CheckpointError(
                f"{self.path}: holds {some_names(beside)} beside {some_names(placed)}, which"
                f" {f'{INDEX_FILE} names' if index.is_file() else 'no index names'}; readers differ in which they take,"
                " move one or the other away"
            )
        return [(self.path / file, placed[file]) for file in sorted(placed)]

    def _placed(self, index: Path) -> dict[str, set[str] | None]:
        """File name to the names of the tensors that an index places in it."""
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
            if Path(file).name != file or file.startswith(".") or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: names {file}; servers read only *.safetensors of the folder itself, put it there"
                )
            if file.startswith("consolidated"):
                raise CheckpointError(
                    f"{index}: names {file}; vLLM takes consolidated*.safetensors for Mistral's format, rename the file"
                )
        return dict(placed)


def value_problem(name: str, tensor: torch.Tensor, config: DeepseekV3Config) -> str | None:
    """What no model computes with in a tensor: the first such number, its place, and how many there are; or None."""
    quantization = config.quantization_config
    powers = name.endswith(SCALE_SUFFIX) and quantization is not None and quantization.scale_fmt == "ue8m0"
    first, count = None, 0
    for start, part in zip(range(0, tensor.numel(), _CHUNK), tensor.reshape(-1).split(_CHUNK), strict=True):
        if part.dtype == E4M3:
            bad = part.view(torch.uint8) & 0x7F == 0x7F  # a NaN has no other code
        else:
            bad = ~part.isfinite()
        if name.endswith(SCALE_SUFFIX):
            bad |= part <= 0
            bad |= ~(part.float() * E4M3_MAX).isfinite()
        if powers:
            bad |= part.frexp().mantissa != 0.5
        places = bad.nonzero()
        if first is None and len(places):
            first = start + int(places[0])
        count += len(places)
    if first is None:
        return None
    place = str([int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)])
    if name.endswith(BIAS_SUFFIX):
        place = f"expert {first}"
    value = tensor.reshape(-1)[first].float().item()
    rule = "it must be finite"
    if name.endswith(SCALE_SUFFIX):
        rule = f"a scale must be positive and finite, and so must {E4M3_MAX:g} times it"
    if powers and value > 0 and math.frexp(value)[0] != 0.5 and math.isfinite(value):
        rule = "scale_fmt ue8m0 in config.json says that scales are powers of two; remove it if they are not"
    more = f" ({count} such numbers)" if count > 1 else ""
    return f"tensor {name} is {value} at {place}{more}; {rule}"


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
