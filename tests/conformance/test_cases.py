"""The suite's cases on a model whose context is short."""

from __future__ import annotations

import pytest

from dsv3_plugin.conformance.cases import MIN_LENGTH, fit, make_cases
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
