"""`dsv3 checkpoint`: make a test checkpoint, or check any."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.names import SCALE_SUFFIX, copied_from
from dsv3_plugin.checkpoint.presets import PRESETS, read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.tokenizer import tokenizer_name
from dsv3_plugin.checkpoint.writer import DEFAULT_SHARD_BYTES, in_bytes, leftovers, whole_bytes

app = typer.Typer(help="Make test checkpoints and check any checkpoint.", no_args_is_help=True)


@app.command()
def make(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(PRESETS)}) or a config.json.")],
    directory: Annotated[Path, typer.Argument(help="The folder to make; it must not exist or be empty.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes on every machine.")],
    dtype: Annotated[CheckpointDtype | None, typer.Option(help="Default: what the configuration says.")] = None,
    max_shard_size: Annotated[float, typer.Option(help="The largest file, in GB.")] = DEFAULT_SHARD_BYTES / 1e9,
) -> None:
    """Write a checkpoint of random weights whose MTP layer guesses well."""
    note_leftovers(directory)
    shard_bytes = whole_bytes(max_shard_size)
    settings = read_config(config)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("weights")
        reader = make_checkpoint(
            settings,
            directory,
            seed,
            dtype=dtype,
            max_shard_bytes=shard_bytes,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print_summary(reader)
    typer.echo(f"tokenizer   {tokenizer_name(reader.config.vocab_size)}")


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    values: Annotated[bool, typer.Option("--values", help="Look at every number, too: NaN and infinities.")] = False,
) -> None:
    """Compare every tensor's name, shape and dtype with the configuration; of the weights only scales are read."""
    reader = CheckpointReader(directory)
    _print_summary(reader)
    if values:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("values")
            count = reader.check_values(lambda done, total: bar.update(task, completed=done, total=total))
        typer.echo(f"values      {count:,} numbers, all finite")
        for name in reader.copies_that_differ():
            typer.echo(f"note: {name} differs from {copied_from(name)}, which the MTP layer uses instead of it")


def _print_summary(reader: CheckpointReader) -> None:
    headers = reader.validate()
    files = reader.files()
    profile = reader.profile()
    scales = f", {profile.scale_format} scales" if profile.scale_format else ""
    typer.echo(f"checkpoint  {reader.path}")
    weights = [header.shape for name, header in headers.items() if not name.endswith(SCALE_SUFFIX)]
    typer.echo(f"parameters  {sum(map(math.prod, weights)):,} in {len(headers):,} tensors")
    typer.echo(f"profile     {profile.name}{scales}")
    typer.echo(f"files       {len(files)}, {in_bytes(sum(file.stat().st_size for file in files))}")


def note_leftovers(directory: Path) -> None:
    """Name what killed writers of a folder left beside it."""
    for folder in leftovers(directory):
        typer.echo(f"note: {folder} is left of a run that was killed; nothing needs it, delete it", err=True)
