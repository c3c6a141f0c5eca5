"""`dsv3 bench`: what exactness costs, beside what it replaces, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from dsv3_plugin.commands.engines import bench_engines
from dsv3_plugin.commands.layouts import bench_layouts
from dsv3_plugin.commands.train import bench_train
from dsv3_plugin.errors import KernelError
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.tile import pin_one_thread

app = typer.Typer(help="Measure what exactness costs.", no_args_is_help=True)
app.command("layouts")(bench_layouts)
app.command("engines")(bench_engines)
app.command("train")(bench_train)

# Rows, input features, output features: a batch of decodes, a prefill, a single token.
_SHAPES = ((64, 2048, 2048), (1, 2048, 2048), (300, 2048, 2048), (64, 7168, 2112))


@app.command("linear")
def bench_linear(
    repeats: Annotated[int, typer.Option(min=3, help="Measurements of each; medians are shown.")] = 31,
) -> None:
    """The CPU's fixed-tile linear against `F.linear`, on one thread."""
    pin_one_thread()
    table = Table(title=f"torch {torch.__version__}, one thread, {repeats} repeats, median ms (quartiles)")
    for column in ("rows x K x N", "dtype", "F.linear", "dsv3 linear", "ratio"):
        table.add_column(column, justify="right")
    for rows, k, n in _SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(rows, k, generator=generator).to(dtype)
            weight = torch.randn(n, k, generator=generator).to(dtype)
            theirs, ours = interleaved(lambda: F.linear(x, weight), lambda: linear(x, weight), repeats)  # noqa: B023
            ratio = statistics.median(ours) / statistics.median(theirs)
            table.add_row(
                f"{rows} x {k} x {n}",
                str(dtype).removeprefix("torch."),
                _summary(theirs),
                _summary(ours),
                f"{ratio:.2f}",
            )
    Console().print(table)


@app.command("kernels")
def bench_kernels(
    only: Annotated[list[str] | None, typer.Option(help="Groups of the scoreboard; all by default. Repeat it.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the measurements to this file, for `report`.")] = None,
    rows: Annotated[bool, typer.Option(help="Also compare our rows' bits over batches.")] = True,
) -> None:
    """This package's GPU kernels against the best public ones, on this machine's card."""
    if not torch.cuda.is_available():
        raise KernelError("the kernels are for a Hopper GPU, and torch finds no CUDA device here")
    from dsv3_plugin.kernels.bench import bench

    bench.main(only, json, rows)


@app.command("report")
def report_kernels(
    measurements: Annotated[Path, typer.Argument(help="What `kernels --json` wrote.")],
    markdown: Annotated[Path | None, typer.Option(help="Write tables; printed if not given.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a plot (.svg or .png); needs matplotlib.")] = None,
    force: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Tables and a plot of what `kernels` measured."""
    from dsv3_plugin.kernels.bench import scoreboard

    if plot and plot.suffix not in (".svg", ".png"):
        raise KernelError(f"--plot {plot}: name a file that ends in .svg or .png")
    for path in (markdown, plot):
        if path and path.exists() and not force:
            raise KernelError(f"{path} exists; name another file, or replace it with --force")
    board = scoreboard.read(measurements)
    if markdown:
        markdown.write_text(scoreboard.markdown(board))
    elif not plot:
        print(scoreboard.markdown(board), end="")
    if plot:
        scoreboard.plot(board, plot)


def interleaved(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `a` and of `b`, measured in turn so that both see the same noise."""
    times: tuple[list[float], list[float]] = ([], [])
    for measured in range(-2, repeats):
        for function, record in zip((a, b), times, strict=True):
            start = time.perf_counter()
            function()
            if measured >= 0:
                record.append((time.perf_counter() - start) * 1e3)
    return times


def _summary(times: list[float]) -> str:
    low, median, high = statistics.quantiles(times, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
