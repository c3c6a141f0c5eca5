"""`dsv3 convert`: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeElapsedColumn

from dsv3_plugin.checkpoint import writer
from dsv3_plugin.checkpoint.cli import note_leftovers
from dsv3_plugin.megatron_backend import compat

app = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron (needs Megatron-Core).", no_args_is_help=True
)

Destination = Annotated[Path, typer.Argument(help="The folder to make; it must not exist or be empty.")]


@app.command()
def to_megatron(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint.")],
    destination: Destination,
    dequantize: Annotated[
        bool, typer.Option(help="Make a bf16 model of an fp8 one; released ones have scales that need it.")
    ] = False,
) -> None:
    """Write Megatron's distributed checkpoint, for --load and any parallel layout."""
    note_leftovers(destination)
    with _running() as (convert, progress):
        remarks = convert.to_megatron(source, destination, dequantize=dequantize, progress=progress)
    for remark in remarks:
        typer.echo(f"note: {remark}")
    typer.echo(f"{destination}: load it with --load {destination}")


@app.command()
def to_hf(
    source: Annotated[Path, typer.Argument(help="A folder that Megatron saved to, or one iteration in it.")],
    destination: Destination,
    like: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder with config.json and tokenizer, if SOURCE has none.")
    ] = None,
    max_shard_size: Annotated[float, typer.Option(help="The largest file, in GB.")] = writer.DEFAULT_SHARD_BYTES / 1e9,
) -> None:
    """Write a Hugging Face checkpoint, in the dtype that config.json says; the optimizer's state is left out."""
    note_leftovers(destination)
    shard_bytes = writer.whole_bytes(max_shard_size)
    with _running() as (convert, progress):
        reader = convert.to_hugging_face(source, destination, like=like, max_shard_bytes=shard_bytes, progress=progress)
    typer.echo(f"{destination}: {reader.profile()}, {len(reader.files())} files")


@contextmanager
def _running() -> Iterator[tuple[ModuleType, writer.Progress]]:
    """The functions that convert, and a bar. Raises `EngineError` where there is no Megatron-Core.

    Warnings are held back: Megatron misses GPU libraries that nothing here uses, torch deprecates what it calls, and
    logs the traceback of what it then raises.
    """
    compat.megatron_version()
    logging.disable(logging.WARNING)
    columns = *Progress.get_default_columns()[:2], DownloadColumn(), TimeElapsedColumn()
    with warnings.catch_warnings(), Progress(*columns, console=Console(stderr=True)) as bar:
        warnings.simplefilter("ignore")
        task = bar.add_task("weights")
        convert = import_module("dsv3_plugin.megatron_backend.convert")
        yield convert, lambda done, total: bar.update(task, completed=done, total=total)
