"""`dsv3 diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.diff.report import Diff, compare, print_diff
from dsv3_plugin.diff.sides import read_side


def main(
    sides: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B",
            help="Trainer, then server: dumps (a folder, or a file samples.jsonl), or two testees' folders of"
            " `dsv3 conformance run --keep`.",
        ),
    ],
    device: Annotated[Device, typer.Option(help="Where both computed log-probabilities: formulas are tried there.")] = (
        "cpu"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where two programs first part that should print the same log-probabilities: inputs, weights, the formula,
    or which layer and operation. Exit with status 0 if nothing differs, 1 if something does, 2 if nothing can be
    compared.
    """
    if len(sides) != 2:
        raise typer.BadParameter("two sides are compared: A and B")
    left, right = map(read_side, sides)
    show(compare(left, right, device), as_json)


def show(diff: Diff, as_json: bool) -> None:
    """Print a comparison and exit."""
    if as_json:
        print(json.dumps(diff.record(), indent=1))
    else:
        print_diff(diff, Console())
    raise typer.Exit(0 if diff.equal else 1)
