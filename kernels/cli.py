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
from dsv3_plugin.kernels import selection
from dsv3_plugin.kernels.certify import check
from dsv3_plugin.kernels.certify.targets import DeviceName, this_machine
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, FP32
from dsv3_plugin.providers import offered_kernels
from dsv3_plugin.registry import (
    Candidate,
    candidates,
    certify_command,
    is_a_definition,
    mode_from_environment,
)

app = typer.Typer(help="Kernels: what is offered, whether it is exact, what is fast.", no_args_is_help=True)
app.command("check")(check.main)

_PROFILES = {"fp32": FP32, "bf16": BF16, "fp8": FP8_UE8M0, "fp8-float32": FP8_FLOAT32}


class ProfileName(StrEnum):
    """A numerics profile; `fp8` has power-of-two scales, `fp8-float32` those of released V3 checkpoints."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    fp8_float32 = "fp8-float32"


@app.command("list")
def list_kernels(
    profile: Annotated[ProfileName, typer.Option(help="The numerics profile.")] = ProfileName.bf16,
    device: Annotated[DeviceName | None, typer.Option(help="Where; this machine if not given.")] = None,
) -> None:
    """Every kernel of every provider, for a model of V3's sizes: its implementations' certificates, whether it serves,
    or why it does not.
    """
    where = device or this_machine()
    setting = Setting(
        "cuda" if where is DeviceName.hopper else "cpu",
        "cpu" if where is DeviceName.cpu else "sm90",
        _PROFILES[profile.value],
        (9, 0) if where is DeviceName.hopper else None,
        V3_LATENT,
    )
    mode = mode_from_environment()
    kernels = offered_kernels()
    table = Table(title=f"{where.value}, profile {profile.value}, {mode} mode", show_lines=True)
    for column in ("operation", "provider", "serves", "certificates"):
        table.add_column(column, overflow="fold")
    judged: list[Candidate] = []
    for op in operations().values():
        best, offered = candidates(op, setting, mode, kernels)
        judged += offered
        for candidate in offered:
            serves = "yes" if candidate is best else f"no: {candidate.refusal or 'another has priority'}"
            kernel = candidate.kernel
            table.add_row(
                f"{op.name} {op.version}",
                f"{kernel.provider} {kernel.version}",
                serves,
                _certificates(candidate),
            )
    console = Console()
    console.print(table)
    if command := certify_command(judged):
        console.print(f"Kernels that lack certificates for this machine get them from: {command}", soft_wrap=True)
    if where is DeviceName.hopper and (lacking := compiler.missing()):
        console.print(f"No kernel in CUDA C++ serves: {lacking}", soft_wrap=True)


def _certificates(candidate: Candidate) -> str:
    """One line an implementation; nothing where a kernel was not asked for certificates."""
    if is_a_definition(candidate.kernel):
        return "it is the contract"
    if candidate.kernel.uncertified is not None:
        return f"none: {candidate.kernel.uncertified}"
    lines = zip(candidate.kernel.parts, candidate.found, strict=False)
    return "\n".join(f"{part.name}: {'none: ' if isinstance(found, str) else ''}{found}" for part, found in lines)


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
    from dsv3_plugin.kernels.bench import tune

    console = Console()
    tune.tune(output, console.print)
    console.print(
        f"Wrote {output}; the table in use is {selection.TABLE}. Another in its place, with other tile configurations,"
        " wants new certificates: dsv3 kernels check --certify FILE."
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
