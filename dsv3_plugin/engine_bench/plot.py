"""A board as a plot: a line a measurement, each contender's time beside the engine's own model's."""

from __future__ import annotations

from pathlib import Path

from dsv3_plugin.engine_bench import judge
from dsv3_plugin.engine_bench.judge import Board
from dsv3_plugin.errors import EngineError

_MARKS = {
    "strict": ("o", "#1a5fb4"),
    "fast": ("^", "#26a269"),
    "two-form": ("D", "#e5a50a"),
    "invariant": ("s", "#613583"),
    "stock": ("|", "black"),
}
_FROM, _TO = 0.2, 5.0


def lines(board: Board) -> list[tuple[str, dict[str, float]]]:
    """For each engine and measurement the time of each way over the fastest stock's; rows that mean nothing have none,
    and no line stands without a stock's time.
    """
    found = []
    for engine in dict.fromkeys(record.engine for record in board.records):
        records = [record for record in board.records if record.engine == engine]
        for measurement in board.measurements:
            ratios = {
                record.way: 1 / against.ratio
                for record in records
                if (against := judge.against(board, record, measurement, "stock")) is not None
            }
            if ratios:
                found.append((f"{engine}: {measurement}", ratios))
    return found


def draw(board: Board, path: Path) -> None:
    """Write an SVG or PNG. Raises `EngineError` where matplotlib is missing, or there is nothing to compare."""
    try:
        import matplotlib  # type: ignore[import-not-found]
        from matplotlib import pyplot  # type: ignore[import-not-found]
    except ImportError as error:
        raise EngineError("the plot needs matplotlib: pip install 'dsv3-plugin[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "engines"
    drawn = lines(board)
    if not drawn:
        raise EngineError("the plot needs rows of an engine's own model that mean something, and there are none")
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.22 * len(drawn)), layout="constrained")
    axes.axvline(1, color="#c64600", linewidth=1.5, label="the engine's own model")
    roles = {record.way: record.role for record in board.records}
    for way, role in roles.items():
        mark, colour = _MARKS[role]
        points = [(ratios[way], -at) for at, (_, ratios) in enumerate(drawn) if way in ratios]
        if not points:
            continue
        seen = [(min(max(x, _FROM), _TO), y) for x, y in points]
        axes.scatter([x for x, _ in seen], [y for _, y in seen], marker=mark, color=colour, label=way, s=32, zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(_FROM, _TO)
    ticks = (0.2, 0.5, 1, 2, 5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time / time of the engine's own model (left of 1: faster)")
    axes.set_yticks([-at for at in range(len(drawn))], [name for name, _ in drawn], fontsize=7)
    axes.set_ylim(-len(drawn) + 0.5, 0.7)
    axes.grid(True, axis="x", linewidth=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    title = f"Engines on one {board.device}" if board.layout == "one" else f"Engines, {board.layout}, {board.device}"
    figure.suptitle(f"{title}: a rehearsal, times mean nothing" if board.rehearsal else title, fontsize=10)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
