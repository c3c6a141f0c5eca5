"""A board as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsv3_plugin.conformance.layouts import ONE_RANK
from dsv3_plugin.engine_bench import judge, limits
from dsv3_plugin.engine_bench.judge import STALL, Board, Record
from dsv3_plugin.engine_bench.plan import OURS, Role
from dsv3_plugin.engine_bench.protocol import Measurement, Row

_REHEARSAL = (
    "**A rehearsal on a machine without GPU: the numbers show that the measurement runs, and nothing about speed.**"
)
_LEGEND = (
    "* Every contender has a process of its own for each rank, and prints the same forced tokens. A time is that of",
    "  the best pass, by the slowest rank. In rounds the contenders start in turns, and each has its best one.",
    "* x stock: beside the fastest contender of the engine's own model whose row means something; above 1 is faster.",
    "  x invariant: beside the engine's own batch-invariant mode.",
    "* experts: different experts that a step visited, a layer on average. needs: bytes that such a step has to read",
    "  at the least, both of all ranks. of the card: the least time that the card allows, over the time taken.",
    "* by bytes: what drafts would bring a card that did nothing but read what a step needs, at that acceptance.",
    "* first/best: the first pass over the best one, after which nothing is left to be compiled.",
    "* **error**: the row means nothing, for the reason that is given below, and no ratio is made of it.",
)


def markdown(board: Board) -> str:
    """The whole page."""
    lines = ["# Engines", ""]
    if board.rehearsal:
        lines += [_REHEARSAL, ""]
    model, card = board.model, limits.card_of(board.device)
    ranks = "" if board.spread == ONE_RANK else f", layout {board.layout} of {board.spread.ranks} ranks"
    lines += [
        f"{board.date}, {board.device}{ranks}, {model.name}: {model.layers} layers, {model.expert_layers} of them with"
        f" {model.experts} experts of {_bytes(model.expert_bytes)}; {model.profile}. {board.passes} passes of"
        f" {board.steps} decode steps.",
        f"A card reads {card.bandwidth / 1e12:.2f} TB/s by its maker's figure."
        if card
        else "What this device can do at the most is not known here, and not checked.",
        "",
        *_LEGEND,
        "",
        *_starts(board),
    ]
    for title, kind, drafts, make in (
        ("Prefill", "prefill", False, _prefill_row),
        ("Decode", "decode", False, _decode_row),
        ("Drafts", "decode", True, _draft_row),
    ):
        chosen = [m for m in board.measurements if m.kind == kind and bool(m.drafts) == drafts]
        lines += _section(board, title, chosen, make)
    lines += _list("Errors of the measurement", [f"{n}: {e}" for n, es in judge.errors(board).items() for e in es])
    lines += _list("Programs that failed", _failures(board))
    lines += _list(f"Waited for a compiler: first pass above {STALL} of the best", _stalls(board))
    lines += _list("Not measured", _absent(board))
    return "\n".join(lines) + "\n"


_Cells = dict[str, str]


def _section(
    board: Board, title: str, measurements: Sequence[Measurement], make: Callable[[Board, Record, Row], _Cells]
) -> list[str]:
    """A table with a line for each measurement and contender."""
    rows: list[_Cells] = []
    for measurement in measurements:
        for record in board.records:
            row = record.row(measurement)
            if row is not None and row.absent is None:
                wrong = bool(judge.flags(board, record, row))
                named = {"": str(measurement), "contender": record.name}
                rows.append(named | make(board, record, row) | ({"error": "**error**"} if wrong else {"error": ""}))
    return ["", f"## {title}", "", *_table(rows)] if rows else []


def _table(rows: Sequence[_Cells]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [
        _line(columns),
        _line(["---"] * len(columns)),
        *(_line([row.get(column, "") for column in columns]) for row in rows),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _starts(board: Board) -> list[str]:
    rows = []
    for record in board.records:
        start = record.start
        if start is None:
            continue
        cached = start.cache_bytes_per_token
        rows.append(
            {
                "contender": record.name,
                "served": start.served.rpartition(".")[2] if record.role not in OURS else start.served,
                "rounds": str(record.rounds),
                "imports": f"{start.import_seconds:.1f} s",
                "start-up": f"{start.up_seconds:.1f} s",
                "memory": _bytes(start.memory_bytes),
                "weights": _bytes(start.weight_bytes),
                "cache a token": "-" if cached is None else f"{cached:,.0f} B",
                "versions": ", ".join(f"{name} {version}" for name, version in start.versions.items()),
                "set": ", ".join(f"{name}={value}" for name, value in record.settings.items()),
            }
        )
    return ["## Start", "", *_table(rows)] if rows else []


def _prefill_row(board: Board, record: Record, row: Row) -> _Cells:
    mean, last = row.first_token_seconds
    tokens = row.measurement.requests * row.measurement.tokens
    cells = {"tokens/s": f"{tokens / last:,.0f}", "first token, mean": _seconds(mean), "last": _seconds(last)}
    return cells | _compared(board, record, row)


def _decode_row(board: Board, record: Record, row: Row) -> _Cells:
    median, low, high = row.step_ms
    read = limits.step_bytes(board.model, row, board.spread)
    experts = "-" if row.experts is None else f"{sum(row.experts) / max(1, len(row.experts)):.1f}"
    cells = {
        "ms a step": f"{median:.3g} ({low:.3g}-{high:.3g})",
        "tokens/s": f"{row.measurement.requests * (row.tokens_per_step or 1) / median * 1e3:,.0f}",
        "experts": experts,
        "needs": _bytes(read),
        "reads": "-" if read is None else f"{read / median / 1e9:.2f} TB/s",
    }
    return cells | _compared(board, record, row)


def _draft_row(board: Board, record: Record, row: Row) -> _Cells:
    faster, most = judge.speed_up(board, record, row), judge.speed_up_by_bytes(board, record, row)
    tokens = row.tokens_per_step or 1
    cells = _decode_row(board, record, row)
    return {
        "tokens a step": f"{tokens:.2f}",
        "accepted": f"{(tokens - 1) / row.measurement.drafts:.0%}",
        "x without drafts": "-" if faster is None else f"{faster:.2f}",
        "by bytes": "-" if most is None else f"{most:.2f}",
    } | cells


def _compared(board: Board, record: Record, row: Row) -> _Cells:
    part = judge.of_limit(board, row)
    first = judge.first_over_best(row)
    distance = record.distances.get(str(row.measurement))
    cells = {
        "of the card": "-" if part is None else f"{part:.0%}",
        "x stock": _ratio(board, record, row, "stock"),
        "x invariant": _ratio(board, record, row, "invariant"),
        "first/best": "-" if first is None else f"{first:.2f}",
        "from reference": "-" if distance is None else f"{distance:.2g}",
    }
    return cells


def _ratio(board: Board, record: Record, row: Row, role: Role) -> str:
    found = judge.against(board, record, row.measurement, role)
    return "-" if found is None else f"{found.ratio:.2f}"


def _failures(board: Board) -> list[str]:
    found = [(record.name, record.failure) for record in board.records]
    found += [(f"{record.name}, eager", record.eager_failure) for record in board.records]
    found.append(("reference: nothing is known of distances", board.reference_failure))
    return [f"{who}: {why}" for who, why in found if why]


def _stalls(board: Board) -> list[str]:
    return [
        f"{record.name}: {row.measurement}: {row.pass_seconds[0]:.2f} s, then {min(row.pass_seconds):.2f} s"
        for record in board.records
        for row in record.rows
        if (times := judge.first_over_best(row)) is not None and times > STALL
    ]


def _absent(board: Board) -> list[str]:
    """Rows that nobody has, and why: of a contender that failed, its last words."""
    found = [f"{name}: {reason}" for name, reason in board.impossible.items()]
    for record in board.records:
        for measurement in board.measurements:
            row = record.row(measurement)
            if row is not None and row.absent is not None:
                found.append(f"{record.name}: {measurement}: {row.absent}")
            elif row is None and str(measurement) not in board.impossible:
                found.append(f"{record.name}: {measurement}: {record.failure or 'the run has not come to it'}")
    return found


def _list(title: str, items: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"* {item}" for item in items)] if items else []


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(number: float | None) -> str:
    """1234567 as 1.23 MB."""
    if number is None:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
