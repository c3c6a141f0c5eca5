"""Which maker of fp8 products serves which shape: read off times that were measured, as all makers print equal bits.

selection.json holds them for one card: for each measured product the microseconds of every maker, and how the kernel
of fp8_stream.cu was cut. `dsv3 kernels tune` writes it. A product that was not measured takes the row of the nearest
one that was.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from dsv3_plugin.kernels.fp8_stream import Shape

TABLE = Path(__file__).with_name("selection.json")


class Row(BaseModel):
    """One measured product."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: int
    """Experts; 0 in a dense product."""
    columns: int
    depth: int
    rows: int
    """Tokens, of one expert on average if there are several."""
    microseconds: dict[str, float]
    stream: dict[str, int]
    """Parameters of `fp8_stream.Shape`; none where it was not measured."""

    def shape(self) -> Shape:
        """How fp8_stream.cu is cut."""
        return Shape(**self.stream, groups=max(1, self.groups)).filled()


class Table(BaseModel):
    """All measured products of a card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    card: str
    rows: tuple[Row, ...]


class Choice(NamedTuple):
    """A maker's name, and how fp8_stream.cu is cut if that is the maker."""

    maker: str
    shape: Shape | None = None


@functools.cache
def table() -> Table:
    """The table that ships with the package."""
    return Table.model_validate(json.loads(TABLE.read_text()))


@functools.lru_cache(maxsize=4096)
def choose(groups: int, columns: int, depth: int, rows: int, makers: tuple[str, ...]) -> Choice:
    """The fastest of `makers` in the nearest measured product; `rows` are those of one expert, on average.

    fp8_stream.cu serves measured products only: there its bits were compared as well.
    """
    measured = [row for row in table().rows if (row.groups > 0) == (groups > 0)]
    nearest = min(measured, key=lambda row: abs(math.log(row.columns / columns)) + abs(math.log(row.depth / depth)))
    alike = [row for row in measured if (row.columns, row.depth) == (nearest.columns, nearest.depth)]
    # Not fewer tokens than asked for, where there is such a row: a kernel cut for few is slow with many.
    row = min(alike, key=lambda row: (row.rows < rows, abs(row.rows - rows)))
    exact = (row.groups, row.columns, row.depth) == (groups, columns, depth)
    able = [maker for maker in makers if maker != "stream" or (exact and row.stream)]
    maker = min(able, key=lambda maker: row.microseconds.get(maker, math.inf))
    return Choice(maker, row.shape() if maker == "stream" else None)
