"""`dsv3 replay`: make saved calls of an operation again, alone, by every kernel that is here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from dsv3_plugin.conformance.calls import Call, read_call
from dsv3_plugin.diff.calls import differences
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
        definition = definitions(call.setting.arithmetic)[call.op]
        found = list(differences(call, _computed(call, definition, "cpu")))
        wrong += bool(found)
        _tell(f"the contract's definition on {call.setting.arithmetic}", found)
        for kernel in _others(call, definition):
            found = list(differences(call, _computed(call, kernel, call.setting.device_type)))
            _tell(f"{kernel.provider} {kernel.version}", found)
    raise typer.Exit(1 if wrong else 0)


def _tell(name: str, found: list[str]) -> None:
    print(f"  {name}: {'; '.join(found) or 'gives what was recorded, every bit'}")


def _others(call: Call, definition: Kernel) -> Iterator[Kernel]:
    if call.setting.device_type == "cuda" and not torch.cuda.is_available():
        print("  no other kernel is tried: the call was made on a GPU, and torch finds none here")
        return
    for kernel in offered_kernels():
        if kernel.op == call.op and kernel.run is not definition.run and is_supported(kernel, call.setting):
            yield kernel


def _computed(call: Call, kernel: Kernel, device: str) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return tuple(x.cpu() for x in call.on(device).again(kernel.run))
