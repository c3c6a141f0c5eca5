"""An engine prints in CUDA graphs what it prints without, and goes on with new weights after an update."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import in_graphs
import pytest
import torch
from hopper_card import needs_hopper

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config


@needs_hopper
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("engine", in_graphs.ENGINES)
def test_graphs_print_what_eager_passes_print(engine: str, dtype: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed in this environment")
    for seed, name in enumerate(("served", "before")):
        make_checkpoint(read_config("small"), tmp_path / name, seed, dtype=CheckpointDtype(dtype))
    command = [sys.executable, in_graphs.__file__, engine, str(tmp_path / "served"), "--from", str(tmp_path / "before")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith(engine)))
    assert done.returncode == 0, done.stdout[-3000:]


def test_one_bit_one_token_and_no_graph_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [torch.randn(3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    eager = {"rows": rows, "answer": [(1, 2)], "in_graphs": {"model": 0, "draft": 0}}
    graphs = eager | {"in_graphs": {"model": 2, "draft": 1}}
    assert in_graphs.compare("equal", eager, graphs)
    flip = torch.zeros(3, 8, dtype=torch.int32)
    flip[1, 5] = 1
    bit = [rows[0], (rows[1].view(torch.int32) ^ flip).view(torch.float32)]
    for change in ({"rows": bit}, {"rows": rows[:1]}, {"answer": [(1, 3)]}, {"in_graphs": {"model": 2, "draft": 0}}):
        assert not in_graphs.compare("changed", eager, graphs | change)
    assert "changed: 1 of 6 rows differ" in capsys.readouterr().out
