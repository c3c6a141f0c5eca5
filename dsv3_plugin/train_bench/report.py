"""A board as tables, for a page of Markdown and for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as Drawn

from dsv3_plugin.train_bench.board import WINDOWS, Board, Record, relative_losses
from dsv3_plugin.train_bench.stopwatch import REST

_REHEARSAL = (
    "**A rehearsal on a machine without GPU: the numbers show that the measurement runs, and nothing about speed.**"
)
_LEGEND = (
    "* strict, fast, bf16: this package's layers. te, te-plain: Megatron's own layers of TransformerEngine in FP8, with"
    " its fused operations and without; te-bf16 in bf16.",
    "* Every contender is a process of its own with the same weights, tokens and recipe. A step is one sequence:"
    " forward, backward and optimizer. x te: beside the faster one of te and te-plain; above 1 is faster.",
    "* Parts: a module's own time on the device. routing: router, dispatch and combine. experts, backward: without"
    " wgrad where that has a line of its own; what quantizes gradients is in wgrad for ours, in backward for theirs."
    " rest: norms, residuals, embedding, losses, gradients into their buffers.",
    f"* Losses are compared by means over {WINDOWS} parts of the steps, without the first. No token is seen twice. The"
    " first step's gradients are of the same weights: a norm that is far from the others is of another function.",
)


@dataclass(frozen=True)
class Table:
    """Rows under a title, of which the first column names them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> list[str]:
        """Its lines."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return [f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]

    def drawn(self) -> Drawn:
        """For a terminal."""
        table = Drawn(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(board: Board) -> list[Table]:
    """What was measured."""
    trained = [record for record in board.records if record.steps]
    found = [_speed(board, trained), _parts(trained), _losses(board, trained)]
    return [table for table in found if table.rows]


def markdown(board: Board) -> str:
    """The whole page."""
    lines = ["# Training", ""]
    if board.rehearsal:
        lines += [_REHEARSAL, ""]
    devices = sorted({record.start.device for record in board.records if record.start is not None})
    lines += [f"{board.date}, {', '.join(devices) or 'no device'}. {board.model}.", ""]
    lines += [f"{board.steps} steps of {board.tokens:,} tokens.", "", *_LEGEND, ""]
    for table in tables(board):
        lines += table.markdown()
    lines += _list("What trained", [f"{record.name}: {_start(record)}" for record in board.records if record.start])
    lines += _list("To be known", remarks(board))
    return "\n".join(lines).rstrip() + "\n"


def remarks(board: Board) -> list[str]:
    """Who is missing, and what makes a comparison mean less or more."""
    found = []
    for record in board.records:
        if record.failure or record.end is None:
            found.append(f"{record.name}: {len(record.steps)} steps: {record.failure or 'the run has not come to it'}")
    initial = {record.start.initial for record in board.records if record.start is not None}
    if len(initial) > 1:
        found.append("not all contenders began with the same weights: their losses are those of different runs")
    strict, fast = board.record("strict"), board.record("fast")
    if strict and fast:
        equal = sum(a == b for a, b in zip(strict.losses, fast.losses, strict=True))
        found.append(f"strict and fast: {equal} of {board.steps} losses are one number")
    return found


def _speed(board: Board, records: Iterable[Record]) -> Table:
    theirs = board.fastest_of_theirs()
    rows = []
    for record in records:
        median, low, high = record.step_seconds()
        ratio = theirs.step_seconds()[0] / median if theirs else None
        end = record.end
        rows.append(
            [
                record.name,
                f"{median * 1e3:,.1f} ({low * 1e3:,.1f}-{high * 1e3:,.1f})",
                f"{board.tokens / median:,.0f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{record.steps[0].seconds:.1f} s",
                _gib(end.held_bytes if end else None),
                _gib(end.peak_bytes if end else None),
            ]
        )
    return Table("Speed", ("", "ms a step", "tokens/s", "x te", "first step", "held", "peak"), rows)


def _parts(records: Iterable[Record]) -> Table:
    measured = [(record.name, record.end) for record in records if record.end is not None and record.end.parts]
    names = dict.fromkeys(part for _, end in measured for part in end.parts)
    rows = []
    for part in sorted(names, key=lambda name: (name == REST, list(names).index(name))):
        cells = [part]
        for _, end in measured:
            seconds, total = end.parts.get(part), end.profiled_seconds
            cells.append(f"{seconds * 1e3:,.1f} ({seconds / total:.0%})" if seconds is not None and total else "-")
        rows.append(cells)
    if rows:
        rows.append(["all", *(f"{(end.profiled_seconds or 0) * 1e3:,.1f}" for _, end in measured)])
    return Table("Parts of a step, ms (share)", ("", *(name for name, _ in measured)), rows)


def _losses(board: Board, records: Iterable[Record]) -> Table:
    others = [record for name in ("bf16", "te", "te-bf16") if (record := board.record(name)) is not None]
    rows = []
    for record in records:
        size = max(1, len(record.steps) // WINDOWS)
        first = record.steps[0]
        cells = [record.name, f"{first.gradient_norm:.4f}", f"{first.loss:.4f}"]
        cells.append(f"{statistics.fmean(record.losses[-size:]):.4f}")
        mtp = [step.mtp_loss for step in record.steps[-size:] if step.mtp_loss is not None]
        cells.append(f"{statistics.fmean(mtp):.4f}" if mtp else "-")
        for other in others:
            is_whole = len(record.steps) == board.steps and record is not other
            relative = relative_losses(record.losses, other.losses) if is_whole else []
            if not relative:
                cells.append("-")
                continue
            of_all = statistics.fmean(record.losses) / statistics.fmean(other.losses) - 1
            cells.append(f"{of_all:+.2%}, {relative[-1]:+.2%} ({max(relative, key=abs):+.2%})")
        rows.append(cells)
    compared = [f"over {other.name}: all, last part (furthest)" for other in others]
    return Table(
        "Loss, nats a token", ("", "first gradient norm", "first", "last part", "MTP, last part", *compared), rows
    )


def _start(record: Record) -> str:
    start = record.start
    assert start is not None
    versions = ", ".join(f"{name} {version}" for name, version in start.versions.items())
    given = ", ".join(f"{name}={value}" for name, value in record.job.variables.items())
    return f"{start.model}; {start.optimizer}; {versions}{'; ' if given else ''}{given}"


def _list(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"* {item}" for item in items), ""] if items else []


def _gib(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**30:.1f} GiB"
