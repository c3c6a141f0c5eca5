"""Measure which kernel makes which fp8 product fastest on this machine's card, and write the table of `selection`.

Every kernel prints the same bits, so that the table is about speed alone; a kernel whose bits differ from the Triton
kernel's is reported and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels import bench, deep_gemm, fp8_linear, fp8_stream, measure, quantize
from dsv3_plugin.kernels.fp8_stream import Shape
from dsv3_plugin.kernels.selection import Choice, Row, Table

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
DENSE_ROWS = (1, 16, 32, 64, 128, 4096)
GROUPED = ((256, 4096, 7168), (256, 7168, 2048))
GROUPED_ROWS = (1, 4, 16, 32, 64, 128, 256)

Report = Callable[[str], None]


def _measure(
    makers: Mapping[str, Sequence[Callable[[], torch.Tensor]]], expected: torch.Tensor, report: Report
) -> dict[str, float]:
    """Microseconds of each maker whose bits are the expected ones, in a graph of its calls."""
    microseconds = {}
    for name, calls in makers.items():
        try:
            wrong = measure.differing_bits(expected, calls[0]())
            if wrong:
                report(f"{name} differs in {wrong} outputs and is left out")
                continue
            microseconds[name] = round(measure.time_calls(list(calls), replays=7).median, 2)
        except Exception as error:  # a kernel that cannot run here is not chosen, and the user reads why
            report(f"{name} does not run: {type(error).__name__}: {error}")
    return microseconds


def _row(groups: int, columns: int, depth: int, rows: int, times: dict[str, float], shapes: dict[str, Shape]) -> Row:
    """Keep the best way to cut fp8_stream.cu."""
    cuts = {name: times.pop(name) for name in list(times) if name in shapes}
    cut: dict[str, int] = {}
    if cuts:
        best = min(cuts, key=lambda name: cuts[name])
        times["stream"] = cuts[best]
        fields = shapes[best]._asdict()
        cut = {
            name: n
            for name, n in fields.items()
            if n != Shape._field_defaults.get(name) and name not in ("groups", "stages")
        }
    return Row(groups=groups, columns=columns, depth=depth, rows=rows, microseconds=times, stream=cut)


def dense_rows(report: Report) -> Iterator[Row]:
    """Measure dense products, each with several weights so that none is in the cache."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for columns, depth in DENSE:
        copies = max(2, min(20, 300_000_000 // (columns * depth)))
        weights = [bench.fp8_weight(columns, depth) for _ in range(copies)]
        for rows in DENSE_ROWS:
            inputs = [quantize.quantize_fp8(bench.bf16(rows, depth), "float32") for _ in weights]
            pairs = [(*x, *weight) for x, weight in zip(inputs, weights, strict=True)]
            shapes = {f"stream {tuple(s)}": s.filled() for s in fp8_stream.dense_shapes(columns, rows, multiprocessors)}
            plain = Choice("triton")
            choices = {name: Choice("stream", shape) for name, shape in shapes.items()}
            choices |= {"gluon": Choice("gluon"), "triton": plain}
            makers = {
                name: [partial(fp8_linear.fp8_linear, *pair, choice=c) for pair in pairs] for name, c in choices.items()
            }
            if deep_gemm.version():
                makers[deep_gemm.PROVIDER] = [partial(deep_gemm.product, *pair) for pair in pairs]
            times = _measure(makers, fp8_linear.fp8_linear(*pairs[0], choice=plain), report)
            yield _row(0, columns, depth, rows, times, shapes)


def grouped_rows(report: Report) -> Iterator[Row]:
    """Measure experts' products; their weights are larger than the cache."""
    for groups, columns, depth in GROUPED:
        weight = bench.fp8_weight(groups, columns, depth)
        for rows in GROUPED_ROWS:
            tokens = rows * groups
            counts = torch.bincount(torch.randint(groups, (tokens,), device="cuda"), minlength=groups)
            operands = (*quantize.quantize_fp8(bench.bf16(tokens, depth), "float32"), counts, *weight)
            shapes = {f"stream {tuple(s)}": s._replace(groups=groups).filled() for s in fp8_stream.grouped_shapes(rows)}
            plain = Choice("triton")
            choices = {name: Choice("stream", shape) for name, shape in shapes.items()}
            choices |= {"gluon": Choice("gluon"), "triton": plain}
            makers = {
                name: [partial(fp8_linear.grouped_fp8_linear, *operands, choice=c)] for name, c in choices.items()
            }
            times = _measure(makers, fp8_linear.grouped_fp8_linear(*operands, choice=plain), report)
            yield _row(groups, columns, depth, rows, times, shapes)


def tune(file: Path, report: Report) -> None:
    """Measure everything and write the table."""
    shapes = [s for n, _ in DENSE for m in DENSE_ROWS for s in fp8_stream.dense_shapes(n, m, 132)]
    shapes += [s._replace(groups=g) for g, _, _ in GROUPED for m in GROUPED_ROWS for s in fp8_stream.grouped_shapes(m)]
    fp8_stream.compile_all(shapes)
    rows = []
    for rows_of in (dense_rows, grouped_rows):
        for row in rows_of(report):
            if not row.microseconds:
                raise KernelError("no kernel made a product of the table: see above")
            best = min(row.microseconds, key=lambda name: row.microseconds[name])
            product = f"{row.groups} x " if row.groups else ""
            report(f"{product}{row.rows} x {row.columns} x {row.depth}: {best}, {row.microseconds} {row.stream}")
            rows.append(row)
    table = Table(card=torch.cuda.get_device_name(), rows=tuple(rows))
    lines = ",\n".join(f"  {row.model_dump_json()}" for row in table.rows)
    file.write_text(f'{{\n "card": "{table.card}",\n "rows": [\n{lines}\n ]\n}}\n')
