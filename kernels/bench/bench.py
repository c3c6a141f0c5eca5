"""What the scoreboard measures: this package's kernels beside the best public ones, on DeepSeek-V3's shapes.

    python -m dsv3_plugin.kernels.bench.bench [--only dense] [--json FILE]

A time is the median over replays of a CUDA graph that holds the call several times, each time on other buffers, so that
the weights are not in the L2 cache; the spread is the 10th to the 90th percentile. The contenders of a case take turns.
The floor is the larger of bytes over 4.3 TB/s and operations over 1580 TFLOP/s in fp8 or 790 in bf16, what an H200 was
seen to reach. A peer that is not installed is named as absent; no time stands without its peer's. Records and tables:
`scoreboard`; clock: `measure`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels.bench import scoreboard
from dsv3_plugin.kernels.bench.attention import attention_cases, prompt_cases
from dsv3_plugin.kernels.bench.case import DEVICE, Case, why_not
from dsv3_plugin.kernels.bench.experts import moe_cases
from dsv3_plugin.kernels.bench.measure import (
    Call,
    RowBits,
    Rows,
    capture,
    compare_rows,
    differing_bits,
    time_in_turns,
    workspace_bytes,
)
from dsv3_plugin.kernels.bench.memory_bound import small_cases
from dsv3_plugin.kernels.bench.products import bf16_cases, dense_cases, grouped_cases, sliced_cases
from dsv3_plugin.kernels.bench.scoreboard import Record, Scoreboard
from dsv3_plugin.version import __version__

app = typer.Typer(add_completion=False)

# More bytes than the L2 cache holds.
_CACHE = 250_000_000
_DISTRIBUTIONS = ("triton", "vllm", "sglang", "sglang-kernel", "sgl-deep-gemm", "transformer-engine-torch")
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "dense": dense_cases,
    "attention": attention_cases,
    "prompts": prompt_cases,
    "grouped": grouped_cases,
    "moe": moe_cases,
    "bf16": bf16_cases,
    "sliced": sliced_cases,
    "small": small_cases,
}


def copy_of(bytes_moved: float) -> Call:
    """Read half of the bytes and write the other half, in whole pages."""
    source = torch.empty(max(1, round(bytes_moved / 2 / 4096)) * 4096, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(group: str, case: Case, *, rotate: bool, rows: RowBits | None) -> list[Record]:
    """All contenders of a case; with `rotate` each replayed call has buffers of its own."""
    copies = max(1, min(16, round(_CACHE / case.bytes_moved))) if rotate else 1
    made = [list(case.make().all()) for _ in range(copies)]
    if case.is_bound_by_memory:
        for contenders in made:
            contenders.append(("copy", "copy", copy_of(case.bytes_moved)))
    found: list[dict[str, Any]] = []
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    ours: Any = None
    for index, (name, role, first) in enumerate(made[0]):
        known: dict[str, Any] = {"group": group, "case": case.name, "floor_us": case.floor_us}
        known |= {"contender": name, "role": role}
        found.append(known)
        if isinstance(first, str):
            known["absent"] = first
            continue
        calls: list[Call] = [contenders[index][2] for contenders in made]  # type: ignore[misc]
        try:
            workspace = workspace_bytes(first)
            result = first()
            graphs[index] = capture(calls)
        except RuntimeError as error:
            torch.cuda.synchronize()
            known["absent"] = f"not timed: {why_not(error)}"
            continue
        known["workspace_bytes"] = workspace
        if role == "ours":
            ours = result.clone() if isinstance(result, torch.Tensor) else result
            if rows:
                known |= {"rows_compared": rows.compared, "rows_differ": rows.differ}
        elif role != "copy" and (wrong := differing_bits(ours, result)) is not None:
            outputs = ours if isinstance(ours, tuple) else (ours,)
            known |= {"differs": wrong, "outputs": sum(x.numel() for x in outputs)}
    times = time_in_turns(graphs, copies)
    for index, taken in times.items():
        found[index] |= {"median_us": taken.median, "low_us": taken.low, "high_us": taken.high}
    return [Record(**known) for known in found]


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Groups: {', '.join(GROUPS)}. Repeat it.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the measurements to this file.")] = None,
    rows: Annotated[bool, typer.Option(help="Also compare our rows' bits over batches.")] = True,
) -> None:
    """Measure this package's kernels and their peers on the card of this machine."""
    unknown = sorted(set(only or ()) - set(GROUPS))
    if unknown:
        raise KernelError(f"there is no group {', '.join(unknown)}; the groups are {', '.join(GROUPS)}")
    if json and json.exists():
        raise KernelError(f"{json} exists; name another file")
    compared: dict[Callable[[], Rows], RowBits] = {}
    records: list[Record] = []
    failed: list[str] = []
    print("\n".join(scoreboard.HEADER), flush=True)
    for group in only or GROUPS:
        for case in GROUPS[group]():
            try:
                if rows and case.rows and case.rows not in compared:
                    compared[case.rows] = compare_rows(case.rows())
                found = compared.get(case.rows) if case.rows else None
                # The experts' weights are larger than the cache by themselves, and shared by the copies.
                measured = measure(group, case, rotate=group not in ("grouped", "moe"), rows=found)
            except Exception as error:  # the other cases are measured, and the exit status says that one was not
                failed.append(f"{case.name}: {type(error).__name__}: {error}")
                continue
            print(scoreboard.row(measured), flush=True)
            records += measured
            torch.cuda.empty_cache()
            if json:  # now, so that a run that ends early leaves what it has
                board = Scoreboard(card=torch.cuda.get_device_name(), versions=versions(), records=tuple(records))
                json.write_text(board.model_dump_json(indent=1, exclude_none=True) + "\n")
    if failed:
        raise KernelError("not measured: " + "; ".join(failed))


def versions() -> dict[str, str]:
    """This package, torch, and the peers that are installed."""
    found = {"dsv3-plugin": __version__, "torch": torch.__version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    app()
