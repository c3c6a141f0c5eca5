"""vLLM's own rebalancer moves experts of our model: no bit changes, and what reads weights by name finds them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from conftest import TinyCheckpoint
from engines import python_of
from paths import SUPPORT


def on_two_ranks(*arguments: object) -> list[dict[str, Any]]:
    # In a new process: vLLM's CPU worker, once imported, would have its ranks share memory.
    command = python_of("vllm"), "-W", "ignore", SUPPORT / "vllm_eplb.py", *arguments
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert all(isinstance(answer, dict) for answer in answers), answers
    return answers


def test_experts_that_vllm_moves_change_no_bit(tiny_checkpoint: TinyCheckpoint) -> None:
    """In fp8 scales move with their weights; the twin is in bf16."""
    for answer in on_two_ranks(tiny_checkpoint("fp8")):
        assert answer["moved"] and all(answer["equal"])
        assert answer["fingerprint"] and answer["equal_after_update"]
        assert all(len(set(placement)) == 16 and len(placement) == 20 for placement in answer["placements"])
        # Three layers of experts, 40 tokens of 4 each.
        assert answer["loads"][0] == 3 * 40 * 4


def test_rows_that_go_where_an_expert_was_are_caught(tiny_checkpoint: TinyCheckpoint) -> None:
    for answer in on_two_ranks(tiny_checkpoint("bf16"), "maps"):
        first, *others = answer["equal"]  # experts move after the first pass, and later again
        assert first and not any(others)
