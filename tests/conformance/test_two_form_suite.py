"""The suite in the `two_form` profile: a row is a prompt's or a generated token's, whatever the schedule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import REFERENCE, run
from paths import SUPPORT

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.protocol import Case, Request
from dsv3_plugin.profile import ATTENTION_VARIABLE

TinyCheckpoint = Callable[[str], Path]
CORE = runner.TesteeCommand("core", (sys.executable, "-m", "dsv3_plugin.conformance.testees.core"))
SCHEDULES = "batch", "chunked_prefill", "prefix_cache_chunked", "mtp_2", "sampler_mtp_2", "mtp_prefix_cache"


@pytest.fixture(autouse=True)
def in_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")


def sabotaged(sabotage: str) -> runner.TesteeCommand:
    return runner.TesteeCommand(sabotage, (sys.executable, str(SUPPORT / "sabotaged_testee.py"), sabotage))


def test_every_schedule_is_the_specification(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """And rows told apart by the schedule are caught, in every case that has a chunk of one token or a draft."""
    report = run([REFERENCE, sabotaged("schedule")], tiny_checkpoint("fp8"), tmp_path, *SCHEDULES)
    assert report.profile == "fp8 two_form" == report.results["reference"].served.profile
    assert "head_attention" in report.results["reference"].served.kernels
    for verdict in report.verdicts:
        own, wrong = (verdict.between("specification", name) for name in ("reference", "schedule"))
        assert own is not None and own.equal and own.equal_rows > 1000, verdict.case.name
        assert wrong is not None and wrong.equal != bool(verdict.case.num_speculative_tokens), verdict.case.name
        assert not any(fault.text for fault in verdict.faults if "schedule" not in fault.testees)
    cases = {case.name: case for case in report.results["reference"].cases}
    for name, cached in ("prefix_cache_chunked", 96), ("mtp_prefix_cache", 64):
        assert min(request.num_cached_tokens for request in cases[name].requests[1:]) >= cached
    assert 0 < cases["mtp_2"].num_accepted_tokens < cases["mtp_2"].num_draft_tokens


def test_a_server_s_sequences_are_computed_again_with_their_prompts(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: as prompts alone, which are other numbers from the first generated token on."""
    report = run([CORE], tiny_checkpoint("bf16"), tmp_path, "sampled")
    assert report.passed, report.verdicts
    finished = runner._finished

    def forgotten(case: Case, result: runner.Result) -> Case:
        known = finished(case, result)
        rounds = tuple(
            (
                request.model_copy(
                    update={
                        "prompt_token_ids": request.prompt_token_ids + request.generated_token_ids,
                        "generated_token_ids": (),
                    }
                ),
            )
            for (request,) in known.rounds
        )
        return known.model_copy(update={"rounds": rounds})

    monkeypatch.setattr(runner, "_finished", forgotten)
    (verdict,) = run([CORE], tiny_checkpoint("bf16"), tmp_path / "twin", "sampled").verdicts
    first = verdict.comparisons[0].first_difference
    assert first is not None and first.position == min(len(r.prompt_token_ids) for r in verdict.case.requests)


def test_an_answer_is_another_row_in_the_next_prompt(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no page with generated tokens serves a prompt. The twin keeps them."""
    prompt = tuple(range(300, 340))
    first = Request(prompt_token_ids=prompt, max_tokens=40)

    def case(*rounds: tuple[Request, ...]) -> Case:
        return Case(name="turns", title="two turns of a conversation", rounds=rounds, prompt_logits=True)

    checkpoint = tiny_checkpoint("bf16")
    monkeypatch.setattr(runner, "cases_of", lambda *_: (case((first,)),))
    report = run([REFERENCE], checkpoint, tmp_path / "first")
    answered = report.results["reference"].cases[0].requests[0].token_ids
    second = Request(prompt_token_ids=(*answered, 7, 8, 9), max_tokens=3)
    monkeypatch.setattr(runner, "cases_of", lambda *_: (case((first,), (second,)),))
    (verdict,) = (found := run([REFERENCE, sabotaged("shared")], checkpoint, tmp_path / "second")).verdicts
    own, shared = (verdict.between("specification", name) for name in ("reference", "shared"))
    assert own is not None and own.equal and shared is not None and shared.different_rows > 0
    cached = {name: result.cases[0].requests[1].num_cached_tokens for name, result in found.results.items()}
    assert cached == {"reference": 32, "shared": 64}
