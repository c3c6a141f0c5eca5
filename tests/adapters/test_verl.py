"""verl with this model: its own trainer engine, weight transfer, vLLM worker and metric, on a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import megatron_programs
import pytest
from conftest import TinyCheckpoint
from engines import ENVIRONMENTS, free_port, warm
from megatron_programs import fresh, printed
from paths import SUPPORT

PYTHON = ENVIRONMENTS / "verl" / "bin" / "python"
needs_verl = pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing: run `make .envs/verl/.ready`")


VERLS = {
    "": "has no vocab_parallel_log_probs_from_logits, which dsv3-plugin replaces",
    "def vocab_parallel_log_probs_from_logits(): pass\n": "has no MegatronEngine, which dsv3-plugin replaces",
    "def vocab_parallel_log_probs_from_logits(): pass\nclass MegatronEngine: pass\n": "has no _build_tf_config, which",
}


@megatron_programs.needs_megatron
@pytest.mark.parametrize("text", VERLS)
def test_a_version_without_what_is_replaced_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "verl" / "workers" / "engine" / "megatron" / "transformer_impl.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import dsv3_plugin.hosts.verl"
    done = megatron_programs.warm("-c", code, tmp_path)
    assert done.returncode and VERLS[text] in printed(done).strip().splitlines()[-1]


@needs_verl
def test_verls_own_metric_is_exactly_zero(tiny_checkpoint: TinyCheckpoint) -> None:
    done = fresh(PYTHON, SUPPORT / "verl_on_cpu.py", tiny_checkpoint("bf16"))
    found = {line["what"]: line for line in map(json.loads, filter(_is_json, done.stdout.splitlines()))}
    assert list(found) == ["temperature 1.0", "temperature 0.7", "stale weights", "verl's formula"], printed(done)
    for what, line in found.items():
        print(line)
        zero = line["equal"] == line["tokens"] and line["rollout_probs_diff_max"] == 0
        assert zero == what.startswith("temperature"), line
    assert "refused Megatron-Bridge builds its own model" in done.stdout


def on_ranks(checkpoint: Path, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """What verl's engine answers on one rank, or on two that share the model as `sizes` says."""
    launch = "-m", "torch.distributed.run", f"--nproc-per-node={2 if sizes else 1}", f"--master-port={free_port()}"
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = PYTHON, *launch, SUPPORT / "verl_on_ranks.py", checkpoint, json.dumps(sizes)
    done = fresh(*command, PYTHONPATH=path, DSV3_REDUCTION_SLICES="2")
    assert done.returncode == 0, printed(done)[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"log_probs"')]


@needs_verl
def test_ranks_of_verls_engine_have_the_log_probabilities_of_one(tiny_checkpoint: TinyCheckpoint) -> None:
    (alone,) = on_ranks(tiny_checkpoint("bf16"), {})
    for layout in ("expert_model", "pipeline_model", "tensor_model"):
        answers = on_ranks(tiny_checkpoint("bf16"), {f"{layout}_parallel_size": 2})
        print(layout, answers)
        assert {answer["log_probs"] for answer in answers} - {None} == {alone["log_probs"]}
        # Each rank is given the whole model; stages learn the bits of one rank, others add gradients in another order.
        sent = {answer["sent"] for answer in answers}
        assert len(sent) == 1 and {answer["tensors"] for answer in answers} == {alone["tensors"]}
        assert (sent == {alone["sent"]}) == (layout == "pipeline_model")


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
