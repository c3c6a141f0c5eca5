"""`dsv3 bench train`: steps of this package's trainer beside Megatron's own TransformerEngine layers, on one card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.errors import EngineError
from dsv3_plugin.train_bench import plan, report, runner
from dsv3_plugin.train_bench.board import Board

_DEVICE: Device = "cuda" if torch.cuda.is_available() else "cpu"
JSON, MARKDOWN = "train.json", "train.md"


def bench_train(
    out: Annotated[Path, typer.Option(help="The run's folder. A run that ended early goes on there.")],
    model: Annotated[
        str,
        typer.Argument(
            help=f"{plan.TWO_LAYERS} (DeepSeek-V3's widths: a dense layer, one with experts, MTP), a preset, or a"
            " config.json."
        ),
    ] = plan.TWO_LAYERS,
    contender: Annotated[
        list[str] | None,
        typer.Option(help=f"Who trains: {', '.join(c.name for c in plan.CONTENDERS)}. Repeat it; all by default."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Of each layer; by default as many as the card has room for.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Of a step: one sequence.")] = 4096,
    steps: Annotated[int, typer.Option(min=2, help="Whose times and losses are compared.")] = 200,
    profiled: Annotated[int, typer.Option(min=1, help="Further steps, whose parts are timed.")] = 5,
    learning_rate: Annotated[float, typer.Option("--lr", help="Reached after a tenth of the steps.")] = 2e-5,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Seconds that a contender may take.")] = 900,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="WHO:NAME=VALUE, a variable (in capitals) or one of Megatron's settings. Repeat it."
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Without a GPU it is a rehearsal.")] = _DEVICE,
    environments: Annotated[Path, typer.Option(help="Folder with an environment `megatron`.")] = Path(".envs"),
) -> None:
    """Time, parts, memory and losses of training steps: this package's layers, and Megatron's own in FP8 and bf16.

    Each contender is a process of its own and begins with the same weights. The report stands in the folder
    (train.json, .md) after every contender; exit status 1 where one of this package's did not make all steps, and where
    nobody did.
    """
    config = plan.read_model(model, experts)
    if experts is None and device == "cuda":
        if not torch.cuda.is_available():
            raise EngineError(
                f"--device cuda: torch {torch.__version__} of this environment finds no card to ask how many experts"
                " it has room for; name --experts"
            )
        config["n_routed_experts"] = plan.fitting_experts(config, tokens, torch.cuda.mem_get_info()[1])
    console = Console()

    def write(board: Board) -> None:
        (out / JSON).write_text(board.model_dump_json(indent=1) + "\n")
        (out / MARKDOWN).write_text(report.markdown(board))

    bench = runner.prepare(
        out,
        model=model,
        config=config,
        device=device,
        sequence=tokens,
        steps=steps,
        profiled=profiled,
        learning_rate=learning_rate,
        seed=seed,
        contenders=plan.contenders(contender or (), setting or ()),
        environments=environments,
        limit=limit,
        progress=lambda name, what: console.print(f"{name}: {what}", highlight=False, markup=False, soft_wrap=True),
        changed=write,
    )
    board = bench.run()
    console.print(*(table.drawn() for table in report.tables(board)), sep="\n\n")
    for remark in report.remarks(board):
        console.print(f"* {remark}", highlight=False, markup=False, soft_wrap=True)
    failed = [record for record in board.records if record.end is None]
    of_ours = any(record.job.layers == "ours" for record in failed)
    raise typer.Exit(1 if of_ours or len(failed) == len(board.records) else 0)
