"""What the suite says of log-probabilities and tokens: an honest sampler passes, and every known fault is caught.

No engine runs: rows are random logits that depend on the prefix alone, as a model's do, and answers are those of the
suite's own sampler with one thing wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch

from dsv3_plugin.conformance import logprobs, sampling
from dsv3_plugin.conformance.cases import make_cases
from dsv3_plugin.conformance.compare import Key
from dsv3_plugin.conformance.judging import undue
from dsv3_plugin.conformance.protocol import Case, Request, RequestResult, prefix_digest
from dsv3_plugin.conformance.testees.program import request_result

VOCAB_SIZE = 500
SAMPLER = next(
    case for case in make_cases([i % VOCAB_SIZE for i in range(3000)], with_mtp=False) if case.name == "sampler"
)
Sampler = Callable[[torch.Tensor, Request, list[int]], sampling.Answer]


def row(token_ids: list[int] | tuple[int, ...]) -> torch.Tensor:
    """The logits after a prefix, fp32 [VOCAB_SIZE]."""
    generator = torch.Generator().manual_seed(prefix_digest(token_ids) & 0x7FFFFFFF)
    return 2 * torch.randn(VOCAB_SIZE, generator=generator)


def answers(case: Case, sampler: Sampler = sampling.next_token) -> tuple[list[RequestResult], dict[Key, torch.Tensor]]:
    """What a testee with this sampler answers, and the specification's rows."""
    results, rows = [], {}
    for index, request in enumerate(case.requests):
        tokens = list(request.prompt_token_ids)
        of_prompt = [sampling.prompt_answer(row(tokens[:p]), request, p) for p in range(1, len(tokens))]
        generated = []
        for _ in range(request.max_tokens):
            generated.append(sampler(row(tokens), request, tokens))
            tokens.append(generated[-1].token)
        rows |= {(index, prefix_digest(tokens[:end])): row(tokens[:end]) for end in range(1, len(tokens))}
        results.append(request_result(tokens, generated, of_prompt if request.prompt_logprobs else ()))
    return results, rows


def judge(
    results: list[RequestResult], rows: Mapping[Key, torch.Tensor], case: Case = SAMPLER
) -> logprobs.LogprobComparison:
    return logprobs.judge("testee", case, results, rows, "cpu")


def test_the_definition() -> None:
    """Written out once more, from the row alone."""
    request = Request(prompt_token_ids=(7, 8), max_tokens=2, temperature=0.5, top_k=3, frequency_penalty=0.5)
    case = Case(name="c", title="c", rounds=((request.model_copy(update={"prompt_logprobs": True}),),))
    (result,), _ = answers(case)
    first, second = result.token_ids[2:]
    logits = row((7, 8, first))
    logits[first] -= 0.5
    of_prompt = torch.log_softmax(row((7,)) / torch.tensor(0.5), -1)[8]
    assert result.prompt_logprobs == (float(of_prompt),)
    assert result.logprobs[1] == float(torch.log_softmax(logits / torch.tensor(0.5), -1)[second])
    assert result.logprobs[0] == float(torch.log_softmax(row((7, 8)) / torch.tensor(0.5), -1)[first])
    assert first in row((7, 8)).topk(3).indices


def test_an_honest_sampler_passes() -> None:
    found = judge(*answers(SAMPLER))
    assert (found.different, found.problems) == (0, [])
    # 17 sequences of 8 tokens and two prompts of 4 are scored, each token with the 32 most likely ones.
    assert found.equal == (17 * 8 + 2 * 3) * 33


def without_temperature(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    token = sampling.next_token(logits, request, tokens).token
    adjusted = sampling.adjusted_logits(logits, request, tokens)
    return sampling.answer(torch.log_softmax(adjusted, -1), token, request.top_logprobs)


def renormalized(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    token = sampling.next_token(logits, request, tokens).token
    values = sampling.processed_logprobs(sampling.adjusted_logits(logits, request, tokens), request.temperature)
    if not (kept := sampling.admitted(values, request)).all():
        values = values.masked_fill(~kept, -math.inf).log_softmax(-1)
    return sampling.answer(values, token, request.top_logprobs)


def unadjusted(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    token = sampling.next_token(logits, request, tokens).token
    return sampling.answer(sampling.processed_logprobs(logits, request.temperature), token, request.top_logprobs)


def log_of_softmax(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    token = sampling.next_token(logits, request, tokens).token
    scaled = sampling.adjusted_logits(logits, request, tokens) / (request.temperature or 1)
    return sampling.answer(scaled.softmax(-1).log(), token, request.top_logprobs)


def the_row_before(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    token = sampling.next_token(logits, request, tokens).token
    other = sampling.processed_logprobs(
        sampling.adjusted_logits(row(tokens[:-1]), request, tokens), request.temperature
    )
    return sampling.answer(other, token, request.top_logprobs)


@pytest.mark.parametrize(
    ("sampler", "requests"),
    [
        # Which requests a fault shows in: none but these may differ.
        (without_temperature, {1, 2, 3, 5, 8, 9, 13, 16}),
        (renormalized, {2, 3, 4, 5, 13, 14}),
        (unadjusted, {6, 7, 8, 9}),
        (log_of_softmax, set(range(17))),
        (the_row_before, set(range(17))),
    ],
)
def test_another_number_is_caught_where_it_shows(sampler: Sampler, requests: set[int]) -> None:
    results, rows = answers(SAMPLER, sampler)
    found = judge(results, rows)
    assert found.different > 100
    assert found.problems == []
    assert found.first_difference is not None
    honest, _ = answers(SAMPLER)
    for index in set(range(17)) - requests:
        assert results[index] == honest[index]
    for index in requests:
        assert results[index] != honest[index]


def second_best(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    """A greedy request beside sampled ones is given another token, as where its temperature is left unwritten."""
    adjusted = sampling.adjusted_logits(logits, request, tokens)
    if request.temperature:
        return sampling.next_token(logits, request, tokens)
    return sampling.answer(torch.log_softmax(adjusted, -1), int(adjusted.topk(2).indices[1]), request.top_logprobs)


def uncut(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    whole = request.model_copy(update={"top_k": None, "top_p": 1.0, "min_p": 0.0})
    return sampling.next_token(logits, whole, tokens)


def likeliest(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
    """Drafts that are verified greedily at every temperature answer such tokens."""
    adjusted = sampling.adjusted_logits(logits, request, tokens)
    values = sampling.processed_logprobs(adjusted, request.temperature)
    return sampling.answer(values, int(adjusted.argmax()), request.top_logprobs)


@pytest.mark.parametrize(
    ("sampler", "problem"),
    [
        (second_best, "request 0 (greedy) was given token "),
        (uncut, "request 2 (temperature 1.3, top_k 5) was given token "),
        (likeliest, "all 40 tokens drawn are the most likely ones"),
    ],
)
def test_another_token_is_caught(sampler: Sampler, problem: str) -> None:
    found = judge(*answers(SAMPLER, sampler))
    assert found.different == 0
    assert any(text.startswith(problem) for text in found.problems), found.problems
    kinds = {text.split(" (")[1].split(" ")[0] for text in found.problems if "was given" in text}
    assert kinds <= {"greedy)", "temperature", "repetition_penalty", "frequency_penalty"}


@pytest.mark.parametrize("setting", [{"top_k": 5}, {"top_k": 1}, {"top_p": 0.75}, {"min_p": 0.25}])
def test_each_cut_is_asked_for(setting: dict[str, float]) -> None:
    """A sampler that ignores one of them is caught by that request alone."""
    request = Request(prompt_token_ids=(1, 2), max_tokens=40, temperature=1.0, seed=3, **setting)
    case = Case(name="c", title="c", rounds=((request,),))
    assert judge(*answers(case), case).problems == []
    assert judge(*answers(case, uncut), case).problems != []


def test_the_same_request_must_draw_the_same_tokens() -> None:
    rounds = SAMPLER.rounds

    def drawn_anew(logits: torch.Tensor, request: Request, tokens: list[int]) -> sampling.Answer:
        drawn_anew.seed += 1
        return sampling.next_token(logits, request.model_copy(update={"seed": drawn_anew.seed}), tokens)

    drawn_anew.seed = 0
    assert len(rounds) == 3
    found = judge(*answers(SAMPLER, drawn_anew))
    assert [text for text in found.problems if text.startswith("requests 1 and 16 are the same and drew other tokens")]


class TestAnswersThatLackSomething:
    """None of them is passed over."""

    @pytest.fixture
    def honest(self) -> tuple[list[RequestResult], dict[Key, torch.Tensor]]:
        return answers(SAMPLER)

    @pytest.mark.parametrize(
        ("change", "different"),
        [
            ({"logprobs": ()}, 8),
            ({"top_logprobs": ()}, 8 * 32),
            ({"prompt_logprobs": (), "prompt_top_logprobs": ()}, 3 * 33),
        ],
    )
    def test_missing_values_differ(self, honest, change: dict[str, tuple], different: int) -> None:
        results, rows = honest
        results[1] = results[1].model_copy(update=change)
        assert judge(results, rows).different == different

    def test_a_likelier_token_that_is_left_out(self, honest) -> None:
        results, rows = honest
        first, *others = results[0].top_logprobs
        values = sampling.processed_logprobs(row(results[0].token_ids[:4]), 0)
        beyond = values.topk(33).indices[32]
        results[0] = results[0].model_copy(
            update={"top_logprobs": ((*first[1:], (int(beyond), float(values[beyond]))), *others)}
        )
        # Each is right of its token; from the first rank on they are not the most likely ones.
        assert judge(results, rows).different == 32

    def test_nan_and_infinity(self, honest) -> None:
        results, rows = honest
        results[0] = results[0].model_copy(update={"logprobs": (math.nan, -math.inf, *results[0].logprobs[2:])})
        found = judge(results, rows)
        assert found.different == 2
        assert "nan, by the definition it is -" in found.first_difference
        assert "NaN" in results[0].model_dump_json()
        assert RequestResult.model_validate_json(results[0].model_dump_json()).logprobs[1] == -math.inf

    def test_what_is_declined_is_not_judged_and_greedy_requests_cannot_be(self, honest) -> None:
        results, rows = honest
        nothing = RequestResult(token_ids=(), num_cached_tokens=0, unsupported="not in this engine")
        results[5] = nothing
        found = judge(results, rows)
        assert (found.different, found.problems) == (0, [])
        assert found.equal == (16 * 8 + 2 * 3) * 33
        assert undue(SAMPLER, results) == []
        results[0] = nothing
        assert undue(SAMPLER, results) == [
            "request 0 is declared unsupported (not in this engine), and asks for the most likely tokens only"
        ]
