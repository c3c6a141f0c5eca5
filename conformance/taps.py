"""What each operation of a model computes, in whatever engine it runs: recorded where a job asks for `operations`.

A stream is named `MODULE/OPERATION`, by the module whose forward pass calls the operation: `layers.3.self_attn/absorb`;
`@1` behind it where the module calls it a second time, and `.0`, `.1` where it has several outputs. A row is a token's:
what experts computed is put back to the tokens that it is of, in ascending order of expert.

In the `two_form` profile attention's own operations have no streams: what they compute is of keys, or of parts of a
pass's rows. What they come to is what `o_proj` is given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dsv3_plugin.conformance.calls import Call
from dsv3_plugin.conformance.protocol import Capture
from dsv3_plugin.conformance.rows import Pass
from dsv3_plugin.ops.permute import permute, permute_fp8, sort_by_expert
from dsv3_plugin.ops.router import moe_router, route
from dsv3_plugin.registry import AnyOperation, Ops

ROUTER_CHOICES = (f"/{moe_router.name}.0", f"/{route.name}.0")
"""Ends of the streams that hold the chosen experts."""
_EXPERTS = ".experts"
"""In the names of the modules whose rows are sorted by expert."""
_OF_ATTENTION = ".self_attn/"
"""In the streams of operations that attention calls itself, rather than its projections."""


def operation_of(stream: str) -> str | None:
    """The operation whose output a stream holds; None of a module's own stream."""
    _, slash, op = stream.partition("/")
    return op.partition(".")[0].partition("@")[0] if slash else None


class OperationRecorder:
    """Taps the operations of `model`, whose modules are named as those of `DeepseekV3Model`; `rename` gives a stream of
    another model such a name, or None where the main model has none like it. `current` tells which pass is recorded.
    The call that `capture` names is left with its recorder.
    """

    def __init__(
        self,
        model: nn.Module,
        ops: Ops,
        current: Callable[[], Pass | None],
        rename: Callable[[str], str | None] = lambda stream: stream,
        capture: Capture | None = None,
    ) -> None:
        self.in_two_forms = ops.setting.profile.attention == "two_form"
        self.capture = capture
        self.setting = ops.setting
        self.kernels = {choice.op: str(choice) for choice in ops.provenance}
        self.current = current
        self.slots: torch.Tensor | None = None
        """Of the layer's last `sort_by_expert`: the row of each token's experts, int64 [T, k]."""
        self.rename = rename
        self.running: list[tuple[str, Counter[str]]] = []
        """Modules whose forward pass runs, outermost first, each with how often it has called which operation."""
        for name, module in model.named_modules():
            # Not by hooks: Megatron's adapter calls those of modules that do not run.
            module.forward = partial(self._forward, name, module.forward)
        ops.tap(self._observe)

    def _forward(self, name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.running.append((name, Counter()))
        try:
            return forward(*args, **kwargs)
        finally:
            self.running.pop()

    def _observe(self, op: AnyOperation, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        current = self.current()
        if current is not None and self.running:
            module, calls = self.running[-1]
            call = f"@{n}" if (n := calls[op.name]) else ""
            calls[op.name] += 1
            stream = self.rename(f"{module}/{op.name}{call}")
            if stream is not None and not (self.in_two_forms and _OF_ATTENTION in stream):
                self._record(current, op, stream, out)
                self._capture(current, op, stream, args, kwargs, out)
        return out

    def _record(self, current: Pass, op: AnyOperation, stream: str, out: Any) -> None:
        if op is sort_by_expert:  # it numbers the rows of one batch
            self.slots = out[1]
            return
        by_expert = _is_by_expert(op, stream)
        several = isinstance(out, tuple)
        for i, value in enumerate(out if several else (out,)):
            rows = value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
            if by_expert:
                if self.slots is None:
                    continue
                rows = rows[self.slots]
            if len(rows) > max(current.rows, default=0):
                current.recorder.add(f"{stream}.{i}" if several else stream, current.keys, _pick(rows, current.rows))

    def _capture(self, current: Pass, op: AnyOperation, stream: str, args: Any, kwargs: Any, out: Any) -> None:
        wanted = self.capture
        if wanted is None or current.recorder.call is not None or not _is_of(wanted.stream, stream):
            return
        row = next((r for r, key in zip(current.rows, current.keys, strict=True) if key.prefix == wanted.prefix), None)
        if row is not None:
            kernel = self.kernels.get(op.name, "")
            rows = (row,)
            if self.slots is not None and _is_by_expert(op, stream):
                rows = tuple(self.slots[row].tolist())
            current.recorder.call = Call.of(op, args, kwargs, out, rows=rows, setting=self.setting, kernel=kernel)


def _is_by_expert(op: AnyOperation, stream: str) -> bool:
    """Whether the outputs' rows are sorted by expert."""
    return op in (permute, permute_fp8) or _EXPERTS in stream


def _is_of(wanted: str, stream: str) -> bool:
    """Whether a wanted stream is that of an operation, or of one of its outputs."""
    return wanted == stream or bool(re.fullmatch(re.escape(stream) + r"\.\d+", wanted))


def _pick(rows: torch.Tensor, wanted: Any) -> torch.Tensor:
    """rows [T, ...] to the wanted ones, [len(wanted), width]."""
    return rows.flatten(1)[list(wanted)]
