"""`dsv3 bench engines` with real engines on a small model: a rehearsal, whose times mean nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from boards import DECODE, OURS, STOCK, board
from conftest import TinyCheckpoint
from engines import environments_of, python_of, warm_command
from typer.testing import CliRunner

from dsv3_plugin.commands.bench import app
from dsv3_plugin.commands.engines import JSON, MARKDOWN
from dsv3_plugin.engine_bench.judge import Board
from dsv3_plugin.profile import SLICES_VARIABLE


def bench(checkpoint: Path, out: Path, engine: str, *arguments: object, batch: int = 3) -> tuple[int, Board]:
    """Of one engine, whose programs run in forks."""
    environments = environments_of({engine: warm_command(engine)}, out.with_name("environments"))
    options = "--environments", environments, "--device", "cpu", "--out", out, "--context", 24, "--batch", batch
    sizes = "--steps", 4, "--passes", 2
    command = ["engines", checkpoint, *options, *sizes, *arguments]
    done = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    return done.exit_code, Board.model_validate(json.loads((out / JSON).read_text()))


@pytest.mark.parametrize(("engine", "way"), [("vllm", "two-form"), ("sglang", "strict")])
def test_ours_is_measured(engine: str, way: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    status, board = bench(
        tiny_checkpoint("bf16"),
        tmp_path / "run",
        engine,
        *("--contender", f"{engine}-{way}", "--prefill", "2x40/32", "--drafts", 2, "--acceptance", 0.5),
    )
    [ours] = board.records
    assert status == 0, (ours.failure, (tmp_path / "run" / MARKDOWN).read_text())
    rows = {str(row.measurement): row for row in ours.rows}
    assert list(rows) == [str(measurement) for measurement in board.measurements]
    assert all(row.absent is None for row in ours.rows), [row.absent for row in ours.rows]
    forced = [name for name, row in rows.items() if row.measurement.forced]
    assert all(rows[name].as_forced and rows[name].finite for name in forced)
    # Of the same arithmetic as the reference: whatever its schedule, graphs and drafts.
    assert {name: ours.distances[name] for name in forced} == dict.fromkeys(forced, 0.0)
    plain, drafted = rows["decode 3 at 24"], rows["decode 3 at 24, 2 drafts, 50% right"]
    assert plain.tokens_per_step == 1
    assert drafted.tokens_per_step is not None and 1 < drafted.tokens_per_step < 3
    for row in (plain, drafted):
        assert row.experts is not None and len(row.experts) == board.model.expert_layers
        assert all(board.model.experts_per_token <= count <= board.model.experts for count in row.experts)
    assert ours.start is not None and ours.start.cache_bytes_per_token is not None
    assert ours.start.cache_bytes_per_token == pytest.approx(board.model.cached_bytes * board.model.layers, rel=0.05), (
        "of the start without drafts"
    )
    assert board.rehearsal


@pytest.mark.parametrize(("engine", "layout"), [("vllm", "dp=2,ep=2"), ("sglang", "dp=2,ep=2"), ("sglang", "tp=2")])
def test_ranks_are_measured(
    engine: str, layout: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data parallelism one of the two has no request, and goes along."""
    monkeypatch.setenv(SLICES_VARIABLE, "2")
    arguments = "--contender", f"{engine}-strict", "--only", "decode", "--layout", layout
    status, board = bench(tiny_checkpoint("bf16"), tmp_path / "run", engine, *arguments, batch=1)
    [ours] = board.records
    assert status == 0, (ours.failure, (tmp_path / "run" / MARKDOWN).read_text())
    [row] = ours.rows
    assert row.absent is None and row.as_forced and row.finite and row.tokens_per_step == 1
    assert row.experts == (board.model.experts_per_token,) * board.model.expert_layers
    assert list(ours.distances.values()) == [0.0]
    assert board.layout == layout and f"layout {layout} of 2 ranks" in (tmp_path / "run" / MARKDOWN).read_text()


def test_the_plot_names_what_is_compared(tmp_path: Path) -> None:
    """In Megatron's environment, which has matplotlib."""
    data, drawn = tmp_path / "board.json", tmp_path / "plot.svg"
    data.write_text(board(STOCK, OURS).model_dump_json())
    code = (
        "import sys; from pathlib import Path; from dsv3_plugin.engine_bench import judge, plot;"
        "plot.draw(judge.Board.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
    )
    subprocess.run([python_of("megatron"), "-c", code, str(data), str(drawn)], check=True)
    text = drawn.read_text()
    assert all(f"<!-- {words} -->" in text for words in (f"vllm: {DECODE}", "strict", "Engines on one H200 1"))
