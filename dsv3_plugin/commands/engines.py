"""`dsv3 bench engines`: engines with their own model and with ours, side by side on one card or over several."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.engine_bench import judge, plan, plot, report, runner
from dsv3_plugin.engine_bench.judge import Board
from dsv3_plugin.engine_bench.plan import Choice
from dsv3_plugin.errors import EngineError

_DEVICE: Device = "cuda" if torch.cuda.is_available() else "cpu"
JSON, MARKDOWN, PLOT = "engines.json", "engines.md", "engines.svg"


def bench_engines(
    checkpoint: Annotated[Path, typer.Argument(help="A DeepSeek-V3 checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="The run's folder. A run that ended early goes on there.")],
    contender: Annotated[
        list[str] | None,
        typer.Option(help=f"Who is measured: {', '.join(c.name for c in plan.CONTENDERS)}. Repeat it; all by default."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="tp=2, dp=2,ep=2, tp=8,ep=8: over ranks of this machine. A run has one.")
    ] = "one",
    only: Annotated[
        list[str] | None, typer.Option(help=f"What is measured: {', '.join(plan.GROUPS)}. Repeat it; all by default.")
    ] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(help="8x4096, or 8x4096/2048 in passes of 2048 tokens. Repeat it.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Requests that decode together. Repeat it.")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of their prompts. Repeat it.")] = None,
    drafts: Annotated[list[int] | None, typer.Option(min=1, help="Drafts a step, by MTP. Repeat it.")] = None,
    acceptance: Annotated[float, typer.Option(min=0, max=1, help="Part of forced drafts that is right.")] = (
        plan.ACCEPTANCE
    ),
    tokens: Annotated[int, typer.Option(min=1, help="No measurement of more tokens of prompts.")] = plan.MOST_TOKENS,
    steps: Annotated[int, typer.Option(min=4, help="Decode steps timed in each pass.")] = 64,
    passes: Annotated[int, typer.Option(min=1, help="Passes of each measurement.")] = 2,
    rounds: Annotated[
        int, typer.Option(min=1, help="Starts of each contender, all in turns: a host is not always equally fast.")
    ] = 1,
    limit: Annotated[int, typer.Option(min=1, help="Seconds that a contender may take, its start included.")] = 900,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the tokens that are forced.")] = 0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="WHO:NAME=VALUE, a variable (in capitals) or an argument of an engine. Repeat it."),
    ] = None,
    device: Annotated[Device, typer.Option(help="Without a GPU it is a rehearsal.")] = _DEVICE,
    environments: Annotated[Path, typer.Option(help="Folder with an environment NAME for each engine.")] = Path(
        ".envs"
    ),
) -> None:
    """Start-up, prefill, decode, drafts and memory of vLLM and SGLang: their own model, their invariant mode, and ours.

    Each contender has processes of its own, one a rank, and all print the same forced tokens. The report stands in the
    folder (engines.json, .md, .svg) after every row; exit status 1 where a row is an error of the measurement, and
    where there is none.
    """
    choice = Choice(
        only=only or plan.GROUPS,
        prefills=prefill or plan.PREFILLS,
        batches=batch or plan.BATCHES,
        contexts=context or plan.CONTEXTS,
        drafts=drafts or plan.DRAFTS,
        acceptance=acceptance,
        most_tokens=tokens,
    )
    console = Console()
    writing = threading.Lock()

    def write(board: Board) -> None:
        with writing:
            (out / JSON).write_text(board.model_dump_json(indent=1) + "\n")
            (out / MARKDOWN).write_text(report.markdown(board))

    bench = runner.prepare(
        out,
        checkpoint,
        device=device,
        layout=ParallelLayout.parse(layout),
        steps=steps,
        passes=passes,
        rounds=rounds,
        seed=seed,
        most_tokens=tokens,
        contenders=plan.contenders(contender or (), setting or ()),
        measurements=plan.measurements(choice),
        environments=environments,
        limit=limit,
        progress=lambda name, what: console.print(f"{name}: {what}", highlight=False, markup=False, soft_wrap=True),
        changed=write,
    )
    board = bench.run()
    print(report.markdown(board), end="")
    try:
        plot.draw(board, out / PLOT)
    except EngineError as error:
        console.print(f"no plot: {error}", highlight=False, markup=False)
    raise typer.Exit(1 if judge.errors(board) or not judge.measured(board) else 0)
