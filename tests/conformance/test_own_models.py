"""The model that an engine has itself, as a testee that claims closeness."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.protocol import Case, Device, Job, Served
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
    monkeypatch.setattr(runner.TesteeCommand, "_of_engine", staticmethod(lambda name, environments: ("python", name)))
    found = runner.TesteeCommand.parse("vllm-own", tmp_path)
    assert found.name == "vllm-own"
    assert found.command == ("env", "DSV3_PLUGIN=off", "python", "vllm", "--own-model")
    assert runner.TesteeCommand.parse("vllm", tmp_path).command == ("python", "vllm")
    with pytest.raises(ConformanceError, match=r"unknown; the suite has reference, core, vllm, .*sglang-own"):
        runner.TesteeCommand.parse("megatron-own", tmp_path)
