"""One call of an operation, saved with all that it was given and what it answered: enough to make it again, alone.

A safetensors file: the arguments' tensors by the names of the operation's signature, the outputs as `out.0`, `out.1`,
and in the metadata, as JSON under `call`, everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.hooks import Setting
from dsv3_plugin.ops.key_selection import KeySelection
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.profile import Profile
from dsv3_plugin.registry import AnyOperation

_METADATA = "call"


@dataclass(frozen=True)
class Call:
    """Of one operation on one side."""

    op: str
    arguments: Mapping[str, Any]
    """By the names of its signature; tensors on the CPU."""
    outputs: tuple[torch.Tensor, ...]
    rows: tuple[int, ...]
    """Of the outputs, those of the token in question: one, or one an expert where they are sorted by expert."""
    setting: Setting
    kernel: str
    """What computed it."""

    @classmethod
    def of(
        cls, op: AnyOperation, args: Any, kwargs: Any, out: Any, *, rows: tuple[int, ...], setting: Setting, kernel: str
    ) -> Call:
        """A copy of a call's arguments and outputs; of attention, of the request that has the token."""
        bound = op.signature.bind(*args, **kwargs)
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            is_rest = bound.signature.parameters[name].kind is bound.signature.parameters[name].VAR_KEYWORD
            arguments |= value if is_rest else {name: value}
        outputs = out if isinstance(out, tuple) else (out,)
        call = cls(
            op.name,
            {name: _copied(value) for name, value in arguments.items()},
            tuple(_copied(x) for x in outputs),
            rows,
            setting,
            kernel,
        )
        return _of_one_request(call)

    @property
    def batch(self) -> tuple[str, PagedBatch] | None:
        """The argument that is a paged batch."""
        return next(((name, x) for name, x in self.arguments.items() if isinstance(x, PagedBatch)), None)

    def on(self, device: str) -> Call:
        """The same with its arguments on a device."""
        return replace(self, arguments={name: _moved(value, device) for name, value in self.arguments.items()})

    def again(self, run: Any) -> tuple[torch.Tensor, ...]:
        """What a kernel gives for the same arguments."""
        out = run(**self.arguments)
        return out if isinstance(out, tuple) else (out,)

    def save(self, file: Path) -> None:
        """Write the file."""
        tensors: dict[str, torch.Tensor] = {f"out.{i}": x.contiguous() for i, x in enumerate(self.outputs)}
        plain = {name: _encode(name, value, tensors) for name, value in self.arguments.items()}
        setting = asdict(self.setting) | {
            "profile": asdict(self.setting.profile) | {"dtype": str(self.setting.profile.dtype)}
        }
        about = {"op": self.op, "rows": self.rows, "kernel": self.kernel, "setting": setting, "arguments": plain}
        save_file(tensors, file, {_METADATA: json.dumps(about)})


def read_call(file: Path) -> Call:
    """Raises `ConformanceError` where a file holds no call."""
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            about = json.loads((stored.metadata() or {})[_METADATA])
        profile = about["setting"].pop("profile")
        profile["dtype"] = getattr(torch, profile["dtype"].removeprefix("torch."))
        capability = about["setting"].pop("capability")
        setting = Setting(
            **about["setting"], profile=Profile(**profile), capability=tuple(capability) if capability else None
        )
        outputs = tuple(tensors[f"out.{i}"] for i in range(sum(name.startswith("out.") for name in tensors)))
        arguments = {name: _decode(name, value, tensors) for name, value in about["arguments"].items()}
        assert about["op"] in operations()
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ConformanceError(f"{file}: no saved call of an operation: {error!r}") from None
    return Call(about["op"], arguments, outputs, tuple(about["rows"]), setting, about["kernel"])


def _copied(value: Any) -> Any:
    """On the CPU, so that an engine's buffers may be used again."""
    return _moved(value, "cpu", copy=True)


def _moved(value: Any, device: str, *, copy: bool = False) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=copy)
    if isinstance(value, PagedBatch):
        table, lengths, starts = (x.to(device, copy=copy) for x in value.tensors)
        return PagedBatch(table, lengths, starts, *value.sizes)
    if isinstance(value, KeySelection):
        return KeySelection(_moved(value.positions, device, copy=copy))
    return value


def _of_one_request(call: Call) -> Call:
    """Of a paged batch only the request that has the token, and only its pages: a cache may have gigabytes."""
    if call.batch is None:
        return call
    (name, batch), (row,) = call.batch, call.rows
    starts, lengths = batch.read_query_start_loc(), batch.read_seq_lens()
    request = next(r for r in range(batch.num_reqs) if starts[r] <= row < starts[r + 1])
    queries = slice(starts[request], starts[request + 1])
    blocks = batch.block_table[request, : -(-lengths[request] // batch.block_size)].long()
    arguments: dict[str, Any] = {}
    for key, value in call.arguments.items():
        if isinstance(value, torch.Tensor) and tuple(value.shape[:2]) == (batch.num_blocks, batch.block_size):
            arguments[key] = value[blocks]
        elif isinstance(value, torch.Tensor) and len(value) == batch.num_tokens:
            arguments[key] = value[queries]
        elif isinstance(value, KeySelection) and value.positions is not None:
            arguments[key] = KeySelection(value.positions[queries])
        else:
            arguments[key] = value
    arguments[name] = PagedBatch(
        block_table=torch.arange(len(blocks), dtype=torch.int32)[None],
        seq_lens=torch.tensor([lengths[request]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, queries.stop - queries.start], dtype=torch.int32),
        num_tokens=queries.stop - queries.start,
        num_blocks=len(blocks),
        block_size=batch.block_size,
    )
    outputs = tuple(x[queries] for x in call.outputs)
    return replace(call, arguments=arguments, outputs=outputs, rows=(row - queries.start,))


def _encode(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What stands for an argument in JSON; its tensors are added to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, PagedBatch):
        for part, x in zip(("block_table", "seq_lens", "query_start_loc"), value.tensors, strict=True):
            tensors[f"{name}.{part}"] = x
        return {"paged_batch": value.sizes}
    if isinstance(value, KeySelection):
        if value.positions is not None:
            tensors[f"{name}.positions"] = value.positions
        return {"key_selection": value.positions is not None}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ConformanceError(f"a call with {name} of {type(value).__name__} cannot be saved")


def _decode(name: str, value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "paged_batch":
        table, lengths, starts = (tensors[f"{name}.{part}"] for part in ("block_table", "seq_lens", "query_start_loc"))
        return PagedBatch(table, lengths, starts, *content)
    if kind == "key_selection":
        return KeySelection(tensors[f"{name}.positions"] if content else None)
    return getattr(torch, content.removeprefix("torch.")) if kind == "dtype" else content
