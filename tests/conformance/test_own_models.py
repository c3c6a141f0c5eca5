"""The model that an engine has itself, as a testee that claims closeness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import TinyCheckpoint

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.programs import Program
from dsv3_plugin.conformance.protocol import (
    Case,
    CaseResult,
    Device,
    Job,
    Request,
    RequestResult,
    Result,
    Served,
    read_job,
)
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.errors import ConformanceError


class Engine:
    name = "engine"
    own_model_devices = ("cuda",)
    schedule_not_followed = None

    def versions(self) -> dict[str, str]:
        return {}

    def served(self) -> Served:
        raise NotImplementedError

    def run(self, case: Case) -> program.Outcome:
        raise NotImplementedError


def job(device: Device) -> Job:
    return Job(checkpoint="", block_size=32, cases=(), device=device)


def test_it_has_another_name_and_claims_closeness() -> None:
    testee = program._with_own_model(lambda job: Engine(), job("cuda"))
    assert (testee.name, testee.claim) == ("engine-own", "closeness")  # type: ignore[attr-defined]


def test_where_it_does_not_run_it_is_refused() -> None:
    with pytest.raises(ConformanceError, match="--own-model: engine's own model runs on cuda, not on cpu"):
        program._with_own_model(lambda job: Engine(), job("cpu"))
    without = type("Without", (Engine,), {"own_model_devices": ()})
    with pytest.raises(ConformanceError, match="--own-model: engine's own model is none"):
        program._with_own_model(lambda job: without(), job("cuda"))


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.TesteeCommand, "_of_engine", staticmethod(lambda *names: ("python", *names[:2])))
    found = runner.TesteeCommand.parse("vllm-own", tmp_path)
    assert found.name == "vllm-own"
    assert found.command == ("env", "DSV3_PLUGIN=off", "python", "vllm", "vllm", "--own-model")
    assert runner.TesteeCommand.parse("vllm", tmp_path).command == ("python", "vllm", "vllm")
    assert runner.TesteeCommand.parse("megatron-te", tmp_path).command == ("python", "megatron", "megatron-te")
    with pytest.raises(ConformanceError, match=r"unknown; the suite has reference, core, vllm, .*sglang-own"):
        runner.TesteeCommand.parse("megatron-own", tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_another_precision_is_computed_on_a_cpu(
    device: Device, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card nothing serves fp32."""
    started: dict[str, Program] = {}

    def run(programs: Mapping[str, Program], progress: object) -> None:
        started.update(programs)

    monkeypatch.setattr(runner, "run_programs", run)
    case = Case(name="one", title="", rounds=((Request(prompt_token_ids=(1, 2), max_tokens=1),),))
    answer = RequestResult(token_ids=(1, 2, 3), num_cached_tokens=0)
    of_case = CaseResult(name="one", requests=(answer,), num_draft_tokens=0, num_accepted_tokens=0, seconds=0)
    served = Served(model_class="engine.Model", draft_class=None, profile="", kernels={})
    result = Result(testee="engine-own", claim="closeness", versions={}, served=served, cases=(of_case,))
    asked = Job(checkpoint=str(tiny_checkpoint("bf16")), block_size=32, cases=(case,), device=device)
    runner._replay(asked, {"engine-own": result}, tmp_path, lambda name, said: None)
    jobs = {name: read_job(program.job_dir) for name, program in started.items()}
    assert {name: job.device for name, job in jobs.items()} == {
        "specification of engine-own": device,
        "fp32 of engine-own": "cpu",
    }
    requests = [job.cases[0].requests[0] for job in jobs.values()]
    assert all((each.prompt_token_ids, each.generated_token_ids) == ((1, 2), (3,)) for each in requests)
