"""Measure which kernel makes which fp8 product fastest on this machine's card, and write the table of `selection`.

Every kernel prints the same bits, so that the table is about speed alone; a kernel whose bits differ from the Triton
kernel's is reported and left out. What is compiled when first called is called first in several processes, which leave
it in the compilers' caches; then the products are timed one after the other, and their backends in turns.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels.bench import measure
from dsv3_plugin.kernels.bench.case import Weight, bf16, fp8_weight
from dsv3_plugin.kernels.bench.measure import Call
from dsv3_plugin.kernels.cuda import fp8_gemm
from dsv3_plugin.kernels.cuda.fp8_gemm import TileConfig
from dsv3_plugin.kernels.selection import Choice, Row, Table
from dsv3_plugin.kernels.triton import fp8_linear, quantize
from dsv3_plugin.kernels.vendors import deep_gemm
from dsv3_plugin.ops.quantize import E4M3

# DeepSeek-V3's projections (columns, depth), q_a and kv_a also as one, and its experts'.
DENSE = (
    (576, 7168),
    (1536, 7168),
    (2112, 7168),
    (24576, 1536),
    (7168, 16384),
    (36864, 7168),
    (7168, 18432),
    (4096, 7168),
    (7168, 2048),
)
DENSE_ROWS = (1, 16, 32, 64, 128, 256, 1024, 4096)
# All of a layer's experts, and those of one card of eight.
GROUPED = ((256, 4096, 7168), (256, 7168, 2048), (32, 4096, 7168), (32, 7168, 2048))
GROUPED_ROWS = (1, 4, 16, 32, 64, 128, 256, 1024)
# More tokens are not measured: 256 experts of 1024 each, say.
_MOST_TOKENS = 65_536
_PROCESSES = 16

Report = Callable[[str], None]


class Product(NamedTuple):
    """A product to be measured; no groups in a dense one."""

    groups: int
    columns: int
    depth: int
    rows: int
    """Tokens, of one expert on average if there are several."""

    def __str__(self) -> str:
        """Experts, tokens, columns and depth."""
        return f"{self.groups} x {self.rows} x {self.columns} x {self.depth}".removeprefix("0 x ")

    def configs(self) -> dict[str, TileConfig]:
        """Tile configurations of fp8_gemm.cu, by a name each."""
        if self.groups:
            configs = [config._replace(groups=self.groups) for config in fp8_gemm.grouped_configs(self.rows)]
        else:
            multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
            configs = list(fp8_gemm.dense_configs(self.columns, self.rows, multiprocessors))
        return {f"cuda {tuple(config)}": config.filled() for config in configs}

    @property
    def weight_size(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.groups, self.columns, self.depth) if self.groups else (self.columns, self.depth)

    def weights(self) -> list[Weight]:
        """Random weights, so many that the cache does not hold them."""
        copies = 1 if self.groups else max(2, min(20, 300_000_000 // (self.columns * self.depth)))
        return [fp8_weight(*self.weight_size) for _ in range(copies)]

    def unwritten_weight(self) -> Weight:
        """A weight of any numbers."""
        *groups, columns, depth = self.weight_size
        scales = torch.empty(*groups, -(-columns // 128), depth // 128, device="cuda")
        return torch.empty(self.weight_size, dtype=E4M3, device="cuda"), scales

    def calls(self, weights: Sequence[Weight]) -> dict[str, list[list[Call]]]:
        """Each backend's calls for each load, one a weight. Experts have two: equally many tokens each, and random."""
        choices = {"triton": Choice("triton"), "gluon": Choice("gluon")}
        choices |= {name: Choice("cuda", config) for name, config in self.configs().items()}
        tokens = self.rows * max(1, self.groups)
        operands = [quantize.quantize_fp8(bf16(tokens, self.depth), "float32") for _ in weights]
        loads: list[tuple[torch.Tensor, ...]] = [()]
        if self.groups:
            even = torch.full((self.groups,), self.rows, device="cuda")
            expert = torch.randint(self.groups, (tokens,), device="cuda")
            loads = [(even,), (torch.bincount(expert, minlength=self.groups),)]
        own = fp8_linear.grouped_fp8_linear_by if self.groups else fp8_linear.fp8_linear_by
        peer = deep_gemm.grouped_fp8_linear if self.groups else deep_gemm.fp8_linear
        pairs = list(zip(operands, weights, strict=True))

        def of(make: Callable[..., torch.Tensor]) -> list[list[Call]]:
            return [[partial(make, *x, *load, *weight) for x, weight in pairs] for load in loads]

        calls = {name: of(partial(own, choice)) for name, choice in choices.items()}
        if deep_gemm.version():
            calls[deep_gemm.PROVIDER] = of(peer)
        return calls


PRODUCTS = tuple(Product(0, *size, rows) for size in DENSE for rows in DENSE_ROWS) + tuple(
    Product(*size, rows) for size in GROUPED for rows in GROUPED_ROWS if size[0] * rows <= _MOST_TOKENS
)


def _call_first(products: Sequence[Product]) -> None:
    """Compile what backends other than fp8_gemm.cu compile when first called. What fails is reported when measured."""
    for product in products:
        torch.cuda.empty_cache()
        with suppress(Exception):
            for name, [[call], *_] in product.calls([product.unwritten_weight()]).items():
                with suppress(Exception):
                    if name not in product.configs():
                        call()
                        torch.cuda.synchronize()


def _parts(processes: int) -> list[list[Product]]:
    """What each process calls first: products of experts, whose weights fill a part of the card, or dense ones."""
    experts = [product for product in PRODUCTS if product.groups]
    dense = [product for product in PRODUCTS if not product.groups]
    half = max(1, processes // 2)
    return [part[i::half] for part in (experts, dense) for i in range(half)]


def _compile_all() -> None:
    """In processes of their own, which share the compilers' caches; meanwhile fp8_gemm.cu."""
    processes = min(_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        called = pool.map(_call_first, _parts(processes))
        fp8_gemm.compile_all(config for product in PRODUCTS for config in product.configs().values())
        list(called)


def _measure(product: Product, weights: Sequence[Weight], report: Report) -> Row:
    """Microseconds of each backend whose bits are the Triton kernel's: a graph of calls for each load, all in turns.

    Loads share no graph: one would begin while the other's last tiles are multiplied, which servers do not see.
    """
    graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
    backends = product.calls(weights)
    expected = [calls[0]() for calls in backends["triton"]]
    for name, loads in backends.items():
        try:
            results = zip(expected, loads, strict=True)
            wrong = sum(measure.differing_bits(result, calls[0]()) or 0 for result, calls in results)
            if wrong:
                report(f"{name} differs in {wrong} outputs and is left out")
                continue
            graphs |= {(name, load): measure.capture(calls) for load, calls in enumerate(loads)}
        except Exception as error:  # a kernel that cannot run here is not chosen, and the user reads why
            report(f"{name} does not run: {type(error).__name__}: {error}")
    times = measure.time_in_turns(graphs, len(weights), replays=3)
    medians: dict[str, list[float]] = {}
    for (name, _), taken in times.items():
        medians.setdefault(name, []).append(taken.median)
    return _row(product, {name: round(statistics.fmean(of_loads), 2) for name, of_loads in medians.items()})


def _row(product: Product, microseconds: dict[str, float]) -> Row:
    """Keep the best tile configuration of fp8_gemm.cu."""
    configs = product.configs()
    times = {name: microseconds.pop(name) for name in list(microseconds) if name in configs}
    tile_config: dict[str, int] = {}
    if times:
        best = min(times, key=lambda name: times[name])
        microseconds["cuda"] = times[best]
        fields = configs[best]._asdict()
        tile_config = {
            name: n
            for name, n in fields.items()
            if n != TileConfig._field_defaults.get(name) and name not in ("groups", "stages")
        }
    return Row(**product._asdict(), microseconds=microseconds, tile_config=tile_config)


def _rows(report: Report) -> Iterator[Row]:
    size: tuple[int, ...] = ()
    weights: list[Weight] = []
    for product in PRODUCTS:
        if product[:3] != size:
            weights.clear()
            size, weights = product[:3], product.weights()
        yield _measure(product, weights, report)


def tune(file: Path, report: Report) -> None:
    """Measure everything and write the table."""
    _compile_all()
    rows = []
    for product, row in zip(PRODUCTS, _rows(report), strict=True):
        if not row.microseconds:
            raise KernelError("no kernel made a product of the table: see above")
        best = min(row.microseconds, key=lambda name: row.microseconds[name])
        report(f"{product}: {best}, {row.microseconds} {row.tile_config}")
        rows.append(row)
    Table(card=torch.cuda.get_device_name(), rows=tuple(rows)).write(file)
