"""`dsv3 diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.conformance.runner import TesteeCommand
from dsv3_plugin.diff.report import compare, print_diff
from dsv3_plugin.diff.sides import read_side
from dsv3_plugin.diff.testees import diff_testees, explain, make_case
from dsv3_plugin.errors import DiffError


def main(
    sides: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[A B]",
            help="Trainer, then server: dumps (a folder, or a file samples.jsonl), or two testees' folders of"
            " `dsv3 conformance run --keep`.",
        ),
    ] = None,
    testee: Annotated[
        list[str] | None,
        typer.Option(
            help="Run these two: reference, vllm, sglang, megatron, or NAME=COMMAND for your own. Beside two dumps:"
            " where those tell no cause, on the first sample that differs."
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Of the testees: a DeepSeek-V3 checkpoint folder.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Of the testees; without, some tokens of English.")] = None,
    case: Annotated[str | None, typer.Option(help="A case of the suite in the place of a prompt.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep what the testees wrote in this new folder.")] = None,
    environments: Annotated[Path, typer.Option(help="Folder with an environment NAME for each testee.")] = Path(
        ".envs"
    ),
    device: Annotated[
        Device, typer.Option(help="Where testees run, or where both sides computed log-probabilities.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where two programs first part that should print the same log-probabilities: inputs, weights, the formula,
    or which layer and operation. Exit with status 0 if nothing differs, 1 if something does, 2 if nothing can be
    compared.
    """
    if not testee and (sides is None or len(sides) != 2):
        raise DiffError("two sides are compared: A and B, or --testee A --testee B --checkpoint DIR")
    if testee and checkpoint is None:
        raise DiffError("--testee A --testee B needs --checkpoint")
    if sides and (len(sides) != 2 or prompt is not None or case is not None):
        raise DiffError("two sides are compared, A and B; --prompt and --case are for testees alone")
    if prompt is not None and case is not None:
        raise DiffError("--prompt or --case, not both")
    if keep is not None and keep.exists():
        raise DiffError(f"{keep}: exists already and is not overwritten")
    commands = [TesteeCommand.parse(text, environments) for text in testee or ()]
    progress = Console(stderr=True)

    def tell(name: str, what: str) -> None:
        progress.print(f"{name}: {what}", highlight=False)

    if sides:
        left, right = map(read_side, sides)
        diff = compare(left, right, device)
        if checkpoint is not None and commands:
            diff = explain(diff, (left, right), commands, checkpoint, tell, device=device, keep=keep)
    else:
        assert checkpoint is not None
        diff = diff_testees(commands, checkpoint, make_case(checkpoint, prompt, case), tell, device=device, keep=keep)
    if as_json:
        print(json.dumps(diff.record(), indent=1))
    else:
        print_diff(diff, Console())
    raise typer.Exit(0 if diff.equal else 1)
