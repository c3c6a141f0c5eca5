"""`dsv3 kernels`: what providers offer, whether it prints the contract's bits, and which is the fastest where."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels import check, cuda, selection
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, FP32
from dsv3_plugin.registry import CONTRACTS, mode_from_environment, offered_kernels, refusal

app = typer.Typer(help="Kernels: what is offered, whether it is exact, what is fast.", no_args_is_help=True)
app.command("check")(check.main)

_PROFILES = {"fp32": FP32, "bf16": BF16, "fp8": FP8_UE8M0, "fp8-float32": FP8_FLOAT32}


class ProfileName(StrEnum):
    """A numerics profile; `fp8` has power-of-two scales, `fp8-float32` those of released V3 checkpoints."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    fp8_float32 = "fp8-float32"


class DeviceName(StrEnum):
    """Where operations run: `hopper` and its model on a CPU print the same bits, `cpu` others."""

    cpu = "cpu"
    hopper = "hopper"
    hopper_model = "hopper-model"


def _device() -> DeviceName:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return DeviceName.hopper if hopper else DeviceName.cpu


@app.command("list")
def list_kernels(
    profile: Annotated[ProfileName, typer.Option(help="The numerics profile.")] = ProfileName.bf16,
    device: Annotated[DeviceName | None, typer.Option(help="Where; this machine if not given.")] = None,
) -> None:
    """Every kernel of every provider: its certificate, whether it serves, or why it does not."""
    where = device or _device()
    setting = Setting(
        "cuda" if where is DeviceName.hopper else "cpu",
        "cpu" if where is DeviceName.cpu else "sm90",
        _PROFILES[profile.value],
        (9, 0) if where is DeviceName.hopper else None,
    )
    mode = mode_from_environment()
    kernels = offered_kernels()
    table = Table(title=f"{where.value}, profile {profile.value}, {mode} mode", show_lines=True)
    for column in ("operation", "provider", "serves", "certificate"):
        table.add_column(column, overflow="fold")
    for contract in CONTRACTS:
        offers = [kernel for kernel in kernels if kernel.op == contract.op]
        reasons = [refusal(kernel, contract, setting, mode) for kernel in offers]
        able = [kernel for kernel, reason in zip(offers, reasons, strict=True) if reason is None]
        best = max(able, key=lambda kernel: kernel.priority, default=None)
        for kernel, reason in zip(offers, reasons, strict=True):
            serves = "yes" if kernel is best else f"no: {reason or 'another has priority'}"
            certificate = kernel.certificate or f"none: {kernel.uncertified or 'not compared'}"
            table.add_row(
                f"{contract.op} {contract.version}", f"{kernel.provider} {kernel.version}", serves, certificate
            )
    console = Console()
    console.print(table)
    if where is DeviceName.hopper and not cuda.available():
        console.print(
            "The fp8 products are made without fp8_stream.cu: NVRTC is not found. Install the package cuda-bindings."
        )


@app.command("tune")
def tune_kernels(
    output: Annotated[Path, typer.Option(help="Where to write the table.")] = Path("selection.json"),
    force: Annotated[bool, typer.Option(help="Replace a table that is there.")] = False,
) -> None:
    """Measure which kernel is the fastest for which shape on this machine's card. Any choice prints the same bits."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise KernelError("only a Hopper GPU can be tuned for, and this machine has none")
    if output.exists() and not force:
        raise KernelError(f"{output} exists; name another file with --output, or replace it with --force")
    from dsv3_plugin.kernels import tune

    console = Console()
    tune.tune(output, console.print)
    console.print(
        f"Wrote {output}; the table in use is {selection.TABLE}. One of other cuts in its place wants new certificates:"
        " dsv3 kernels check --certify FILE."
    )


@app.command("selection")
def print_selection(
    table: Annotated[Path, typer.Argument(help="What `dsv3 kernels tune` wrote; the table in use if not given.")] = (
        selection.TABLE
    ),
) -> None:
    """Print which kernel makes which fp8 product, with all measured times, as markdown."""
    try:
        print(selection.read(table).markdown(), end="")
    except (OSError, ValueError) as error:
        raise KernelError(f"{table} is no table of `dsv3 kernels tune`: {error}") from error
