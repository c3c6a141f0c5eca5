"""The tokens that every contender reads and writes.

All tokens of the vocabulary stand in one random circle, and each is followed by the next one of it. So a forced token
depends on the token before it alone: an engine is forced without knowing which request a row belongs to, in any
schedule. Prompts end at places of the circle that lie far apart. So requests that run together never print the same
token at a time, and a token says which request printed it last, and how many it had printed before.

Drafts are forced by the same token: a table says for each token which drafts follow, and a given part of them is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

_FIRST_TOKEN = 3  # those before it begin, end or pad texts in some vocabularies; prompts go without


class Place(NamedTuple):
    """Where a token stands among those of some requests."""

    request: int
    generated: int
    """Tokens that the request has printed; 0 for the last one of its prompt."""


class Circle:
    """The tokens of one vocabulary and seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.seed = seed
        self.tokens = torch.randperm(vocab_size, generator=generator)
        self.place_of = torch.empty_like(self.tokens)
        self.place_of[self.tokens] = torch.arange(vocab_size)
        self.successor = torch.empty_like(self.tokens)
        self.successor[self.tokens] = self.tokens.roll(-1)

    def prompts(self, requests: int, length: int) -> list[list[int]]:
        """Random prompts of `length` tokens, each of which ends at a place of its own."""
        ends = self.tokens[:: self._apart(requests)][:requests]
        is_end = torch.zeros(self.vocab_size, dtype=torch.bool)
        is_end[ends] = True
        prompts = []
        for request, end in enumerate(ends.tolist()):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + request)
            tokens = torch.randint(_FIRST_TOKEN, self.vocab_size, (length,), generator=generator)
            # A row inside a prompt is not to look like the end of one.
            tokens = torch.where(is_end[tokens], self.successor[tokens], tokens)
            tokens[-1] = end
            prompts.append(tokens.tolist())
        return prompts

    def continuation(self, request: int, requests: int, count: int) -> list[int]:
        """What one of so many requests prints."""
        first = request * self._apart(requests) + 1
        return self.tokens[torch.arange(first, first + count) % self.vocab_size].tolist()

    def place(self, token: int, requests: int, printed: Mapping[int, int]) -> Place | None:
        """Where a token stands among `requests`, some of which have `printed` so many: of the one that read it last.
        None where none of those did.
        """
        at, apart = int(self.place_of[token]), self._apart(requests)
        read = [
            Place(request, generated)
            for request, count in printed.items()
            if (generated := (at - request * apart) % self.vocab_size) < count
        ]
        return min(read, key=lambda place: printed[place.request] - place.generated, default=None)

    def drafts(self, count: int, acceptance: float) -> torch.Tensor:
        """int64 [vocab_size, count]: the drafts after each token, each right with a probability of `acceptance`."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        columns, token = [], self.successor
        for _ in range(count):
            right = torch.rand(self.vocab_size, generator=generator) < acceptance
            columns.append(torch.where(right, token, (token + 1) % self.vocab_size))
            token = self.successor[token]
        return torch.stack(columns, 1)

    def _apart(self, requests: int) -> int:
        return self.vocab_size // requests
