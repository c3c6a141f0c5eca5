"""The same call of an operation on both sides: were its arguments the same? Then that is where they part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dsv3_plugin.conformance.calls import Call
from dsv3_plugin.conformance.compare import bits, first_difference
from dsv3_plugin.ops.key_selection import KeySelection
from dsv3_plugin.ops.paged_batch import PagedBatch


def blame(left: Call, right: Call, names: tuple[str, str]) -> tuple[bool, str]:
    """Whether the two sides part in the operation itself, for all that is known, and a line for the report."""
    if left.op != right.op:
        return True, f"{names[0]} computes it by {left.op}, {names[1]} by {right.op}: their arguments are not compared"
    of_left, of_right = _arguments(left), _arguments(right)
    different = [text for name in of_left if (text := _argument(name, of_left[name], of_right.get(name))) is not None]
    if different:
        return False, f"not {left.op} itself: what it is given differs: {'; '.join(different)}"
    parts = f"{left.kernel} in {names[0]} and {right.kernel} in {names[1]}"
    return True, f"{left.op} is given the same arguments, every bit: its implementations part, {parts}"


def _arguments(call: Call) -> dict[str, Any]:
    """The arguments as far as they concern the token: other rows of a batch, and other pages, may be others."""
    found = dict(call.arguments)
    if call.batch is not None:
        name, batch = call.batch
        position = batch.read_seq_lens()[0] - batch.num_tokens + call.rows[0]
        pages = {key: x for key, x in found.items() if _is_paged(x, batch)}
        found |= {key: x.flatten(0, 1)[: position + 1] for key, x in pages.items()} | {name: position}
        return found | {key: _rows(x, call) for key, x in found.items() if key not in pages}
    # Which rows of a batch an expert has depends on the other tokens.
    if "slots" in found:
        found["expert_out"] = found["expert_out"][found.pop("slots")]
    if "expert_counts" in found:
        ends, rows = found["expert_counts"].cumsum(0), torch.arange(len(call.outputs[0]))
        found["expert_counts"] = torch.searchsorted(ends, rows, right=True)
    if (order := found.pop("rows", None)) is not None:
        found = {key: x[order] for key, x in found.items()}
    return {key: _rows(x, call) for key, x in found.items()}


def _is_paged(x: Any, batch: PagedBatch) -> bool:
    return isinstance(x, torch.Tensor) and tuple(x.shape[:2]) == (batch.num_blocks, batch.block_size)


def _rows(x: Any, call: Call) -> Any:
    """Of what has a row for each of the outputs', those of the token."""
    if isinstance(x, KeySelection):
        x = x.positions
    is_of_rows = isinstance(x, torch.Tensor) and len(x) == len(call.outputs[0])
    return x[list(call.rows)] if is_of_rows else x


def _argument(name: str, a: Any, b: Any) -> str | None:
    """How an argument differs, if it does."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return None if a == b else f"{name} is {a} and {b}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{name} is {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    if torch.equal(bits(a), bits(b)):
        return None
    found = first_difference(name, 0, 0, a.flatten(), b.flatten())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(found.column), a.shape))
    return f"{name} at {place}: {found.left!r} ({found.left_bits}) and {found.right!r} ({found.right_bits})"


def differences(call: Call, outputs: tuple[torch.Tensor, ...]) -> Iterator[str]:
    """Where outputs are not those of a call."""
    for i, (a, b) in enumerate(zip(call.outputs, outputs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"output {i} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(bits(a), bits(b)):
            count = int((bits(a) != bits(b)).sum())
            found: Any = first_difference("", 0, 0, a.flatten(), b.flatten())
            place = tuple(int(k) for k in torch.unravel_index(torch.tensor(found.column), a.shape))
            yield (
                f"output {i} differs in {count:,} of {a.numel():,} numbers, first at {place}: {found.left_bits} was"
                f" recorded, {found.right_bits} is computed, {found.ulps} ulp apart"
            )
