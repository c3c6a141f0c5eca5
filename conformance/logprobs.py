"""Judging what a testee answered for its tokens: every log-probability, and whether the token was one to choose.

The rows are the specification's for the sequences that the testee answered, so that tokens may differ between engines
and numbers may not. `sampling` defines the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsv3_plugin.conformance.compare import Key, tokens_differ
from dsv3_plugin.conformance.protocol import Case, Device, Request, RequestResult, TopLogprobs, prefix_digest
from dsv3_plugin.conformance.sampling import adjusted_logits, admitted, processed_logprobs

CUT_TOLERANCE = 1e-5
"""By which a drawn token may miss top-p or min-p: engines sum probabilities in fp32, each in its own order."""
CHANCE = 1e-9
"""Draws that are all the most likely token are taken for no draws where that is less likely than this."""


@dataclass
class LogprobComparison:
    """A testee's log-probabilities in one case, and what is wrong with its tokens."""

    testee: str
    equal: int = 0
    different: int = 0
    first_difference: str | None = None
    problems: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """For the report."""
        total = self.equal + self.different
        return f"{self.different:,} of {total:,} log-probabilities differ, the first in {self.first_difference}"

    def count(self, value: _Value, tolerance: float) -> None:
        """One value more; one that is missing differs."""
        if value.found is not None and _near(value.found, value.expected, tolerance):
            self.equal += 1
            return
        self.different += 1
        if self.first_difference is None:
            found = "missing" if value.found is None else repr(value.found)
            self.first_difference = f"{value.where}: {found}, by the definition it is {value.expected!r}"


class _Value(NamedTuple):
    where: str
    found: float | None
    expected: float


def _near(found: float, expected: float, tolerance: float) -> bool:
    return found == expected or abs(found - expected) <= tolerance


def judge(
    testee: str,
    case: Case,
    results: Sequence[RequestResult],
    rows: Mapping[Key, torch.Tensor],
    device: Device,
    tolerance: float = 0.0,
) -> LogprobComparison:
    """Judge the requests of a case by `rows`, fp32 logits [vocab_size] by request and prefix.

    Log-softmax is computed where the testees ran, since another device's rounds otherwise. Values may differ by
    `tolerance`. Requests that the testee declared unsupported are passed over.
    """
    comparison = LogprobComparison(testee)
    drawn: dict[Request, int] = {}
    draws: list[tuple[bool, float]] = []
    for index, (request, result) in enumerate(zip(case.requests, results, strict=True)):
        if result.unsupported is not None:
            continue
        expected = _Expected(index, request, result, rows, device)
        if expected.unknown is not None:
            comparison.problems.append(
                f"request {index} answers tokens before position {expected.unknown} that it did not compute with"
            )
            continue
        for value in expected.values(tolerance):
            comparison.count(value, tolerance)
        comparison.problems += expected.wrong_tokens()
        draws += expected.draws()
        if request.temperature > 0:
            first = drawn.setdefault(request, index)
            if (position := tokens_differ(results[first], result)) is not None:
                comparison.problems.append(
                    f"requests {first} and {index} are the same and drew other tokens at position {position}"
                )
    if draws and all(likeliest for likeliest, _ in draws):
        chance = torch.tensor([p for _, p in draws], dtype=torch.float64).prod().item()
        if chance < CHANCE:
            comparison.problems.append(
                f"all {len(draws)} tokens drawn are the most likely ones, which has a chance of {chance:.0e}:"
                " they are not drawn"
            )
    return comparison


class _Expected:
    """What one request's answers must be, from the rows of its own sequence."""

    def __init__(
        self, index: int, request: Request, result: RequestResult, rows: Mapping[Key, torch.Tensor], device: Device
    ) -> None:
        self.index, self.request, self.result, self.device = index, request, result, device
        self.prompt = len(request.prompt_token_ids)
        first = 1 if request.prompt_logprobs else self.prompt
        keys = {p: (index, prefix_digest(result.token_ids[:p])) for p in range(first, len(result.token_ids))}
        self.rows = {p: rows[key] for p, key in keys.items() if key in rows}
        self.unknown = next((p for p in keys if p not in self.rows), None)
        self.generated = list(self._generated()) if self.unknown is None else []

    @property
    def is_greedy(self) -> bool:
        """Whether only a most likely token will do."""
        return self.request.temperature == 0 or self.request.top_k == 1

    def of_prompt(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Position of each token of the prompt but the first, and the log-probabilities [vocab_size] there."""
        for position in range(1, self.prompt):
            yield position, processed_logprobs(self.rows[position].to(self.device), self.request.temperature)

    def _generated(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Position of each generated token, the adjusted logits and the log-probabilities [vocab_size] there."""
        for position in range(self.prompt, len(self.result.token_ids)):
            logits = self.rows[position].to(self.device)
            adjusted = adjusted_logits(logits, self.request, self.result.token_ids[:position])
            yield position, adjusted, processed_logprobs(adjusted, self.request.temperature)

    def values(self, tolerance: float) -> Iterator[_Value]:
        """Each value that was asked for."""
        result, request = self.result, self.request
        if request.logprobs:
            generated = ((position, logprobs) for position, _, logprobs in self.generated)
            yield from self._values("generated", generated, result.logprobs, result.top_logprobs, tolerance)
        if request.prompt_logprobs:
            found = result.prompt_logprobs, result.prompt_top_logprobs
            yield from self._values("prompt", self.of_prompt(), *found, tolerance)

    def _values(
        self,
        part: str,
        positions: Iterator[tuple[int, torch.Tensor]],
        found: Sequence[float],
        found_top: Sequence[TopLogprobs],
        tolerance: float,
    ) -> Iterator[_Value]:
        for i, (position, logprobs) in enumerate(positions):
            where = f"request {self.index}, position {position} ({part}, temperature {self.request.temperature:g})"
            token = self.result.token_ids[position]
            yield _Value(f"{where}, token {token}", found[i] if i < len(found) else None, float(logprobs[token]))
            ordered = sorted(found_top[i], key=lambda pair: -pair[1]) if i < len(found_top) else []
            for rank, likely in enumerate(logprobs.topk(min(self.request.top_logprobs, len(logprobs))).values.tolist()):
                tokens = [token for token, _ in ordered[: rank + 1]]
                if len(set(tokens)) <= rank or not 0 <= tokens[-1] < len(logprobs):
                    yield _Value(f"{where}, rank {rank + 1}", None, likely)
                    continue
                token, value = ordered[rank]
                of_token = float(logprobs[token])
                # The token's own value first; then that no likelier token was left out, whichever of two equal ones.
                expected = likely if _near(value, of_token, tolerance) else of_token
                yield _Value(f"{where}, rank {rank + 1}, token {token}", value, expected)

    def wrong_tokens(self) -> Iterator[str]:
        """Tokens that the request may not be given."""
        for position, logits, logprobs in self.generated:
            token = self.result.token_ids[position]
            likelier = int((logits > logits[token]).sum())
            if likelier == 0 or (not self.is_greedy and admitted(logprobs, self.request, CUT_TOLERANCE)[token]):
                continue
            asked = ", ".join(f"{name} {value}" for name, value in self.request.settings.items()) or "greedy"
            yield (
                f"request {self.index} ({asked}) was given token {token} at position {position},"
                f" which it may not: {likelier} are likelier"
            )

    def draws(self) -> Iterator[tuple[bool, float]]:
        """Whether each token drawn is the most likely one, and how likely that was."""
        if self.request.temperature == 0 or self.request.settings.keys() - {"temperature"}:
            return
        for position, _, logprobs in self.generated:
            likeliest = logprobs.max()
            yield bool(logprobs[self.result.token_ids[position]] == likeliest), float(likeliest.exp())
