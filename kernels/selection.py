"""Which backend of the fp8 products serves which shape: read off measured times, as all backends print equal bits.

selection.json holds them for one card: for each measured product the microseconds of every backend, and the
tile configuration of fp8_gemm.cu. `dsv3 kernels tune` writes it. A product that was not measured takes the row of the
nearest one that was. DeepGEMM's times stand beside them as a peer's.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from dsv3_plugin.kernels.cuda.fp8_gemm import DENSE_SAMPLE, GROUPED_SAMPLE, TileConfig

TABLE = Path(__file__).with_name("selection.json")
_PEER = "deep-gemm"
_BACKENDS = ("cuda", "gluon", "triton", _PEER)
IMPLEMENTATIONS = {"cuda": "cuda.fp8_gemm", "gluon": "triton.fp8_gluon", "triton": "triton.fp8_linear"}
"""What certificates call the backends."""


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
    tile_config: dict[str, int]
    """Parameters of `fp8_gemm.TileConfig`; none where it was not measured."""

    @property
    def product(self) -> tuple[int, int, int]:
        """Experts, columns and depth."""
        return self.groups, self.columns, self.depth

    def config(self, groups: int | None = None) -> TileConfig:
        """Of fp8_gemm.cu; for so many experts, if it is another number."""
        return TileConfig(**self.tile_config, groups=max(1, self.groups if groups is None else groups)).filled()


class Table(BaseModel):
    """All measured products of a card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    card: str
    rows: tuple[Row, ...]

    def write(self, file: Path) -> None:
        """As JSON, a product a line."""
        lines = ",\n".join(f"  {row.model_dump_json()}" for row in self.rows)
        file.write_text(f'{{\n "card": "{self.card}",\n "rows": [\n{lines}\n ]\n}}\n')

    def markdown(self) -> str:
        """The same as a document."""
        dense, experts = ([row for row in self.rows if (row.groups > 0) == grouped] for grouped in (False, True))
        return "\n".join(
            [
                f"# fp8 products on an {self.card}",
                "",
                "Microseconds of each backend of a product, as `dsv3 kernels tune` measures them: medians over replays",
                "of a CUDA graph, weights not in the cache. The fastest is bold; `own / deep-gemm` compares the",
                "fastest of this package with it. Every backend printed the same bits. Made of",
                "[selection.json](selection.json) by `dsv3 kernels selection`.",
                "",
                *_lines("M x N x K", dense),
                "",
                "Experts, `rows` each on average. DeepGEMM's time holds the copies of rows to where it wants them.",
                "",
                *_lines("experts x rows x N x K", experts),
                "",
            ]
        )


def _lines(product: str, rows: list[Row]) -> list[str]:
    """A table of products."""
    lines = [
        f"| {product} | {' | '.join(_BACKENDS)} | own / deep-gemm | tile configuration of cuda |",
        "|" + "---|" * (len(_BACKENDS) + 3),
    ]
    for row in rows:
        times = row.microseconds
        fastest = min(times.values())
        cells = [f"{times[m]:.1f}" if m in times else "-" for m in _BACKENDS]
        cells = [f"**{cell}**" if times.get(m) == fastest else cell for m, cell in zip(_BACKENDS, cells, strict=True)]
        own = min((time for backend, time in times.items() if backend != _PEER), default=math.inf)
        cells.append(f"{own / times[_PEER]:.2f}" if _PEER in times else "-")
        cells.append(", ".join(f"{name} {value}" for name, value in row.tile_config.items()) or "-")
        name = f"{row.groups} x " if row.groups else ""
        lines.append(f"| {name}{row.rows} x {row.columns} x {row.depth} | {' | '.join(cells)} |")
    return lines


class Choice(NamedTuple):
    """A backend, and the tile configuration of fp8_gemm.cu if it is that one."""

    backend: str
    config: TileConfig | None = None


def read(file: Path) -> Table:
    """A table that was written. Raises `ValueError` if it is none."""
    return Table.model_validate_json(file.read_text())


@functools.cache
def table() -> Table:
    """The table that ships with the package."""
    return read(TABLE)


@functools.cache
def configs_to_check(grouped: bool) -> tuple[TileConfig, ...]:
    """Tile configurations of fp8_gemm.cu for any number of experts: those that serve, and a sample of all kinds."""
    serving = [TileConfig(**row.tile_config) for row in table().rows if row.tile_config and (row.groups > 0) == grouped]
    return tuple(dict.fromkeys([*(GROUPED_SAMPLE if grouped else DENSE_SAMPLE), *serving]))


@functools.lru_cache(maxsize=4096)
def choose(groups: int, columns: int, depth: int, rows: int, backends: tuple[str, ...]) -> Choice:
    """The fastest of `backends` in the nearest measured product; `rows` are those of one expert, on average."""
    measured = [row for row in table().rows if (row.groups > 0) == (groups > 0)]

    def distance(row: Row) -> float:
        sizes = ((row.columns, columns), (row.depth, depth), (max(1, row.groups), max(1, groups)))
        return sum(abs(math.log(a / b)) for a, b in sizes)

    nearest = min(measured, key=distance).product
    alike = [row for row in measured if row.product == nearest]
    # Not fewer tokens than asked for, where there is such a row: tiles for few are slow with many.
    row = min(alike, key=lambda row: (row.rows < rows, abs(row.rows - rows)))
    able = [backend for backend in backends if backend != "cuda" or row.tile_config]
    backend = min(able, key=lambda backend: row.microseconds.get(backend, math.inf))
    fewest, most = _chosen.get((groups, columns, depth, backend), (rows, rows))
    _chosen[groups, columns, depth, backend] = min(fewest, rows), max(most, rows)
    return Choice(backend, row.config(groups) if backend == "cuda" else None)


# Experts, columns, depth and backend, with the fewest and the most rows for which it was chosen.
_chosen: dict[tuple[int, int, int, str], tuple[int, int]] = {}


def served(grouped: bool) -> dict[str, str]:
    """The products that were asked for so far, each with the implementation that `choose` found."""
    return {
        f"{groups} experts x " * grouped + f"{fewest} to {most} rows x {columns} x {depth}": IMPLEMENTATIONS[backend]
        for (groups, columns, depth, backend), (fewest, most) in sorted(_chosen.items())
        if (groups > 0) == grouped
    }
