"""`dsv3 bench train` with Megatron on a small model: a rehearsal, whose times mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import ENVIRONMENTS
from megatron_programs import needs_megatron
from typer.testing import CliRunner

from dsv3_plugin.commands.bench import app
from dsv3_plugin.commands.train import JSON, MARKDOWN
from dsv3_plugin.train_bench.board import Board

pytestmark = needs_megatron

PARTS = {
    *(f"{part}, {way}" for part in ("attention", "dense", "experts", "head") for way in ("forward", "backward")),
    *(f"{part}, {way}" for part in ("routing", "shared expert") for way in ("forward", "backward")),
    *("experts, wgrad", "optimizer", "rest"),
}


def test_ours_trains_and_theirs_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = "--tokens", 24, "--steps", 3, "--profiled", 1, "--lr", 0.01
    who = "--contender", "strict", "--contender", "te", "--device", "cpu", "--environments", ENVIRONMENTS
    command = ["train", "tiny", "--out", out, *sizes, *who]
    done = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    board = Board.model_validate(json.loads((out / JSON).read_text()))
    ours, theirs = board.records
    assert (ours.start is not None and "fp8 ue8m0" in ours.start.model) or "fp8" in ours.start.model
    assert len(ours.steps) == 3 and ours.losses[-1] < ours.losses[0] == pytest.approx(6.93, abs=0.1)
    assert ours.end is not None and set(ours.end.parts) == PARTS
    assert ours.end.profiled_seconds == pytest.approx(sum(ours.end.parts.values()))
    assert theirs.start is None and not theirs.steps
    page = (out / MARKDOWN).read_text()
    assert "te: 0 steps: testee te failed with status 2: error: Megatron's own layers need TransformerEngine" in page
