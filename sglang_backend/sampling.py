"""What is drawn, and its log-probability, in SGLang's sampler: log-softmax of logits / temperature, in fp32, of the
very row that was drawn from, for every generated and every prompt token.

SGLang computes log-probabilities in several ways, which round differently, by what else is in the batch; without
`--enable-deterministic-inference` none of them is log-softmax. What a seed draws depends on them too: SGLang's random
numbers belong to tokens in one batch and to ranks in another, and it asserts that no request has a seed and `min_p`.
Here a request draws the same in any company, and a greedy one gets the argmax of its logits.

A draft is verified by drawing: each row of logits draws its token as it would without drafts, and the drafts that were
drawn too are accepted. The tokens have the target's distribution, whatever was drafted, and with a seed they are those
that come without drafts. (SGLang's own verification rounds otherwise, leaves `min_p` out, and is greedy at every
temperature where it has no kernel.)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, multinomial_with_seed

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import is_ours
from dsv3_plugin.sglang_backend.updates import not_whole

logger = logging.getLogger("sglang.dsv3_plugin")

Original = Callable[..., Any]


class ExactSampler(Sampler):
    """SGLang's sampler for our models."""

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Token ids [n] of logits_output.next_token_logits [n, vocab_size], to which the requests' biases and penalties
        were added; log-probabilities go into logits_output.
        """
        logits = logits_output.next_token_logits
        tokens = self.draw(logits_output, sampling_info, positions)
        if return_logprob:
            logprobs = torch.log_softmax(logits / sampling_info.temperatures, dim=-1)
            compute = self.output_logprob_processor.compute_logprobs
            compute(logprobs, top_logprobs_nums, token_ids_logprobs, tokens).write_output_to(logits_output)
            all_tensors(logits_output)
        return tokens

    def draw(self, logits_output: Any, sampling_info: Any, positions: torch.Tensor) -> torch.Tensor:
        """The tokens alone, int [n]."""
        logits = logits_output.next_token_logits
        greedy = logits.argmax(dim=-1)
        if sampling_info.is_all_greedy:
            return greedy
        if sampling_info.sampling_seed is not None:
            logits = self._preprocess_logits(logits.clone(), sampling_info)
            probs = allowed_probs(torch.softmax(logits / sampling_info.temperatures, dim=-1), sampling_info)
            drawn = multinomial_with_seed(probs.double().log(), sampling_info.sampling_seed, positions).view(-1)
        else:
            # SGLang computes in place.
            logits_output.next_token_logits = logits.clone()
            try:
                drawn = super().forward(logits_output, sampling_info, False, [], [], positions)
            finally:
                logits_output.next_token_logits = logits
        return torch.where(sampling_info.top_ks == 1, greedy, drawn)


def all_tensors(logits_output: Any) -> None:
    """SGLang calls `tolist` on what each request gets of `token_ids_logprob`; one that asks for none has a list."""
    if (values := logits_output.next_token_token_ids_logprobs_val) is not None:
        logits_output.next_token_token_ids_logprobs_val = [torch.as_tensor(value) for value in values]


def allowed_probs(probs: torch.Tensor, info: Any) -> torch.Tensor:
    """probs fp32 [n, vocab_size], with 0 for what `top_k`, `top_p` and `min_p` cut off, by SGLang's rules: of equally
    likely tokens the first goes first, `top_p` keeps the token that reaches it, and `min_p` is a share of the largest.
    """
    if info.need_top_k_sampling or info.need_top_p_sampling:
        ranked, tokens = probs.sort(dim=-1, descending=True, stable=True)
        cut = torch.arange(probs.shape[1], device=probs.device) >= info.top_ks.view(-1, 1)
        # Rounded sums exceed 1, which cuts nothing off.
        top_ps = info.top_ps.view(-1, 1)
        cut |= (ranked.cumsum(dim=-1) - ranked > top_ps) & (top_ps < 1)
        probs = torch.zeros_like(probs).scatter_(-1, tokens, ranked.masked_fill(cut, 0))
    if info.need_min_p_sampling:
        probs = probs.masked_fill(probs < probs.amax(dim=-1, keepdim=True) * info.min_ps.view(-1, 1), 0)
    return probs


class Serving:
    """The sampler of the target that this process serves, and the verification that is under way."""

    def __init__(self) -> None:
        self.sampler: ExactSampler | None = None
        self.rows: tuple[Any, Any, torch.Tensor] | None = None
        """Logits output, sampling info and positions of the rows that are verified."""


SERVING = Serving()


def sample(original: Original, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.sample`, which precedes any verification: a prompt's first token is sampled so."""
    if is_ours(runner.model) and not runner.is_draft_worker and runner.sampler is not SERVING.sampler:
        runner.sampler = SERVING.sampler = ExactSampler()
    return original(runner, *args, **kwargs)


def eagle_sample(
    original: Original, verify_input: Any, batch: Any, logits_output: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around the verification of drafts: SGLang compares them with tokens, `verify_tree_greedy` says with which."""
    if SERVING.sampler is None or batch.forward_mode.is_idle():
        return original(verify_input, batch, logits_output, *args, **kwargs)
    info = batch.sampling_info
    SERVING.rows = logits_output, for_each_draft(info, verify_input.draft_token_num), verify_input.positions
    try:
        with all_greedy(info, True):
            return original(verify_input, batch, logits_output, *args, **kwargs)
    finally:
        SERVING.rows = None


def verify_tree_greedy(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Around `verify_tree_greedy_func`: biases and penalties have been added to the logits."""
    if SERVING.sampler is not None and SERVING.rows is not None:
        drawn = SERVING.sampler.draw(*SERVING.rows)
        kwargs["target_predict"] = drawn.view_as(kwargs["target_predict"]).to(kwargs["target_predict"].dtype)
    return original(*args, **kwargs)


def compute_spec_logprobs(original: Original, batch: Any, logits_output: Any, *args: Any, **kwargs: Any) -> None:
    """Around the log-probabilities of verified tokens: the temperature counts with `top_k=1` too."""
    if SERVING.sampler is None:
        original(batch, logits_output, *args, **kwargs)
        return
    with all_greedy(batch.sampling_info, False):
        original(batch, logits_output, *args, **kwargs)
    all_tensors(logits_output)


@contextmanager
def all_greedy(info: Any, value: bool) -> Iterator[None]:
    """By which SGLang tells a batch that draws nothing."""
    before, info.is_all_greedy = info.is_all_greedy, value
    try:
        yield
    finally:
        info.is_all_greedy = before


def for_each_draft(info: Any, count: int) -> Any:
    """The sampling info of a batch in which every request has `count` rows."""
    rows = copy.copy(info)
    for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed"):
        if (values := getattr(info, name)) is not None:
            setattr(rows, name, values.repeat_interleave(count, dim=0))
    rows.sampling_mask_batch_indices = None
    return rows


class PromptLogprobs:
    """Makes a logits processor answer log-softmax of logits / temperature for prompts too.

    SGLang knows no temperature there, and has a form of its own outside deterministic inference. A row can be the
    prompt's last and the one to draw from: those are given back as they were.
    """

    def __init__(self, logits_processor: Any) -> None:
        self.temperatures: torch.Tensor | None = None
        """Of the pass's requests, [n, 1]."""
        processor = logits_processor.input_logprob_processor
        processor.enable_fast_input_logprobs = False
        processor.forward = partial(self.forward, processor.forward)

    def forward(
        self,
        original: Original,
        *,
        sample_indices: torch.Tensor,
        token_to_seq_idx: list[int],
        get_logits_fn: Original,
        **arguments: Any,
    ) -> tuple[Any, torch.Tensor]:
        """Around `InputLogprobProcessor.forward`; the rows come in chunks, in order."""
        assert self.temperatures is not None
        temperatures = self.temperatures[torch.tensor(token_to_seq_idx, device=self.temperatures.device)]
        start, sampled = 0, []

        def divided(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal start
            logits, end = get_logits_fn(states, *args, **kwargs), start + len(states)
            sampled.append(logits[sample_indices[(sample_indices >= start) & (sample_indices < end)] - start])
            logits, start = logits / temperatures[start:end], end
            return logits

        result, _ = original(
            sample_indices=sample_indices,
            token_to_seq_idx=token_to_seq_idx,
            get_logits_fn=divided,
            **arguments,
        )
        return result, torch.cat(sampled)


def handle_generate_request(original: Original, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler.handle_generate_request`: what cannot be done exactly ends this request alone."""
    problem = None
    model = scheduler.tp_worker.model_runner.model
    if is_ours(model):
        problem = malformed(request, model.config) or unsupported(scheduler, request) or not_whole(scheduler)
    if problem is None:
        return original(scheduler, request, *args, **kwargs)
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    message = f"dsv3-plugin does not serve this request: {problem}"
    logger.warning(message)
    ended = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError").to_json()
    scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=request.rid, finished_reason=ended), request)
    return None


def malformed(request: Any, config: DeepseekV3Config) -> str | None:
    """What is wrong with a request that SGLang notices in the midst of a batch only, which ends the server; or None."""
    params, vocab = request.sampling_params, range(config.vocab_size)
    known = f"the vocabulary has {config.vocab_size} tokens"
    stops = (params.stop_token_ids or ()) if params.min_new_tokens else ()
    for name, tokens in (("input_ids", request.input_ids or ()), ("stop_token_ids", stops)):
        if (strange := next((token for token in tokens if token not in vocab), None)) is not None:
            return f"{strange} in {name}: {known}"
    if any(len(row) != config.hidden_size for row in request.input_embeds or ()):
        return f"a row of input_embeds must have {config.hidden_size} numbers"
    if not 0 <= request.top_logprobs_num <= len(vocab):
        return f"top_logprobs_num={request.top_logprobs_num}: {known}"
    for name, bits in (("top_k", 32), ("sampling_seed", 64)):
        value = getattr(params, name)
        if value is not None and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            return f"{name}={value} is not an integer of {bits} bits"
    return bad_bias(params.logit_bias, params.temperature, vocab)


def bad_bias(biases: Any, temperature: float, vocab: range) -> str | None:
    """What is wrong with a request's `logit_bias`: each value is added to a logit in fp32, then divided."""
    if biases is None:
        return None
    if not isinstance(biases, dict):
        return f"logit_bias={biases!r} is not a dictionary"
    largest = torch.finfo(torch.float32).max * min(temperature, 1)
    for token, bias in biases.items():
        if int(token) not in vocab:
            return f"{token} in logit_bias: the vocabulary has {len(vocab)} tokens"
        if not isinstance(bias, int | float) or not abs(bias) <= largest:
            return f"logit_bias {bias!r} of token {token} is not a finite number in fp32, over the temperature"
    return None


def unsupported(scheduler: Any, request: Any) -> str | None:
    """Why SGLang cannot do exactly what a request asks of its sampler, or None."""
    params = request.sampling_params
    if getattr(request, "return_sampling_mask", False):
        return "return_sampling_mask describes a draw of SGLang's own"
    if params.repetition_penalty != 1:
        return "SGLang's repetition_penalty leaves the prompt out"
    late = scheduler.draft_worker is not None or scheduler.enable_overlap
    for name in ("frequency_penalty", "presence_penalty", "min_new_tokens"):
        if late and getattr(params, name):
            return f"SGLang counts tokens too late for {name}, except with --disable-overlap-schedule and no drafts"
    draws = params.top_k != 1  # as SGLang notes temperature 0
    if draws and params.sampling_seed is not None and not scheduler.tp_worker.model_runner.sampler.enable_deterministic:
        return "SGLang honours sampling_seed with --enable-deterministic-inference only"
    return None


_EAGLE = "sglang.srt.speculative.eagle_utils"

HOOKS: dict[str, Original] = {
    "sglang.srt.model_executor.model_runner.ModelRunner.sample": sample,
    f"{_EAGLE}.eagle_sample": eagle_sample,
    f"{_EAGLE}.verify_tree_greedy_func": verify_tree_greedy,
    # Its name in SGLang 0.5.17, and from 0.5.20 on.
    "sglang.srt.layers.logprob_processor.compute_spec_v2_logprobs": compute_spec_logprobs,
    "sglang.srt.layers.logprob_processor.compute_spec_logprobs": compute_spec_logprobs,
    "sglang.srt.managers.scheduler.Scheduler.handle_generate_request": handle_generate_request,
}
