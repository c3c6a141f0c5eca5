"""The scoreboard's records, and the table and the plot that are made of them.

A record is one contender of one case: this package's kernel ("ours"), a peer, a peer's batch-invariant mode, or a plain
copy of as many bytes as the case moves. The file is JSON; nothing in table or plot is typed by hand.
"""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dsv3_plugin.errors import KernelError

Role = Literal["ours", "peer", "invariant", "copy"]


class Record(BaseModel):
    """One contender of one case."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    case: str
    floor_us: float
    """The time below which no kernel runs on an H200."""
    contender: str
    role: Role
    absent: str | None = None
    """Why there is no time."""
    median_us: float | None = None
    low_us: float | None = None
    """The 10th percentile."""
    high_us: float | None = None
    """The 90th percentile."""
    workspace_bytes: int | None = None
    differs: int | None = None
    """Outputs whose bits are not ours; None where results cannot be compared."""
    outputs: int | None = None
    rows_compared: int | None = None
    """Outputs that were computed in several batches; only ours."""
    rows_differ: int | None = None
    """Those of them whose bits depended on the batch."""


class Scoreboard(BaseModel):
    """All records of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    card: str
    versions: dict[str, str]
    records: tuple[Record, ...]


def read(path: Path) -> Scoreboard:
    """The scoreboard in a file. Raises `KernelError`."""
    try:
        return Scoreboard.model_validate_json(path.read_text())
    except OSError as error:
        raise KernelError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise KernelError(f"{path} is no scoreboard: {error.errors()[0]['msg']}") from error


_LEGEND = (
    "Made by `dsv3 bench report`; [bench.py](bench.py) says what is measured, [measure.py](measure.py) how.",
    "Times are microseconds, median (10th to 90th percentile).",
    "",
    "* floor: what an H200's memory and tensor cores allow.",
    "* bits: outputs of ours that changed with the batch (1 to 4096 rows, shuffled, other mates), of those compared.",
    "* workspace: the most memory that a call of ours holds besides its inputs and results.",
    "* n bits: outputs of a peer that are not ours, bit for bit.",
    "* invariant modes: what a peer does where it promises the same.",
    "* copy: a plain copy of as many bytes as the case has to move.",
)

HEADER = (
    "| case | floor | ours | ours / floor | ours / best peer | bits | workspace | peers | invariant modes | copy |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def markdown(board: Scoreboard) -> str:
    """The scoreboard as a page: a table for each group."""
    lines = [
        "# Scoreboard",
        "",
        f"One run on one {board.card}: {', '.join(f'{name} {version}' for name, version in board.versions.items())}.",
        "",
        *_LEGEND,
        "",
        "![every contender's time over the floor](scoreboard.svg)",
    ]
    for group, records in groupby(board.records, key=lambda record: record.group):
        lines += ["", f"## {group}", "", *HEADER]
        lines += [row(list(case)) for _, case in groupby(records, key=lambda record: record.case)]
    return "\n".join(lines) + "\n"


def row(records: list[Record]) -> str:
    """The table's row of one case."""
    ours = next(record for record in records if record.role == "ours")
    others = [record for record in records if record is not ours]
    best = min((r.median_us for r in others if r.role == "peer" and r.median_us), default=None)
    cells = [ours.case, f"{ours.floor_us:.1f}", _time(ours)]
    cells.append(f"{ours.median_us / ours.floor_us:.2f}" if ours.median_us else "-")
    cells.append(f"{ours.median_us / best:.2f}" if ours.median_us and best else "-")
    cells.append("-" if ours.rows_compared is None else f"{ours.rows_differ} of {_short(ours.rows_compared)}")
    cells.append("-" if ours.workspace_bytes is None else f"{_short(ours.workspace_bytes)}B")
    for role in ("peer", "invariant"):
        cells.append("; ".join(_contender(record) for record in others if record.role == role) or "-")
    cells.append(next((_time(record) for record in others if record.role == "copy"), "-"))
    return f"| {' | '.join(cells)} |"


def _time(record: Record) -> str:
    if record.median_us is None:
        return f"absent ({record.absent})"
    return f"{record.median_us:.1f} ({record.low_us:.1f}-{record.high_us:.1f})"


def _contender(record: Record) -> str:
    differs = f", {record.differs} bits" if record.differs is not None and record.median_us is not None else ""
    return f"{record.contender} {_time(record)}{differs}"


def _short(number: int) -> str:
    """1234567 as 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} "


_MARKS: dict[Role, tuple[str, str, str]] = {
    "ours": ("o", "#1a5fb4", "ours"),
    "peer": ("D", "#c64600", "peer"),
    "invariant": ("s", "#613583", "peer, batch-invariant"),
    "copy": ("|", "#5e5c64", "copy of the bytes"),
}


def plot(board: Scoreboard, path: Path) -> None:
    """Draw every contender's time over the floor, a line a case. Raises `KernelError` where matplotlib is missing."""
    try:
        import matplotlib  # type: ignore[import-not-found]
        from matplotlib import pyplot  # type: ignore[import-not-found]
    except ImportError as error:
        raise KernelError("the plot needs matplotlib: pip install 'dsv3-plugin[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scoreboard"
    timed = [record for record in board.records if record.median_us is not None]
    cases = list(dict.fromkeys((record.group, record.case) for record in timed))
    line = {case: -index for index, case in enumerate(cases)}
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.21 * len(cases)), layout="constrained")
    for role, (mark, colour, label) in _MARKS.items():
        points = [record for record in timed if record.role == role]
        axes.scatter(
            [(record.median_us or math.nan) / record.floor_us for record in points],
            [line[record.group, record.case] for record in points],
            marker=mark,
            color=colour,
            label=label,
            s=28 if role != "copy" else 60,
            facecolors=colour if role in ("ours", "copy") else "none",
            zorder=3 if role == "ours" else 2,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time / floor")
    axes.set_yticks(list(line.values()), [case for _, case in cases], fontsize=7)
    axes.set_ylim(min(line.values(), default=0) - 1, 1)
    axes.grid(True, which="both", axis="x", linewidth=0.3)
    axes.grid(True, axis="y", linewidth=0.3)
    for index, (group, case) in enumerate(cases):
        if index and cases[index - 1][0] != group:
            axes.axhline(line[group, case] + 0.5, color="black", linewidth=0.5)
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title(board.card, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
