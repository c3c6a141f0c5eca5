"""Recording rows in a testee: what every forward pass computed, keyed by request and token prefix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from dsv3_plugin.conformance.calls import Call
from dsv3_plugin.conformance.protocol import prefix_digests

ORDER = "streams"
"""In a tensor file's metadata: its streams in the order in which they were first computed, as JSON."""


@dataclass(frozen=True)
class RowKey:
    """Which token a row belongs to."""

    request: int
    position: int
    prefix: int


class TokenTracker:
    """Follows the tokens of each request as forward passes show them, and gives each row its key.

    A pass overwrites the positions that it processes, so a rejected draft token is replaced by the one that took its
    place. Positions that an engine took from its cache never show up: they are what `start` said.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}

    def start(self, request: int, token_ids: Sequence[int]) -> None:
        """Announce a request and the tokens that are known of it."""
        self._tokens[request] = list(token_ids)

    def observe(self, request: int, positions: Sequence[int], input_ids: Sequence[int]) -> list[RowKey]:
        """A pass processes `input_ids` of `request` at consecutive `positions`; returns the rows' keys."""
        tokens = self._tokens[request]
        start, end = positions[0], positions[0] + len(input_ids)
        assert list(positions) == list(range(start, end)), "positions of one request are consecutive"
        assert start <= len(tokens), "a token's predecessors were seen before"
        tokens[start:end] = input_ids
        return [RowKey(request, p, digest) for p, digest in enumerate(prefix_digests(tokens[:end], start), start)]


class RowRecorder:
    """Collects the rows of one case, stream by stream."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = {}
        self._keys: dict[str, list[RowKey]] = {}
        self.call: Call | None = None
        """The call that the job wants, once it was made."""

    def add(self, stream: str, keys: Sequence[RowKey], values: torch.Tensor) -> None:
        """Add rows values [len(keys), width] to a stream. They are copied: an engine may reuse its buffers."""
        assert len(keys) == len(values), f"{stream}: {len(keys)} keys for {len(values)} rows"
        self._values.setdefault(stream, []).append(values.detach().to("cpu", copy=True))
        self._keys.setdefault(stream, []).extend(keys)

    def extend(self, other: RowRecorder, request: int) -> None:
        """Add all rows of another recorder as those of `request`."""
        for stream, keys in other._keys.items():
            self._values.setdefault(stream, []).extend(other._values[stream])
            self._keys.setdefault(stream, []).extend(replace(key, request=request) for key in keys)

    def save(self, file: Path) -> None:
        """Write the tensor file of the protocol."""
        order = json.dumps(list(self._values))
        tensors: dict[str, torch.Tensor] = {}
        for stream, values in self._values.items():
            keys = self._keys[stream]
            tensors[stream] = torch.cat(values)
            tensors[f"{stream}.request"] = torch.tensor([key.request for key in keys], dtype=torch.int32)
            tensors[f"{stream}.position"] = torch.tensor([key.position for key in keys], dtype=torch.int32)
            tensors[f"{stream}.prefix"] = torch.tensor([key.prefix for key in keys], dtype=torch.int64)
        save_file(tensors, file, {ORDER: order})


def layer_streams(num_hidden_layers: int) -> list[str]:
    """The main model's module streams in the order in which they run."""
    streams = ["embed_tokens"]
    for i in range(num_hidden_layers):
        streams += [f"layers.{i}.self_attn", f"layers.{i}.mlp", f"layers.{i}"]
    return [*streams, "norm"]


class Pass(NamedTuple):
    """A forward pass that is recorded: where to, and which rows of it, by their keys."""

    recorder: RowRecorder
    keys: Sequence[RowKey]
    rows: Sequence[int]


class LayerRecorder:
    """Records the modules of a model that names them as `DeepseekV3Model` does, by forward hooks, in whatever engine.

    A module may answer [rows, width] or [1, rows, width], alone, first in a tuple, or with the residual that the next
    module adds to it; the last norm has added it. `keys` is set before each pass to the rows of its batch; while it is
    None (an engine's warm-up) nothing is recorded.
    """

    def __init__(self, model: nn.Module, num_hidden_layers: int) -> None:
        self.keys: list[RowKey] | None = None
        self.recorder = RowRecorder()
        modules = dict(model.named_modules())
        for stream in layer_streams(num_hidden_layers):
            if stream in modules:  # else another pipeline stage has it
                modules[stream].register_forward_hook(self._hook(stream))

    def current(self) -> Pass | None:
        """The pass that runs."""
        return None if self.keys is None else Pass(self.recorder, self.keys, range(len(self.keys)))

    def _hook(self, stream: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            if self.keys is not None:
                rows = output[0] if isinstance(output, tuple) else output
                residual = output[1] if isinstance(output, tuple) and len(output) > 1 and stream != "norm" else None
                if isinstance(residual, torch.Tensor) and residual.shape == rows.shape:
                    rows = rows + residual
                self.recorder.add(stream, self.keys, rows.flatten(0, -2)[: len(self.keys)])

        return record


def pick(keys: Sequence[RowKey], indices: Iterable[int]) -> list[RowKey]:
    """The keys at `indices`."""
    return [keys[i] for i in indices]
