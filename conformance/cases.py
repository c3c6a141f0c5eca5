"""The cases: every way in which an engine may schedule the same tokens.

Lengths lie on and beside the borders that matter: 1, the chunk (16), the cache page (32), the CPU tile and the key
block (64), attention's split (1,024), the length of YaRN's original context, and several of them. Which known mistakes
the cases are there for, `traps` says.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_plugin.checkpoint.traps import Token
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.protocol import Case, Device, Request
from dsv3_plugin.errors import ConformanceError

# The smallest page that vLLM's own CPU attention takes, so that its own model can be compared too.
BLOCK_SIZE = 32
CHUNK = 16
LENGTHS: dict[Device, tuple[int, ...]] = {"cpu": (1024,), "cuda": (1024, 4096, 32_768, 131_072)}
"""Positions of the long cases; a CPU has the first alone."""
MOST_BYTES = 2_500_000_000
"""Of the rows of a long sequence: all of them are computed and kept, if few are asked for."""
MANY = 256
"""Requests of the largest batch."""
TOP_LOGPROBS = 32
"""Most likely tokens that are answered beside each: many values of one row at the cost of one."""


class _Text:
    """Deals out consecutive, disjoint pieces of a token stream, so that no two prompts share a prefix by accident."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self.used = 0

    def take(self, count: int) -> tuple[int, ...]:
        self.used += count
        if self.used > len(self.token_ids):
            raise ValueError(f"the text has {len(self.token_ids)} tokens, the cases need more")
        return tuple(self.token_ids[self.used - count : self.used])

    def requests(self, lengths: Sequence[int], max_tokens: int) -> tuple[Request, ...]:
        return tuple(_request(self.take(n), max_tokens) for n in lengths)

    def scored(self, lengths: Sequence[int], max_tokens: int) -> tuple[Request, ...]:
        """Requests whose prompts' log-probabilities are wanted too."""
        requests = self.requests(lengths, max_tokens)
        return tuple(request.model_copy(update={"prompt_logprobs": True}) for request in requests)


def _request(prompt: tuple[int, ...], max_tokens: int) -> Request:
    return Request(prompt_token_ids=prompt, max_tokens=max_tokens, top_logprobs=TOP_LOGPROBS)


def _unscored(requests: Sequence[Request]) -> tuple[Request, ...]:
    """The requests without log-probabilities."""
    return tuple(request.model_copy(update={"logprobs": False, "top_logprobs": 0}) for request in requests)


def _alone(requests: Sequence[Request]) -> tuple[tuple[Request, ...], ...]:
    """Each request in a round of its own."""
    return tuple((request,) for request in requests)


MIN_LENGTH = 4 * BLOCK_SIZE
"""The least that a model must take: a prefix that fills pages, and some tokens more."""
SPARE = 8
"""Positions behind a sequence: drafts run ahead of it, and SGLang keeps six of its context."""
_LONG_REST = 8
"""Tokens that follow the prompt of a long case."""


def fit(cases: Sequence[Case], max_position_embeddings: int) -> tuple[Case, ...]:
    """The cases with prompts cut so that no sequence is longer than the model takes.

    Raises `ConformanceError` for a model whose sequences are too short for what the cases test.
    """
    if max_position_embeddings < MIN_LENGTH:
        raise ConformanceError(
            f"the checkpoint's max_position_embeddings is {max_position_embeddings}; the cases need {MIN_LENGTH}"
        )

    def cut(request: Request) -> Request:
        prompt = request.prompt_token_ids[: max_position_embeddings - SPARE - request.max_tokens]
        return request.model_copy(update={"prompt_token_ids": prompt})

    return tuple(
        case.model_copy(update={"rounds": tuple(tuple(map(cut, requests)) for requests in case.rounds)})
        for case in cases
    )


def without_hits(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases, with no claim that a cache is hit: in the `two_form` profile not every server has one."""
    return tuple(case.model_copy(update={"min_cached_tokens": 0}) for case in cases)


def make_cases(token_ids: Sequence[int], *, with_mtp: bool) -> tuple[Case, ...]:
    """All cases over a text of about 2,000 tokens; those of speculative decoding only where the checkpoint has an MTP
    layer.
    """
    text = _Text(token_ids)
    shared = text.take(3 * BLOCK_SIZE)

    def with_prefix(lengths: Sequence[int], max_tokens: int) -> tuple[Request, ...]:
        return tuple(_request(shared + text.take(n), max_tokens) for n in lengths)

    cases = [
        Case(
            name="prefill",
            title="prompts of 1 to 300 tokens, one at a time",
            rounds=_alone(text.scored((1, 2, 17, 32, 33, 64, 65, 300), 2)),
            prompt_logits=True,
        ),
        Case(name="decode", title="decode, one request at a time", rounds=_alone(text.requests((5, 60), 12))),
        Case(
            name="batch",
            title="8 requests at once",
            rounds=(text.scored((1, 2, 3, 5, 8, 13, 21, 34), 8),),
            prompt_logits=True,
        ),
        Case(
            name="chunked_prefill",
            title=f"prefill in chunks of {CHUNK}, mixed with decode",
            rounds=(text.scored((5, 17, 40, 70), 4),),
            max_num_batched_tokens=CHUNK,
            prompt_logits=True,
        ),
        Case(
            name="prefix_cache",
            title="prefix-cache hits",
            rounds=(with_prefix((3,), 4), with_prefix((1, 9, 20), 6)),
            min_cached_tokens=len(shared),
        ),
        Case(
            name="prefix_cache_chunked",
            title=f"prefix-cache hits, the rest in chunks of {CHUNK}",
            # Without log-probabilities: so that every engine mixes chunks with decodes.
            rounds=tuple(map(_unscored, (with_prefix((3,), 2), with_prefix((5, 33), 4)))),
            max_num_batched_tokens=CHUNK,
            min_cached_tokens=len(shared),
        ),
    ]
    drawn = [
        request.model_copy(update={"temperature": 0.7, "seed": seed})
        for seed, request in enumerate(text.requests((4, 33, 70), 10))
    ]
    cases.append(
        Case(
            name="sampled",
            title="sampling at a temperature, in a batch and alone",
            rounds=(tuple(drawn), *_alone(drawn)),
        )
    )
    cases.append(_sampler(text, num_speculative_tokens=0))
    if with_mtp:
        for k in (1, 2):
            cases += [_verify(text, k), _sampler(text, num_speculative_tokens=k)]
        cases.append(
            Case(
                name="mtp_prefix_cache",
                title="MTP verification on prefix-cache hits, k = 2",
                rounds=(with_prefix((3,), 4), with_prefix((9, 20), 8)),
                num_speculative_tokens=2,
                # An engine may give up the last page found, whose draft entries depend on the next token.
                min_cached_tokens=len(shared) - BLOCK_SIZE,
                min_accepted_tokens=1,
            )
        )
        cases += [_verify(text, k) for k in (3, 4)]
    return tuple(cases)


def _verify(text: _Text, k: int) -> Case:
    """Drafts in a batch and alone."""
    return Case(
        name=f"mtp_{k}",
        title=f"MTP verification, k = {k}",
        rounds=(text.requests((5, 17, 40), 16), *_alone(text.requests((3,), 12))),
        num_speculative_tokens=k,
        min_accepted_tokens=1,
    )


def crowd_cases(token_ids: Sequence[int]) -> tuple[Case, ...]:
    """Batches of 1 to 256 requests, and a text in which every token is the same, so that all choose the same experts.

    Few prompts are repeated in each batch: the same rows in other company.
    """
    text = _Text(token_ids)
    few = _unscored(text.requests((1, 2, 3, 4) * 4, 2))
    alike = text.take(1) * 130
    return (
        Case(
            name="crowd",
            title=f"batches of 1, 3, 65 and {MANY} requests",
            rounds=tuple(tuple(few[i % len(few)] for i in range(count)) for count in (1, 3, 65, MANY)),
        ),
        Case(
            name="same_token",
            title="one token 130 times: every row to the same experts",
            rounds=((_request(alike, 3), _request(alike[:64], 3)), (_request(alike[:1], 3),)),
            max_num_batched_tokens=BLOCK_SIZE,
            prompt_logits=True,
        ),
    )


def long_cases(token_ids: Sequence[int], device: Device, config: DeepseekV3Config) -> tuple[Case, ...]:
    """Long texts with few queries at their end, as far as the model goes and its rows can be kept: prefill in chunks,
    decode across the last position of a split, and cache hits.
    """
    cases = []
    # The logits and the draft's in fp32, each layer's two parts and their sum in the model's dtype.
    row = 8 * config.vocab_size + 2 * config.hidden_size * (3 * config.num_hidden_layers + 2)
    for length in LENGTHS[device]:
        if length + _LONG_REST + SPARE > config.max_position_embeddings or length * row > MOST_BYTES:
            break
        text = _Text(token_ids)
        prompt = text.take(length - 3)
        more = _request(prompt + text.take(2), _LONG_REST - 2)
        case = Case(
            name=f"long_{length}",
            title=f"{length:,} positions in chunks, decode beyond them, cache hits",
            rounds=((_request(prompt, _LONG_REST),), (more, _request(prompt + text.take(1), 2))),
            max_num_batched_tokens=min(length // 4, 2048),
            min_cached_tokens=(length - 3) // BLOCK_SIZE * BLOCK_SIZE,
        )
        cases.append(case)
    return tuple(cases)


def planted_cases(token_ids: Sequence[int], vocab_size: int, *, with_mtp: bool) -> tuple[Case, ...]:
    """A case for each planted token of the checkpoint (`traps.Token`): alone, as a whole prompt, and among others."""
    text = _Text(token_ids)
    before, after = text.take(9), text.take(30)
    cases = []
    for token in Token:
        planted = (token.id(vocab_size),)
        among = before + planted + after + planted
        cases.append(
            Case(
                name=f"token_{token.name.lower()}",
                title=f"the planted token {token.name.lower()}, alone and among others",
                rounds=((_request(planted, 2),), (_request(among, 3), _request(planted * 70, 2), _request(before, 3))),
                prompt_logits=True,
            )
        )
    if with_mtp:
        prompts = [(token.id(vocab_size), *before, token.id(vocab_size)) for token in Token]
        cases.append(
            Case(
                name="mtp_planted",
                title="MTP verification behind planted tokens, k = 2",
                rounds=(tuple(_request(prompt, 4) for prompt in prompts),),
                num_speculative_tokens=2,
            )
        )
    return tuple(cases)


def _sampler(text: _Text, *, num_speculative_tokens: int) -> Case:
    """Every setting of a sampler beside others, then some of the same requests in other company."""
    settings: tuple[dict[str, object], ...] = (
        {},
        {"temperature": 0.7, "prompt_logprobs": True},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.75, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.75},
        {"temperature": 0.9, "min_p": 0.25},
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 0.5},
        {"temperature": 0.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "logit_bias": tuple((token, 8.0) for token in text.token_ids[:3])},
        {"temperature": 1.0, "n": 3},
    )
    requests = [
        request.model_copy(update={"seed": 100 * seed} | setting)
        for seed, (request, setting) in enumerate(zip(text.requests([4] * len(settings), 8), settings, strict=True))
    ]
    drafts = f", k = {num_speculative_tokens}" if num_speculative_tokens else ""
    return Case(
        name=f"sampler_mtp_{num_speculative_tokens}" if num_speculative_tokens else "sampler",
        title=f"greedy beside sampled requests, every setting of a sampler{drafts}",
        rounds=(tuple(requests), (*requests[3:5], requests[0]), (requests[1],)),
        num_speculative_tokens=num_speculative_tokens,
        min_accepted_tokens=1 if num_speculative_tokens else 0,
    )
