"""Sampling at a temperature, and the one form in which log-probabilities are compared.

Engines draw their random numbers in different ways, so at a temperature above 0 they choose different tokens; each
testee's own sequences are therefore computed again by the reference. What an engine says of a token that it drew is
compared in one form: log-softmax of logits / temperature, in fp32. vLLM calls it `processed_logprobs`; SGLang answers
with it under `--enable-deterministic-inference` (its other form, log of softmax, rounds otherwise).
"""

from __future__ import annotations

import torch

from dsv3_plugin.conformance.protocol import Request, prefix_digest


def processed_logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits fp32 [..., vocab_size] to log-probabilities of the distribution that a request samples from.

    The temperature is a tensor of the logits' device, as in the engines: by a Python number a GPU does not divide, it
    multiplies by the reciprocal.
    """
    return torch.log_softmax(logits / logits.new_tensor(temperature), dim=-1)


def next_token(logits: torch.Tensor, request: Request, position: int) -> tuple[int, float | None]:
    """The token for `position` from logits fp32 [vocab_size]: the most likely one at temperature 0, else a draw and its
    log-probability. The random numbers depend on the request's seed and the position alone.
    """
    if request.temperature == 0:
        return int(logits.argmax()), None
    logprobs = processed_logprobs(logits, request.temperature).cpu()
    # A digest of both, because torch's generator looks at 32 bits of its seed only.
    generator = torch.Generator("cpu").manual_seed(prefix_digest((request.seed, position)))
    # The largest of log-probability + Gumbel noise is a draw from the distribution.
    noise = torch.empty_like(logprobs).exponential_(generator=generator).log().neg()
    token = int((logprobs + noise).argmax())
    return token, float(logprobs[token])
