"""What a server answers for a token: the one definition of log-probabilities, and of what a request may draw.

The log-probability of a token is log-softmax(logits / temperature), in fp32, of exactly the row that the token was
sampled from. A greedy request has temperature 0, which counts as 1 here. `logits` are the model's plus the request's
own adjustments: logit bias and penalties. Top-k, top-p and min-p cut the draw, never the number. A token of the
prompt was not drawn: its log-probability is log-softmax of the model's logits alone. None of this depends on drafts,
seeds, n, or on what else is in the batch. A request that is greedy, or has top-k 1, is given a most likely token.

vLLM's name for this is `processed_logprobs`, SGLang answers it under `--enable-deterministic-inference`; both by their
own samplers only in part, which the adapters make whole. Engines draw their random numbers in different ways, so that
each testee's own sequences are computed again by the reference. How they round an adjustment is not defined: the
suite's biases and penalties are powers of two, whose every form is exact but for the one addition.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dsv3_plugin.conformance.protocol import Request, TopLogprobs, prefix_digest


def adjusted_logits(logits: torch.Tensor, request: Request, token_ids: Sequence[int]) -> torch.Tensor:
    """logits fp32 [vocab_size] after `token_ids`, with the request's bias, then repetition, frequency and presence
    penalties.
    """
    prompt = len(request.prompt_token_ids)
    adjusted = logits.clone()
    for token, bias in request.logit_bias:
        adjusted[token] += bias
    if request.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(token_ids)), device=logits.device)
        of_seen = adjusted[seen]
        penalty = request.repetition_penalty
        adjusted[seen] = torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    for token, count in Counter(token_ids[prompt:]).items():
        adjusted[token] -= request.frequency_penalty * count
        adjusted[token] -= request.presence_penalty
    return adjusted


def processed_logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits fp32 [..., vocab_size] to log-probabilities; temperature 0 counts as 1.

    The temperature is a tensor of the logits' device, as in the engines: by a Python number a GPU does not divide, it
    multiplies by the reciprocal.
    """
    return torch.log_softmax(logits / logits.new_tensor(temperature or 1.0), dim=-1)


def admitted(logprobs: torch.Tensor, request: Request, tolerance: float = 0.0) -> torch.Tensor:
    """Which tokens a request may draw, bool [vocab_size], from its log-probabilities [vocab_size].

    Top-k, top-p and min-p each cut the whole distribution; a token must be in all three. `tolerance` widens top-p and
    min-p, in probability and relative: engines sum probabilities in fp32.
    """
    probs = logprobs.double().exp()
    mask = torch.ones_like(probs, dtype=torch.bool)
    if request.top_k is not None:
        mask &= logprobs >= logprobs.topk(min(request.top_k, len(logprobs))).values[-1]
    if request.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        mask[order[before > request.top_p + tolerance]] = False
    if request.min_p > 0:
        mask &= probs >= request.min_p * probs.max() * (1 - tolerance)
    return mask


class Answer(NamedTuple):
    """What is said of one token."""

    token: int
    logprob: float
    top: TopLogprobs


def answer(logprobs: torch.Tensor, token: int, top_logprobs: int) -> Answer:
    """A token's log-probability and the most likely ones, from logprobs [vocab_size]."""
    top = logprobs.topk(min(top_logprobs, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Answer(token, float(logprobs[token]), tuple(pairs))


def next_token(logits: torch.Tensor, request: Request, token_ids: Sequence[int]) -> Answer:
    """The token after `token_ids` from logits fp32 [vocab_size]: the most likely one where the request is greedy, else
    a draw whose random numbers depend on the request's seed and the position alone.
    """
    adjusted = adjusted_logits(logits, request, token_ids)
    logprobs = processed_logprobs(adjusted, request.temperature)
    if request.temperature == 0 or request.top_k == 1:
        return answer(logprobs, int(adjusted.argmax()), request.top_logprobs)
    cut = ~admitted(logprobs, request).cpu()
    # A digest of both, because torch's generator looks at 32 bits of its seed only.
    generator = torch.Generator("cpu").manual_seed(prefix_digest((request.seed, len(token_ids))))
    # The largest of log-probability + Gumbel noise is a draw from the distribution.
    noise = torch.empty_like(logprobs, device="cpu").exponential_(generator=generator).log().neg()
    drawn = (logprobs.cpu() + noise).masked_fill(cut, -math.inf).argmax()
    return answer(logprobs, int(drawn), request.top_logprobs)


def prompt_answer(logits: torch.Tensor, request: Request, position: int) -> Answer:
    """What is said of the prompt's token at `position`, from the row before it, logits fp32 [vocab_size]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return answer(logprobs, request.prompt_token_ids[position], request.top_logprobs)
