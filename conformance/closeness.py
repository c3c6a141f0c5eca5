"""The claim of closeness: how far a testee's logits are from the specification's, and how far they may be.

The bound is measured, not chosen: the reference computes the testee's own sequences a second time in another
precision (fp32; of a fp32 checkpoint, bf16), and that distance is its *spread*. Another correct arithmetic of the
same weights may be as far to the other side: twice the spread in logits and in top-1 disagreements, four times in
Kullback-Leibler divergence, which grows with the square. Where the distance comes from, the *drift* of each module
shows, beside the reference's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dsv3_plugin.conformance.compare import Difference, Key, RowFile, matched_rows, streams_in_order

LEAST_DISAGREEMENT = 0.01
"""Of top-1, always allowed: few rows may have no near ties in one arithmetic and some in another."""


@dataclass(frozen=True)
class Row:
    """One row's distance."""

    case: str
    request: int
    position: int
    kl: float


@dataclass(frozen=True)
class Distance:
    """Rows of logits against others of the same request and prefix."""

    rows: int
    kl_sum: float
    """Of KL(left || right) in nats, both in float64."""
    disagreements: int
    """Rows whose most likely tokens differ."""
    max_difference: float
    """Of two logits."""
    furthest: Row | None
    """The row of the largest KL divergence."""

    @property
    def kl_mean(self) -> float:
        """Nats a row; NaN without rows."""
        return self.kl_sum / self.rows if self.rows else float("nan")

    @property
    def kl_max(self) -> float:
        """Of any row, in nats; NaN without rows."""
        return self.furthest.kl if self.furthest is not None else float("nan")

    @property
    def top1_agreement(self) -> float:
        """The part of the rows whose most likely tokens agree; NaN without rows."""
        return 1 - self.disagreements / self.rows if self.rows else float("nan")

    def __str__(self) -> str:
        """For the report."""
        return (
            f"{self.rows:,} rows: KL mean {self.kl_mean:.2e}, max {self.kl_max:.2e} nats;"
            f" top-1 agreement {self.top1_agreement:.2%}; logits at most {self.max_difference:.2e} apart"
        )


@dataclass(frozen=True)
class Drift:
    """How far the rows of one module's stream are from the specification's."""

    stream: str
    squares: float
    """Of all differences, summed."""
    of: float
    """Of the specification's numbers."""

    @property
    def relative(self) -> float:
        """The root of their quotient; NaN where the specification is all zeros."""
        return math.sqrt(self.squares / self.of) if self.of else math.nan


@dataclass(frozen=True)
class Bound:
    """One number of a testee, and the largest that it may be."""

    name: str
    found: float
    allowed: float
    spread: float
    """The reference's own, by which that is measured."""

    @property
    def holds(self) -> bool:
        """Whether it is not larger; what is no number is."""
        return self.found <= self.allowed


@dataclass(frozen=True)
class Closeness:
    """A testee that claims closeness, in one case or in all."""

    testee: str
    distance: Distance
    """From the specification."""
    spread: Distance
    """Of the reference in another precision from the specification, on the same sequences."""
    first_difference: Difference | None
    """Where bits differ first, in the first case."""
    drift: tuple[Drift, ...] = ()
    """Of each module in the order in which they run, where the testee's rows hold it."""
    spread_drift: tuple[Drift, ...] = ()
    """The reference's own, likewise."""

    @property
    def bounds(self) -> list[Bound]:
        """What it is judged by."""
        found, spread = self.distance, self.spread
        disagreement, own = 1 - found.top1_agreement, 1 - spread.top1_agreement
        return [
            Bound("mean KL divergence", found.kl_mean, 4 * spread.kl_mean, spread.kl_mean),
            Bound("largest KL divergence", found.kl_max, 4 * spread.kl_max, spread.kl_max),
            Bound("top-1 disagreement", disagreement, max(2 * own, LEAST_DISAGREEMENT), own),
            Bound(
                "largest difference of two logits",
                found.max_difference,
                2 * spread.max_difference,
                spread.max_difference,
            ),
        ]

    def beyond(self) -> list[str]:
        """What is wrong or further than the spread allows."""
        return [
            f"{self.testee} is not close: {bound.name} {bound.found:.2e}, at most {bound.allowed:.2e} is allowed"
            for bound in self.bounds
            if not bound.holds
        ]

    def describe(self) -> list[str]:
        """How far the testee is, how far it may be, and where it parts from the reference."""
        lines = [
            f"{self.testee} from the reference: {self.distance}",
            f"the reference in another precision from itself: {self.spread}",
            "allowed: " + ", ".join(f"{bound.name} {bound.allowed:.2e}" for bound in self.bounds),
        ]
        if (furthest := self.distance.furthest) is not None:
            where = f"case {furthest.case}, request {furthest.request}, position {furthest.position}"
            lines.append(f"furthest in {where}: KL {furthest.kl:.2e}")
        if self.first_difference is not None:
            lines.append(f"first different bits in {self.first_difference.describe()}")
        return lines


def malformed(specification: RowFile, rows: RowFile) -> str | None:
    """Why logits have no distance from the specification's, else None."""
    if "logits" not in rows.streams:
        return "no logits at all"
    wanted, found = specification.values("logits"), rows.values("logits")
    if found.shape[1:] != wanted.shape[1:]:
        return f"its logits have the shape {list(found.shape)}, the vocabulary has {wanted.shape[1]} tokens"
    if not (finite := found.isfinite().all(-1)).all():
        row = int((~finite).nonzero()[0])
        request, position = rows.keys("logits")[row][0], int(rows.positions("logits")[row])
        return f"request {request} has logits at position {position} that are no numbers (NaN or infinite)"
    return None


def distance(case: str, left: RowFile, right: RowFile) -> Distance:
    """How far the logits of `right` are from those of `left`, over all rows that both have."""
    rows_of_left: dict[Key, torch.Tensor] = dict(zip(left.keys("logits"), left.values("logits"), strict=True))
    total = Distance(0, 0.0, 0, 0.0, None)
    positions = right.positions("logits").tolist()
    for key, position, found in zip(right.keys("logits"), positions, right.values("logits"), strict=True):
        if key in rows_of_left:
            total = merge((total, _of_row(case, key[0], position, rows_of_left[key], found)))
    return total


def drift(specification: RowFile, rows: RowFile) -> tuple[Drift, ...]:
    """How far each module of `rows` is, over the rows that both have; logits among them, drafts not."""
    found = []
    for stream in streams_in_order(rows):
        pairs = matched_rows(stream, specification, rows) if stream in specification.streams else []
        left, right = specification.values(stream) if pairs else None, rows.values(stream)
        if left is None or left.shape[1] != right.shape[1]:
            continue
        i, j = (list(places) for places in zip(*pairs, strict=True))
        expected = left[i].double()
        squares = (right[j].double() - expected).square().sum()
        found.append(Drift(stream, float(squares), float(expected.square().sum())))
    return tuple(found)


def merge_drifts(drifts: Iterable[tuple[Drift, ...]]) -> tuple[Drift, ...]:
    """Those of several cases as one."""
    total: dict[str, Drift] = {}
    for each in drifts:
        for part in each:
            before = total.get(part.stream, Drift(part.stream, 0.0, 0.0))
            total[part.stream] = Drift(part.stream, before.squares + part.squares, before.of + part.of)
    return tuple(total.values())


def merge(distances: Iterable[Distance]) -> Distance:
    """All rows of several distances as one."""
    parts = list(distances)
    furthest = [part.furthest for part in parts if part.furthest is not None]
    return Distance(
        rows=sum(part.rows for part in parts),
        kl_sum=sum(part.kl_sum for part in parts),
        disagreements=sum(part.disagreements for part in parts),
        max_difference=max((part.max_difference for part in parts), default=0.0),
        furthest=max(furthest, key=lambda row: row.kl, default=None),
    )


def _of_row(case: str, request: int, position: int, left: torch.Tensor, right: torch.Tensor) -> Distance:
    a, b = left.double().log_softmax(-1), right.double().log_softmax(-1)
    kl = float((a.exp() * (a - b)).sum())
    difference = float((left.double() - right.double()).abs().max())
    disagree = int(left.argmax() != right.argmax())
    return Distance(1, kl, disagree, difference, Row(case, request, position, kl))
