"""The report's recipe on a card, with TransformerEngine's Adam and copies on a stream of their own: 49 steps twice, and
cut in their middle, learn the same bits, and so does the average of the weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from engines import free_port
from hopper_card import needs_hopper
from paths import SUPPORT

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader

CALL = f"""import runpy, sys
sys.path.insert(0, {str(SUPPORT)!r})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="script")["main"]()"""
CONVERT = "from dsv3_plugin.commands.cli import main; main()"
needs_trainer = pytest.mark.skipif(
    find_spec("megatron") is None or sys.version_info < (3, 12),
    reason="Megatron's loop needs megatron-core and Python 3.12 in the environment that runs the tests",
)


@needs_hopper
@needs_trainer
@pytest.mark.parametrize("moments", ["bf16", "fp32"])
def test_runs_repeat_and_continue(moments: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")

    def python(program: str, *arguments: object) -> str:
        words = [sys.executable, "-c", program, *map(str, arguments)]
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        ports = {"MASTER_PORT": str(free_port()), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | world | ports, timeout=1200)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    def run(name: str, load: Path) -> tuple[Fingerprint, Fingerprint]:
        """Weights, and their average."""
        file, save = tmp_path / f"{name}.json", tmp_path / name
        model = "--hf-config", checkpoint, "--tokenizer-type", "NullTokenizer", "--vocab-size", 1023, "--mock-data"
        size = "--micro-batch-size", 2, "--global-batch-size", 10, "--seq-length", 64, "--train-samples", 460
        recipe = "--report-recipe", "--lr", 1e-3, "--exp-avg-dtype", moments, "--exp-avg-sq-dtype", moments
        folders = "--ema-decay", 0.9, "--load", load, "--save", save, "--save-interval", 25
        flags = *model, *size, *recipe, *folders, "--eval-iters", 0, "--eval-interval", 1000
        python(CALL, SUPPORT / "pretrain_probe.py", file, *flags)
        python(CONVERT, "convert", "to-hf", save / "ema", tmp_path / f"{name} average", "--like", checkpoint)
        average = fingerprint_of_checkpoint(CheckpointReader(tmp_path / f"{name} average"))
        return Fingerprint.model_validate_json(file.read_text()), average

    python(CONVERT, "convert", "to-megatron", checkpoint, tmp_path / "converted")
    first = run("first", tmp_path / "converted")
    assert run("second", tmp_path / "converted") == first
    (tmp_path / "second" / "latest_checkpointed_iteration.txt").write_text("25")
    assert run("rest", tmp_path / "second") == first
    assert first[0] != first[1]
