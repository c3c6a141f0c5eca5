"""The scoreboard without a GPU: what is made of records, and the comparison of rows over batches."""

from __future__ import annotations

import subprocess

import pytest
import torch
from engines import python_of
from typer.testing import CliRunner

from dsv3_plugin.commands.cli import app
from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels.bench import scoreboard
from dsv3_plugin.kernels.bench.measure import Rows, compare_rows, differing_bits
from dsv3_plugin.kernels.bench.scoreboard import Record, Scoreboard

TIMED = {"low_us": 9.0, "high_us": 13.0}


def record(contender: str, role: str, median: float | None, **more: object) -> Record:
    known = {"group": "dense", "case": "fp8 1 x 2112 x 7168", "floor_us": 5.0}
    timed = TIMED if median else {"absent": "it is not installed"}
    return Record.model_validate({**known, "contender": contender, "role": role, "median_us": median, **timed, **more})


RECORDS = (
    record("ours", "ours", 10.0, workspace_bytes=2_500_000, rows_compared=1000, rows_differ=0),
    record("slow", "peer", 40.0, differs=3, outputs=2112),
    record("fast", "peer", 8.0, differs=0, outputs=2112),
    record("missing", "peer", None),
    record("fast", "invariant", 5.5),
)
BOARD = Scoreboard(card="H200", versions={"torch": "2.11.0"}, records=RECORDS)


def test_a_row_compares_ours_with_the_fastest_peer():
    row = scoreboard.row(list(RECORDS))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["fp8 1 x 2112 x 7168", "5.0", "10.0 (9.0-13.0)", "2.00"]
    assert cells[4] == "1.25", "ours / fast; neither the slow peer nor an invariant mode is the best peer"
    assert cells[5:7] == ["ours", "1.25"]
    assert cells[7:9] == ["0 of 1.0 k", "2.5 MB"]
    assert cells[9].startswith("slow 40.0 (9.0-13.0), 3 bits; fast 8.0") and "missing absent (it is not" in cells[9]
    assert cells[10:] == ["fast 5.5 (9.0-13.0)", "-"]


def test_a_row_without_peers_claims_no_ratio():
    assert "| 2.00 | - | ours | - | 0 of 1.0 k |" in scoreboard.row([RECORDS[0], RECORDS[3]])


def test_what_a_model_runs_may_be_anothers_kernel():
    model = record("served", "served", 7.6, differs=0, outputs=2112)
    assert "| 1.25 | 7.6 (9.0-13.0) | 0.95 |" in scoreboard.row([RECORDS[0], model, *RECORDS[1:]])
    title, line = scoreboard._lines(BOARD.model_copy(update={"records": (*RECORDS, model)}))
    assert title.is_title and title.name.startswith("fp8 projections")
    assert (line.model, line.invariant, line.floor) == (7.6 / 8, 5.5 / 8, 5 / 8)
    without_peers = BOARD.model_copy(update={"records": (RECORDS[0], RECORDS[3])})
    assert scoreboard._lines(without_peers) == []


def test_report_writes_tables_and_overwrites_nothing(tmp_path):
    data, table = tmp_path / "data.json", tmp_path / "table.md"
    data.write_text(BOARD.model_dump_json())
    arguments = ["bench", "report", str(data), "--markdown", str(table)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert scoreboard.row(list(RECORDS)) in table.read_text() and "## fp8 projections" in table.read_text()
    table.write_text("mine")
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, KernelError) and "table.md exists" in str(refused.exception)
    assert table.read_text() == "mine"
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert table.read_text() != "mine"
    refused = CliRunner().invoke(app, [*arguments[:3], "--plot", str(tmp_path / "plot.pdf")])
    assert isinstance(refused.exception, KernelError) and "ends in .svg or .png" in str(refused.exception)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "the file: Invalid JSON"), ('{"card": "H200"}', "versions: Field required"), (None, "cannot be read")],
)
def test_report_names_a_file_that_is_no_scoreboard(tmp_path, text, said):
    data = tmp_path / "data.json"
    if text is not None:
        data.write_text(text)
    result = CliRunner().invoke(app, ["bench", "report", str(data)])
    assert isinstance(result.exception, KernelError)
    assert "data.json" in str(result.exception) and said in str(result.exception)


def test_the_plot_names_every_case(tmp_path):
    """In Megatron's environment, which has matplotlib."""
    data, plot = tmp_path / "data.json", tmp_path / "plot.svg"
    data.write_text(BOARD.model_dump_json())
    command = [
        python_of("megatron"),
        "-m",
        "dsv3_plugin.commands.cli",
        "bench",
        "report",
        str(data),
        "--plot",
        str(plot),
    ]
    code = f"import sys; sys.argv[1:] = {command[3:]!r}; from dsv3_plugin.commands.cli import main; main()"
    subprocess.run([command[0], "-c", code], check=True)
    text = plot.read_text()
    assert all(
        f"<!-- {case} -->" in text
        for case in ("fp8 1 x 2112 x 7168", "fp8 projections: tokens x columns x depth", "the fastest public kernel")
    )


def test_rows_that_do_not_know_each_other_compare_equal():
    table = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    found = compare_rows(Rows(500, lambda rows: table[rows] * 2, lambda: table * 2))
    assert found.differ == 0 and found.compared > 500 * 8


@pytest.mark.parametrize("kind", ["mates", "number", "together"])
def test_rows_that_know_their_batch_are_caught(kind):
    table = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))

    def of(rows: torch.Tensor) -> torch.Tensor:
        out = table[rows] * 2
        if kind == "mates":
            out = out + table[rows].sum() * 1e-3
        if kind == "number" and len(rows) < 16:
            out = torch.nextafter(out, torch.tensor(9.0))
        return out

    together = (lambda: torch.nextafter(table * 2, torch.tensor(9.0))) if kind == "together" else None
    assert compare_rows(Rows(500, of, together)).differ > 0


def test_bits_of_negative_zero_and_nan_count():
    zero = torch.zeros(3)
    assert differing_bits(zero, -zero) == 3
    assert differing_bits(zero * torch.nan, zero * torch.nan) == 0
    assert differing_bits(zero, zero.bfloat16()) is None
    assert differing_bits((zero, zero), (zero, -zero)) == 3
    assert differing_bits((zero, zero), (zero, zero[:2])) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_without_a_gpu_says_so():
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert isinstance(result.exception, KernelError) and "no CUDA device here" in str(result.exception)
