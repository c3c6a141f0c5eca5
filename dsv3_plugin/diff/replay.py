"""`dsv3 replay`: make saved calls of an operation again, alone, by every kernel that is here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dsv3_plugin.conformance.calls import Call, read_call
from dsv3_plugin.diff.calls import differences
from dsv3_plugin.errors import DiffError
from dsv3_plugin.hooks import Kernel
from dsv3_plugin.ops.tile import pin_one_thread
from dsv3_plugin.providers import is_supported, offered_kernels
from dsv3_plugin.registry import definitions


def main(
    calls: Annotated[list[Path], typer.Argument(help="What `dsv3 diff --keep` saved: NAME/call.safetensors.")],
) -> None:
    """Make saved calls again by the contract's definition and by each kernel that this environment has for them, and
    say which gives what was recorded. Exit with status 1 unless the definition gives all of it.
    """
    pin_one_thread()
    wrong = 0
    for file in calls:
        call = read_call(file)
        print(f"{file}: {call.op}, computed by {call.kernel}")
        for name, is_definition, run in _kernels(call):
            found = list(differences(call, _computed(call, run)))
            wrong += bool(found) and is_definition
            print(f"  {name}: {'; '.join(found) or 'gives what was recorded, every bit'}")
    raise typer.Exit(1 if wrong else 0)


def _kernels(call: Call) -> Iterator[tuple[str, bool, Any]]:
    setting = call.setting
    if setting.device_type == "cuda" and not torch.cuda.is_available():
        raise DiffError(f"{call.op} was computed on a GPU, and torch finds none here")
    definition = definitions(setting.arithmetic)[call.op]
    yield f"the contract's definition on {setting.arithmetic}", True, definition.run
    for kernel in offered_kernels():
        if kernel.op == call.op and kernel.run is not definition.run and is_supported(kernel, setting):
            yield _named(kernel), False, kernel.run


def _named(kernel: Kernel) -> str:
    return f"{kernel.provider} {kernel.version}"


def _computed(call: Call, run: Any) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return tuple(x.cpu() for x in call.on(call.setting.device_type).again(run))
