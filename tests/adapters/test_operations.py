"""What every operation of an engine's model computes, recorded in a real engine: the reference's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from engines import warm
from megatron_programs import PYTHON, fresh, needs_megatron

from dsv3_plugin.conformance.calls import read_call
from dsv3_plugin.conformance.cases import BLOCK_SIZE
from dsv3_plugin.conformance.protocol import Capture, Case, Job, Request, call_file, prefix_digest, write_message
from dsv3_plugin.conformance.taps import operation_of
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.reference import ReferenceTestee
from dsv3_plugin.diff.calls import blame, differences
from dsv3_plugin.diff.report import compare
from dsv3_plugin.diff.sides import Side, read_side
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.profile import ATTENTION_VARIABLE

TOKENS = tuple(range(5, 46))
STREAMS = {"absorbed": "layers.1.self_attn/mla_attention", "two_form": "layers.1.self_attn.o_proj/linear"}
"""A form of attention to the operation whose call is saved."""
GAPS = {"permute", "grouped_linear"}
"""What Megatron's dispatcher has no stream of."""


def operations_of(side: Side) -> set[str | None]:
    return {operation_of(stream) for stream in side.rows["prompt"].streams} - {None}


@pytest.mark.parametrize("attention", STREAMS)
@pytest.mark.parametrize("engine", ["vllm", "sglang", pytest.param("megatron", marks=needs_megatron)])
def test_operations_in_an_engine(
    engine: str, attention: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTENTION_VARIABLE, attention)
    request = Request(prompt_token_ids=TOKENS, max_tokens=2, prompt_logprobs=True)
    job = Job(
        checkpoint=str(tiny_checkpoint("bf16")),
        block_size=BLOCK_SIZE,
        cases=(Case(name="prompt", title="a prompt", rounds=((request,),), prompt_logits=True),),
        operations=True,
        capture=Capture(case="prompt", stream=STREAMS[attention], prefix=prefix_digest(TOKENS[:30])),
    )
    write_message(job, tmp_path)
    testee = f"import runpy; runpy.run_module('dsv3_plugin.conformance.testees.{engine}', run_name='__main__')"
    command = "-c", testee, tmp_path, tmp_path / engine
    done = fresh(PYTHON, *command) if engine == "megatron" else warm(engine, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    program.run_job(ReferenceTestee, job, tmp_path / "reference")

    reference, other = read_side(tmp_path / "reference"), read_side(tmp_path / engine)
    found = compare(reference, other)
    assert found.equal, found.verdict
    gaps = GAPS if engine == "megatron" else set()
    assert operations_of(reference) - operations_of(other) == gaps
    assert found.steps[-1].found["rows"] > 3000

    # The call that the job wants: of one request, with the same keys in whatever pages.
    left, right = (read_call(call_file(tmp_path / name)) for name in ("reference", engine))
    is_itself, text = blame(left, right, ("reference", engine))
    op = operations()[operation_of(STREAMS[attention])]
    assert is_itself and text.startswith(f"{op.name} is given the same arguments, every bit"), text
    assert not list(differences(right, right.again(op)))
