"""`dsv3 bench layouts`: what it costs to share a model among ranks.

The model alone, without an engine: each rank is a process that computes the same passes, first alone on its own device
with the whole model, then with its part. So a ratio compares one device with as many as the layout has, and whether the
bits are equal is seen beside it. With fewer cards than ranks, ranks share the cards that there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import distributed as dist

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands import sums
from dsv3_plugin.conformance.layouts import ParallelLayout, RankOf
from dsv3_plugin.conformance.process_groups import join
from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.conformance.testees.ranks import start_ranks, wait_for_ranks
from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layout import WHOLE, Layout

_WARM_UP = 2
_DEVICE: Device = "cuda" if torch.cuda.is_available() else "cpu"


class _Row(TypedDict):
    """Passes of one number of tokens, in milliseconds."""

    tokens: int
    alone: list[float]
    shared: list[float]
    equal: bool
    """Whether both gave the same bits."""


class _Measured(TypedDict):
    """By one rank."""

    rows: list[_Row]
    sums: list[sums.Sums]
    """None without tensor parallelism."""


def bench_layouts(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder; one rank must hold all of it, too.")],
    layout: Annotated[list[str], typer.Option(help="tp=2, dp=2,ep=2, tp=2,dp=2,ep=4. Repeat it.")],
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a pass on each rank. Repeat it.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Passes of each kind; medians are shown.")] = 21,
    device: Annotated[Device, typer.Option(help="Where the ranks are.")] = _DEVICE,
) -> None:
    """Passes of a model shared by ranks of this machine against one rank, and whether their bits are equal."""
    layouts = [ParallelLayout.parse(text) for text in layout]
    if device == "cuda" and not torch.cuda.is_available():
        raise ConformanceError(f"--device cuda: torch {torch.__version__} of this environment finds no card")
    reader = CheckpointReader(checkpoint)
    profile, longest = reader.profile(), reader.config.max_position_embeddings
    if beyond := [count for count in tokens or () if count > longest]:
        raise ConformanceError(f"--tokens {beyond[0]:,}: the model knows {longest:,} positions")
    for each in layouts:
        each.require_possible(reader.config, profile)
        if each.ranks == 1:
            raise ConformanceError(f"--layout {each}: is what every layout is compared with; name tp, dp and ep")
        if each.pp > 1:
            raise ConformanceError(f"--layout {each}: stages only hand on activations; name tp, dp and ep")
    table = Table(title=f"{checkpoint} ({profile}), {repeats} passes, median ms (quartiles)", title_justify="left")
    for column in ("layout", "tokens a rank", "one rank", "shared", "ratio", "bits"):
        table.add_column(column, justify="right")
    equal, tables = True, [table]
    for each in layouts:
        of_ranks = _measured(each, checkpoint, tokens or [1, 32, 128, 1024], repeats, device)
        if of_ranks[0]["sums"]:
            tables.append(sums.table(str(each), [rank["sums"] for rank in of_ranks]))
        for row in _slowest(of_ranks):
            equal &= row["equal"]
            ratio = statistics.median(row["shared"]) / statistics.median(row["alone"])
            times = _summary(row["alone"]), _summary(row["shared"])
            bits = "[green]equal[/]" if row["equal"] else "[red]differ[/]"
            table.add_row(str(each), f"{row['tokens']:,}", *times, f"{ratio:.2f}", bits)
    Console().print(*tables, sep="\n\n")
    raise typer.Exit(0 if equal else 1)


def _summary(times: list[float]) -> str:
    low, median, high = statistics.quantiles(times, n=4)
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def _measured(
    layout: ParallelLayout, checkpoint: Path, tokens: Sequence[int], repeats: int, device: str
) -> list[_Measured]:
    """By each rank."""
    with tempfile.TemporaryDirectory(prefix="dsv3-layouts-") as folder:
        options = "--tokens", ",".join(map(str, tokens)), "--repeats", str(repeats), "--device", device
        command = sys.executable, "-m", "dsv3_plugin.commands.layouts", *options, str(checkpoint)
        places = [Path(folder) / f"rank-{rank}" for rank in range(layout.ranks)]
        if status := wait_for_ranks(start_ranks(command, layout, [[str(place)] for place in places])):
            sys.exit(status)
        return [json.loads(place.read_text()) for place in places]


def _slowest(of_ranks: Sequence[_Measured]) -> list[_Row]:
    """A row for each number of tokens, of the slowest rank."""
    rows = []
    for of_rank in zip(*(rank["rows"] for rank in of_ranks), strict=True):
        slowest = max(of_rank, key=lambda row: statistics.median(row["shared"]))
        slowest["equal"] = all(row["equal"] for row in of_rank)
        rows.append(slowest)
    return rows


class _Rank:
    """One process."""

    def __init__(self, place: RankOf, checkpoint: Path, device: str) -> None:
        self.device, self.layout = join(place, device)
        self.reader = CheckpointReader(checkpoint)
        self.seed = place.dp_rank

    def load(self, layout: Layout) -> DeepseekV3:
        """The model, or this rank's part of it."""
        ops = bind_ops(self.reader.config, self.reader.profile(), self.device, layout=layout)
        return load_model(self.reader, ops, layout)

    def measure(self, tokens: Sequence[int], repeats: int) -> _Measured:
        """A row for each number of tokens, and sums."""
        passes: dict[str, list[tuple[list[float], torch.Tensor]]] = {}
        for name, layout in ("alone", WHOLE), ("shared", self.layout):
            model = self.load(layout)
            passes[name] = [self._pass(model, count, repeats) for count in tokens]
            del model
        rows = [
            _Row(
                tokens=count,
                alone=alone,
                shared=shared,
                equal=torch.equal(one.view(torch.int32), other.view(torch.int32)),
            )
            for count, (alone, one), (shared, other) in zip(tokens, passes["alone"], passes["shared"], strict=True)
        ]
        tensor = self.layout.tensor
        return _Measured(rows=rows, sums=sums.measure(tensor, self.device, repeats) if tensor.size > 1 else [])

    @torch.inference_mode()
    def _pass(self, model: DeepseekV3, count: int, repeats: int) -> tuple[list[float], torch.Tensor]:
        """Milliseconds of a pass over one sequence, and its logits."""
        drawn = torch.Generator().manual_seed(self.seed)
        token_ids = torch.randint(self.reader.config.vocab_size, (count,), generator=drawn).to(self.device)
        positions = torch.arange(count, device=self.device)
        self.layout.begin_pass(count)
        attend = WholeSequences(model.ops, self.reader.config)
        logits = model.lm_head(model(token_ids, positions, attend))
        return self._times(lambda: model.lm_head(model(token_ids, positions, attend)), repeats), logits

    def _times(self, run: Callable[[], object], repeats: int) -> list[float]:
        times = []
        for measured in range(-_WARM_UP, repeats):
            dist.barrier()
            self._synchronize()
            start = time.perf_counter()
            run()
            self._synchronize()
            if measured >= 0:
                times.append((time.perf_counter() - start) * 1e3)
        return times

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """One rank of `_measured`."""
    parser = argparse.ArgumentParser()
    for name in ("--tokens", "--device", "--layout", "--ports"):
        parser.add_argument(name, required=True)
    for name in ("--repeats", "--rank"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    place = RankOf.parse(options.layout, options.rank, options.ports)
    rank = _Rank(place, options.checkpoint, options.device)
    measured = rank.measure([int(count) for count in options.tokens.split(",")], options.repeats)
    options.out.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
