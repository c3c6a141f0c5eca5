"""Which rows mean nothing, and how the others compare.

A row is an error of the measurement where its logits are not finite, where they are further from the reference than
those of the same engine without compilers and graphs, or nothing like it, where its tokens are not the forced ones,
where it visited fewer experts than others for the same tokens, and where it beats the card. It is then flagged, and no
ratio is made of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.engine_bench.limits import Model, card_of, least_seconds
from dsv3_plugin.engine_bench.plan import OURS, Role
from dsv3_plugin.engine_bench.protocol import Measurement, Row, Start

FURTHER = 2.0
"""Times the distance of the eager mode: roundings differ, and a router's near ties fall either way."""
LEAST_DISTANCE = 0.02
"""Never flagged: two modes of few roundings may both be nearly exact."""
FURTHEST = 0.5
"""Flagged whatever the eager mode computes: logits that have nothing to do with the reference's are 1.4 away."""
FEWER_EXPERTS = 0.9
"""Of the most that anyone visited."""
STALL = 1.2
"""First pass over best pass, above which a request waited for a compiler."""


class Record(BaseModel):
    """A contender, and what it said."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    name: str
    engine: str
    way: str
    role: Role
    settings: dict[str, str]
    """Environment and arguments that differ from the engine's defaults."""
    start: Start | None = None
    rows: tuple[Row, ...] = ()
    rounds: int = 1
    """Starts of which each row is the best, at the least."""
    failure: str | None = None
    """Why its last start ended early."""
    eager_failure: str | None = None
    distances: dict[str, float] = {}
    """Measurement to its logits' distance from the reference's."""
    eager_distances: dict[str, float] = {}
    """The same, of the engine without compilers and graphs."""

    def row(self, measurement: Measurement) -> Row | None:
        """Of a measurement, if there is one."""
        return next((row for row in self.rows if row.measurement == measurement), None)


class Board(BaseModel):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    device: str
    layout: str = "one"
    """Ranks of each contender, in the words of `conformance.layouts`."""
    date: str
    model: Model
    measurements: tuple[Measurement, ...]
    impossible: dict[str, str]
    """Measurements that nobody made, and why."""
    records: tuple[Record, ...]
    passes: int
    steps: int
    reference_failure: str | None = None

    @property
    def rehearsal(self) -> bool:
        """Whether it ran on a machine without GPU, where times mean nothing."""
        return self.device == "cpu"

    @property
    def spread(self) -> ParallelLayout:
        """The layout."""
        return ParallelLayout.parse(self.layout)


def seconds(row: Row) -> float | None:
    """Of a prefill, or of one token of every request; the less the better."""
    if row.measurement.kind == "prefill":
        return row.first_token_seconds[-1] if row.first_token_seconds else None
    return row.step_ms[0] / 1e3 / (row.tokens_per_step or 1) if row.step_ms else None


def flags(board: Board, record: Record, row: Row) -> list[str]:
    """What is wrong with a row."""
    if row.absent is not None:
        return []
    found = []
    name = str(row.measurement)
    if record.start is not None and record.start.device != board.device:
        found.append(f"on another device, {record.start.device}")
    if row.finite is False:
        found.append("logits are not finite")
    if row.as_forced is False:
        found.append("its tokens are not the forced ones")
    distance, eager = record.distances.get(name), _expected_distance(record, name)
    if distance is not None and not _near(distance, eager):
        other = "" if eager is None else f", without compilers and graphs {eager:.2g}"
        found.append(f"logits are {distance:.2g} from the reference{other}")
    most = max((_experts(other.row(row.measurement)) for other in board.records), default=0.0)
    if row.measurement.forced and row.experts is not None and _experts(row) < FEWER_EXPERTS * most:
        found.append(f"visits {_experts(row):.0f} experts a layer, others {most:.0f}")
    if (least := _least(board, row)) is not None and (spent := _spent(row)) is not None and spent < least:
        cards = "card" if board.spread.ranks == 1 else f"{board.spread.ranks} cards"
        found.append(f"beats the {cards}: {spent * 1e3:.3g} ms, where {least * 1e3:.3g} ms is the least")
    return found


def _expected_distance(record: Record, measurement: str) -> float | None:
    """Ours has the reference's arithmetic; what others have, their eager mode says."""
    return 0.0 if record.role in OURS else record.eager_distances.get(measurement)


def _near(distance: float, eager: float | None) -> bool:
    """NaN is not near."""
    return distance <= (FURTHEST if eager is None else min(FURTHEST, max(LEAST_DISTANCE, FURTHER * eager)))


def _experts(row: Row | None) -> float:
    return statistics.fmean(row.experts) if row is not None and row.experts else 0.0


def _least(board: Board, row: Row) -> float | None:
    card = card_of(board.device)
    return None if card is None else least_seconds(board.model, row, card, board.spread)


def _spent(row: Row) -> float | None:
    """Of one pass over the weights: a whole step, whatever it yields."""
    if row.measurement.kind == "prefill":
        return seconds(row)
    return row.step_ms[0] / 1e3 if row.step_ms else None


def of_limit(board: Board, row: Row) -> float | None:
    """The part of what the card can do."""
    least, spent = _least(board, row), _spent(row)
    return least / spent if least is not None and spent else None


def first_over_best(row: Row) -> float | None:
    """The first pass over the best one; None where there is one only."""
    return row.pass_seconds[0] / min(row.pass_seconds) if len(row.pass_seconds) > 1 else None


class Against(NamedTuple):
    """A time beside another contender's of the same engine."""

    ratio: float
    """Above 1: faster."""
    other: str


def against(board: Board, record: Record, measurement: Measurement, role: Role) -> Against | None:
    """A contender beside the fastest of a role whose row means something; None where either has no such row."""
    mine = sound_seconds(board, record, measurement)
    best = fastest(board, _of(board.records, record.engine, role), measurement)
    if mine is None or best is None:
        return None
    other, theirs = best
    return Against(theirs / mine, other.name)


def sound_seconds(board: Board, record: Record, measurement: Measurement) -> float | None:
    """A row's seconds, where it is not flagged."""
    row = record.row(measurement)
    return seconds(row) if row is not None and not flags(board, record, row) else None


def fastest(board: Board, records: Iterable[Record], measurement: Measurement) -> tuple[Record, float] | None:
    """Of those whose rows mean something."""
    times = ((record, sound_seconds(board, record, measurement)) for record in records)
    return min(((r, t) for r, t in times if t is not None), key=lambda pair: pair[1], default=None)


def _of(records: Sequence[Record], engine: str, role: Role) -> list[Record]:
    return [record for record in records if (record.engine, record.role) == (engine, role)]


def speed_up(board: Board, record: Record, row: Row) -> float | None:
    """What drafts bring: tokens a second beside the same contender's without them."""
    if not row.measurement.drafts:
        return None
    plain = row.measurement.model_copy(update={"drafts": 0, "acceptance": None})
    mine, without = sound_seconds(board, record, row.measurement), sound_seconds(board, record, plain)
    return without / mine if mine and without else None


def speed_up_by_bytes(board: Board, record: Record, row: Row) -> float | None:
    """What drafts could bring a card that did nothing but read, at the row's acceptance: two tokens visit more experts
    than one, and a draft reads weights of its own. None where that is not known.
    """
    plain = record.row(row.measurement.model_copy(update={"drafts": 0, "acceptance": None}))
    least, without = _least(board, row), None if plain is None else _least(board, plain)
    return without / least * (row.tokens_per_step or 1) if least and without else None


def errors(board: Board) -> Mapping[str, list[str]]:
    """Contender to what is wrong with its rows."""
    return {
        record.name: found
        for record in board.records
        if (found := [f"{row.measurement}: {flag}" for row in record.rows for flag in flags(board, record, row)])
    }


def measured(board: Board) -> bool:
    """Whether anything was."""
    return any(row.absent is None for record in board.records for row in record.rows)
