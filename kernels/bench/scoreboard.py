"""The scoreboard's records, and the table and the plot that are made of them.

A record is one contender of one case: this package's kernel ("ours"), what a model runs where that may be another
provider's ("served"), a peer, a peer's batch-invariant mode, or a plain copy of as many bytes as the case moves. The
file is JSON; nothing in table or plot is typed by hand.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from dsv3_plugin.errors import KernelError

Role = Literal["ours", "served", "peer", "invariant", "copy"]


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
    """The records of one run, or of several that measured other groups."""

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
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise KernelError(f"{path} is no scoreboard: {where}: {first['msg']}") from error


_LEGEND = (
    "Made by `dsv3 bench report`; [bench.py](bench.py) says what is measured, [measure.py](measure.py) how.",
    "Times are microseconds, median (10th to 90th percentile).",
    "",
    "* floor: what an H200's memory and tensor cores allow.",
    "* served: what a model runs with the providers of this run, ours or another's of equal bits (`selection`).",
    "* best peer: the fastest of the public kernels that were installed, batch-invariant modes left out.",
    "* bits: outputs of ours that changed with the batch (1 to 4096 rows, shuffled, other mates), of those compared.",
    "* workspace: the most memory that a call of ours holds besides its inputs and results.",
    "* n bits: outputs of a peer that are not ours, bit for bit.",
    "* invariant modes: what a peer does where it promises the same; beside sums in slices, what a model runs without.",
    "* copy: a plain copy of as many bytes as the case has to move.",
)

HEADER = (
    "| case | floor | ours | ours / floor | ours / best peer | served | served / best peer | bits | workspace | peers"
    " | invariant modes | copy |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


TITLES = {
    "attention": "Attention: B requests of S cached tokens, h heads, s_q new tokens each",
    "prompts": "Attention by heads: B prompts, of each the last s_q of S tokens",
    "moe": "Routed experts of a layer, T tokens",
    "dense": "fp8 projections: tokens x columns x depth",
    "small": "Norm, SwiGLU, quantization, router and moves of rows",
    "bf16": "bf16 products: tokens x columns x depth",
    "sliced": "Products whose sums are in slices: tokens x columns x depth",
    "grouped": "fp8 products of experts: experts x columns x depth",
}


def markdown(board: Scoreboard) -> str:
    """The scoreboard as a page: a table for each group."""
    versions = ", ".join(f"{name} {version}" for name, version in board.versions.items())
    lines = [
        "# Scoreboard",
        "",
        f"Each table is one run on one {board.card}: {versions}.",
        "",
        *_LEGEND,
        "",
        "![times beside the fastest public kernel's](scoreboard.svg)",
    ]
    for group, records in groupby(board.records, key=lambda record: record.group):
        lines += ["", f"## {TITLES.get(group, group)}", "", *HEADER]
        lines += [row(list(case)) for _, case in groupby(records, key=lambda record: record.case)]
    return "\n".join(lines) + "\n"


def row(records: list[Record]) -> str:
    """The table's row of one case."""
    ours = next(record for record in records if record.role == "ours")
    others = [record for record in records if record is not ours]
    best = _fastest(records, "peer")
    model = served(records)
    cells = [ours.case, f"{ours.floor_us:.1f}", _time(ours), _ratio(ours.median_us, ours.floor_us)]
    cells += [_ratio(ours.median_us, best), "ours" if model is ours else _time(model), _ratio(model.median_us, best)]
    cells.append("-" if ours.rows_compared is None else f"{ours.rows_differ} of {_short(ours.rows_compared)}")
    cells.append("-" if ours.workspace_bytes is None else f"{_short(ours.workspace_bytes)}B")
    for role in ("peer", "invariant"):
        cells.append("; ".join(_contender(record) for record in others if record.role == role) or "-")
    cells.append(next((_time(record) for record in others if record.role == "copy"), "-"))
    return f"| {' | '.join(cells)} |"


def served(records: list[Record]) -> Record:
    """What a model runs, of one case's records: ours where no other kernel may serve."""
    ours = next(record for record in records if record.role == "ours")
    return next((record for record in records if record.role == "served"), ours)


def _ratio(time: float | None, other: float | None) -> str:
    return f"{time / other:.2f}" if time and other else "-"


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


# The plot's ends: how many times faster and slower than the fastest public kernel.
_FROM, _TO = 0.05, 10.0


def plot(board: Scoreboard, path: Path) -> None:
    """Draw what a model runs beside the fastest public kernel, a line a case. Raises `KernelError` where matplotlib is
    missing.
    """
    try:
        import matplotlib  # type: ignore[import-not-found]
        from matplotlib import pyplot  # type: ignore[import-not-found]
    except ImportError as error:
        raise KernelError("the plot needs matplotlib: pip install 'dsv3-plugin[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scoreboard"
    lines = _lines(board)
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.22 * len(lines)), layout="constrained")
    axes.axvline(1, color="#c64600", linewidth=1.5, label="the fastest public kernel")
    for mark, colour, label, value in (
        ("o", "#1a5fb4", "what a model runs here: bits that no batch changes", lambda line: line.model),
        ("s", "#613583", "fastest public kernel that promises such bits", lambda line: line.invariant),
        ("|", "black", "floor: what the card allows", lambda line: line.floor),
    ):
        points = [(value(line), -at) for at, line in enumerate(lines) if value(line) is not None]
        seen = [(x, y) for x, y in points if _FROM <= x <= _TO]
        axes.scatter([x for x, _ in seen], [y for _, y in seen], marker=mark, color=colour, label=label, s=32, zorder=3)
        for x, y in points:
            if x > _TO:  # too far to the right: a number at the edge
                text = f"{x:.0f} \u2192"
                axes.annotate(text, (_TO, y), fontsize=7, color=colour, ha="right", va="center")
    for at, line in enumerate(lines):
        if line.model is not None:
            axes.plot([1, min(line.model, _TO)], [-at, -at], color="#1a5fb4", linewidth=1, alpha=0.5, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(_FROM, _TO)
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time / time of the fastest public kernel (left of 1: faster)")
    axes.set_yticks([-at for at in range(len(lines))], [line.name for line in lines], fontsize=7)
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line.is_title else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(lines) + 0.5, 0.7)
    axes.grid(True, axis="x", linewidth=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"What a model runs beside the fastest public kernels, on one {board.card}", fontsize=10)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


class _Line(NamedTuple):
    """A line of the plot: a group's title, or a case's times over the fastest peer's."""

    name: str
    is_title: bool = False
    model: float | None = None
    invariant: float | None = None
    floor: float | None = None


def _lines(board: Scoreboard) -> list[_Line]:
    """Cases without a peer's time have no line."""
    lines: list[_Line] = []
    for group, in_group in groupby(board.records, key=lambda record: record.group):
        found = []
        for name, of_case in groupby(in_group, key=lambda record: record.case):
            records = list(of_case)
            best, model, invariant = _fastest(records, "peer"), served(records), _fastest(records, "invariant")
            if best and model.median_us:
                times = model.median_us / best, invariant and invariant / best, model.floor_us / best
                found.append(_Line(name, False, *times))
        if found:
            lines += [_Line(TITLES.get(group, group), is_title=True), *found]
    return lines


def _fastest(records: list[Record], role: Role) -> float | None:
    return min((r.median_us for r in records if r.role == role and r.median_us), default=None)
