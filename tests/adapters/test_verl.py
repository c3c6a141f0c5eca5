"""verl with this model: its own trainer engine, weight transfer, vLLM worker and metric, on a CPU."""

from __future__ import annotations

import json

import pytest
from conftest import TinyCheckpoint
from engines import ENVIRONMENTS
from megatron_programs import fresh, printed
from paths import SUPPORT

PYTHON = ENVIRONMENTS / "verl" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing: run `make .envs/verl/.ready`")
def test_verls_own_metric_is_exactly_zero(tiny_checkpoint: TinyCheckpoint) -> None:
    done = fresh(PYTHON, SUPPORT / "verl_on_cpu.py", tiny_checkpoint("bf16"))
    found = {line["what"]: line for line in map(json.loads, filter(_is_json, done.stdout.splitlines()))}
    assert list(found) == ["temperature 1.0", "temperature 0.7", "stale weights", "verl's formula"], printed(done)
    for what, line in found.items():
        print(line)
        zero = line["equal"] == line["tokens"] and line["rollout_probs_diff_max"] == 0
        assert zero == what.startswith("temperature"), line


def _is_json(line: str) -> bool:
    return line.startswith('{"what"')
