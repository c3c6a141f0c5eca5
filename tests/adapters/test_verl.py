"""verl with this model: its own trainer engine, weight transfer, vLLM worker and metric, on a CPU."""

from __future__ import annotations

import json

import pytest
from conftest import TinyCheckpoint
from engines import ENVIRONMENTS, warm
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


ARGUMENTS = """
import sys
from sglang.srt.server_args import ServerArgs

def build():
    try:
        ServerArgs(sys.argv[1], device="cpu", attention_backend="dsv3", enable_deterministic_inference=True)
        print("accepted")
    except ValueError as error:
        print("refused", error)

build()
import dsv3_plugin.hosts.verl
build()
"""


def test_verls_server_builds_sglangs_arguments_with_our_attention(tiny_checkpoint: TinyCheckpoint) -> None:
    done = warm("sglang-0.5.17", "-c", ARGUMENTS, tiny_checkpoint("bf16"))
    before, after = (line for line in done.stdout.splitlines() if line.startswith(("accepted", "refused")))
    assert before.startswith("refused Currently only") and after == "accepted", printed(done)


def _is_json(line: str) -> bool:
    return line.startswith('{"what"')
