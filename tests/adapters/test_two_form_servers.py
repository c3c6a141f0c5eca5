"""Servers in the `two_form` profile: a row is a prompt's by its position in its request, whatever the schedule."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engines import REFERENCE, run, shipped_testee, warm_testee
from paths import SUPPORT

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.protocol import Case, Request
from dsv3_plugin.profile import ATTENTION_VARIABLE

TinyCheckpoint = Callable[[str], Path]
SCHEDULES = "prefill", "batch", "chunked_prefill", "prefix_cache_chunked", "mtp_2", "sampler_mtp_2"
AGAIN = "prefix_cache_chunked", "mtp_2"


@pytest.fixture(autouse=True)
def in_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")


def engine(environment: str, *words: str) -> runner.TesteeCommand:
    name = environment.partition("-")[0]
    program = str(SUPPORT / "two_form_testee.py")
    return replace(warm_testee(environment, program, name, *words), name="-".join((name, *words)))


@pytest.mark.parametrize(
    ("environment", "dtype", "cases"),
    [
        ("vllm", "bf16", SCHEDULES),
        ("vllm", "fp8", AGAIN),
        ("vllm-0.27.1", "bf16", AGAIN),
        ("sglang", "bf16", SCHEDULES),
        ("sglang", "fp8", AGAIN),
        ("sglang-0.5.17", "bf16", AGAIN),
    ],
)
def test_a_server_prints_the_reference_s_bits(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, environment: str, dtype: str, cases: tuple[str, ...]
) -> None:
    report = run([REFERENCE, shipped_testee(environment)], tiny_checkpoint(dtype), tmp_path, *cases)
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    name = environment.partition("-")[0]
    assert report.profile == f"{dtype} two_form" == report.results[name].served.profile
    assert report.results[name].served.kernels == report.results["reference"].served.kernels
    for verdict in report.verdicts:
        pair = verdict.between("reference", name)
        assert pair is not None and pair.equal_rows > 500, verdict.case.name
        last_drafts = verdict.case.num_speculative_tokens * len(verdict.case.requests)
        assert verdict.case.samples or verdict.rows_alone[name] <= last_drafts, verdict.case.name
    outcomes = {case.name: case for case in report.results[name].cases}
    hits = min(request.num_cached_tokens for request in outcomes["prefix_cache_chunked"].requests[1:])
    assert hits == (96 if name == "vllm" else 0)
    assert 0 < outcomes["mtp_2"].num_accepted_tokens < outcomes["mtp_2"].num_draft_tokens


CUT = Case(
    name="cut",
    title="prompts whose last chunk is a token",
    rounds=tuple((Request(prompt_token_ids=tuple(range(300, 300 + n)), max_tokens=3),) for n in (17, 33)),
    max_num_batched_tokens=16,
)


@pytest.mark.parametrize("environment", ["vllm", "sglang"])
def test_rows_told_apart_by_the_schedule_are_caught(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str
) -> None:
    monkeypatch.setattr(runner, "cases_of", lambda *_: (CUT,))
    wrong = engine(environment, "schedule")
    (verdict,) = run([REFERENCE, shipped_testee(environment), wrong], tiny_checkpoint("bf16"), tmp_path).verdicts
    own, caught = (verdict.between("specification", name) for name in (environment, wrong.name))
    assert own is not None and own.equal
    assert caught is not None and caught.first_difference is not None
    assert (caught.first_difference.request, caught.first_difference.position) == (0, 16)


PROMPTS = tuple(tuple(range(first, first + 40)) for first in (300, 400, 500))
CROWDED = Case(
    name="crowded",
    title="three requests where two have room",
    rounds=(tuple(Request(prompt_token_ids=prompt, max_tokens=44) for prompt in PROMPTS),),
    num_speculative_tokens=1,
)


@pytest.mark.parametrize(
    ("environment", "sent_back"), [("vllm", r"sent back: [1-9]"), ("sglang", "Retract requests|retracted")]
)
def test_a_request_that_is_sent_back_has_the_same_bits(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
    sent_back: str,
) -> None:
    """It is computed again with what it had generated, in one pass. The twin takes all of that for the prompt."""
    monkeypatch.setattr(runner, "cases_of", lambda *_: (CROWDED,))
    own, wrong = engine(environment, "sent_back"), engine(environment, "sent_back", "phase")
    report = run([REFERENCE, own, wrong], tiny_checkpoint("bf16"), tmp_path)
    (verdict,) = report.verdicts
    equal, different = (verdict.between("specification", testee.name) for testee in (own, wrong))
    assert equal is not None and equal.equal, equal
    assert different is not None and different.different_rows > 0
    assert re.search(sent_back, (tmp_path / "kept" / own.name / "log.txt").read_text())


def test_vllm_s_prefix_cache_finds_no_generated_token_for_another_prompt(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that goes on with an answer finds the page of the first prompt. The twin finds one of the answer."""
    first = Request(prompt_token_ids=PROMPTS[0], max_tokens=40)

    def turns(*requests: Request) -> None:
        case = Case(name="turns", title="two turns of a conversation", rounds=tuple((request,) for request in requests))
        monkeypatch.setattr(runner, "cases_of", lambda *_: (case,))

    checkpoint, shared = tiny_checkpoint("bf16"), engine("vllm", "shared")
    turns(first)
    answer = run([REFERENCE], checkpoint, tmp_path / "first").results["reference"].cases[0].requests[0].token_ids
    turns(first, Request(prompt_token_ids=(*answer, 7, 8, 9), max_tokens=3))
    report = run([REFERENCE, shipped_testee("vllm"), shared], checkpoint, tmp_path / "second")
    (verdict,) = report.verdicts
    own, wrong = (verdict.between("specification", name) for name in ("vllm", shared.name))
    assert own is not None and own.equal and wrong is not None and wrong.different_rows > 0
    cached = {name: result.cases[0].requests[1].num_cached_tokens for name, result in report.results.items()}
    assert cached == {"reference": 32, "vllm": 32, shared.name: 64}
