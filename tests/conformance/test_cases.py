"""The suite's cases on a model whose context is short."""

from __future__ import annotations

import pytest

from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.cases import LENGTHS, MANY, MIN_LENGTH, crowd_cases, fit, long_cases, make_cases
from dsv3_plugin.conformance.protocol import Job
from dsv3_plugin.errors import ConformanceError

CASES = make_cases(range(5000), with_mtp=True)


def longest(cases: tuple) -> int:
    requests = [request for case in cases for requests in case.rounds for request in requests]
    return max(len(request.prompt_token_ids) + request.max_tokens for request in requests)


@pytest.mark.parametrize("length", [MIN_LENGTH, 200, 4096])
def test_cases_fit_the_models_length(length: int) -> None:
    fitted = fit(CASES, length)
    assert longest(fitted) <= length - 8 and longest(CASES) > 300
    assert [case.name for case in fitted] == [case.name for case in CASES]
    if length == 4096:
        assert fitted == CASES
    for case in fitted:
        for request in case.rounds[-1]:
            # What is found in the cache, and a token more, is still in the prompt.
            assert len(request.prompt_token_ids) > case.min_cached_tokens
    prompts = [r.prompt_token_ids for case in fitted for requests in case.rounds for r in requests]
    assert all(len(prompt) > 0 for prompt in prompts)


def test_a_model_that_is_too_short_is_named() -> None:
    message = rf"max_position_embeddings is {MIN_LENGTH - 1}; the cases need {MIN_LENGTH}"
    with pytest.raises(ConformanceError, match=message):
        fit(CASES, MIN_LENGTH - 1)


def test_long_cases_go_as_far_as_the_model() -> None:
    """And on a CPU only to the first border."""
    text = range(140_000)

    def config(**changes: int) -> DeepseekV3Config:
        return DeepseekV3Config.from_dict(read_config("traps") | changes)

    found = [longest(long_cases(text, device, config())) for device in ("cpu", "cuda")]
    assert found == [LENGTHS["cpu"][-1] + 5, 131_072 + 5]
    assert [case.name for case in long_cases(text, "cuda", config(max_position_embeddings=40_000))] == [
        "long_1024",
        "long_4096",
        "long_32768",
    ]
    assert long_cases(text, "cpu", config(max_position_embeddings=1024)) == ()
    assert [c.name for c in long_cases(text, "cuda", config(vocab_size=129_280))] == ["long_1024"]
    for case in long_cases(text, "cuda", config()):
        (first,), last = case.rounds
        assert len(first.prompt_token_ids) < int(case.name[5:]) < len(first.prompt_token_ids) + first.max_tokens
        assert case.max_num_batched_tokens is not None and case.max_num_batched_tokens <= 2048
        assert all(len(request.prompt_token_ids) > case.min_cached_tokens for request in last)
        assert fit((case,), 163_840) == (case,)


def test_engines_are_told_how_much_is_to_come() -> None:
    cases = crowd_cases(range(200)) + long_cases(range(2000), "cpu", DeepseekV3Config.from_dict(read_config("tiny")))
    job = Job(checkpoint="", block_size=32, cases=cases)
    assert (job.longest, job.most_requests) == (1029, MANY)
    assert [len(requests) for requests in cases[0].rounds] == [1, 3, 65, 256]
