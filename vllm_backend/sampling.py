"""What vLLM's sampler answers for a token that it drew, made one number in every batch.

Under `--logprobs-mode processed_logprobs` that number is here log-softmax(logits / temperature) in fp32 of exactly the
row that was sampled; temperature 0 counts as 1, the request's penalties and biases are in the logits, and top-k, top-p
and min-p cut the draw only. A prompt's token has log-softmax(logits / temperature) of the row before it. vLLM's own
leaves the temperature out for prompts, and takes the log-softmax after those cuts, and with drafts a second time, of
log-probabilities. Other modes are vLLM's. Which token is drawn is vLLM's affair in all of them, but for mends on a CPU:
there it leaves temperatures and cuts of a batch with drafts unwritten, ends where none has any, and ends where the
prompt of a request with a seed is computed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from dsv3_plugin.errors import EngineError


class ExactSampler(Sampler):
    """vLLM's sampler, which answers log-probabilities of the distribution before it is cut."""

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logits fp32 [requests, vocab_size], overwritten, to token ids [requests] and log-probabilities fp32
        [requests, vocab_size], or None where no request asks.
        """
        answered = None
        if sampling_metadata.max_num_logprobs is not None or getattr(sampling_metadata, "logprob_token_ids", None):
            tempered = logits
            if not sampling_metadata.all_greedy:
                temperature = sampling_metadata.temperature
                tempered = self.apply_temperature(logits.clone(), temperature, sampling_metadata.all_random)
            answered = self.compute_logprobs(tempered)
        sampled, _ = super().sample(logits, sampling_metadata, *args, **kwargs)
        return sampled, answered


class ExactRejectionSampler(RejectionSampler):
    """vLLM's verification of drafts, likewise. Its `sampler`, an `ExactSampler`, answers for the token after them, and
    log-probabilities of both stand where vLLM gathers logits.
    """

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, metadata: Any
    ) -> torch.Tensor:
        """logits fp32 [drafts, vocab_size], overwritten and returned; what is answered for them is kept."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        self.answered = None
        if sampling_metadata.max_num_logprobs is not None:
            tempered = logits
            if not sampling_metadata.all_greedy:
                temperature = rejection_sampler.expand_batch_to_tokens(
                    sampling_metadata.temperature,
                    metadata.cu_num_draft_tokens,
                    len(logits),
                    replace_from=rejection_sampler.GREEDY_TEMPERATURE,
                    replace_to=1,
                )
                tempered = logits / temperature.unsqueeze(-1)
            self.answered = self.sampler.compute_logprobs(tempered)
        return logits

    def _get_logprobs_tensors(
        self, max_num_logprobs: int, metadata: Any, logits: torch.Tensor, target_logits: torch.Tensor, *args: Any
    ) -> Any:
        return super()._get_logprobs_tensors(max_num_logprobs, metadata, logits, self.answered, *args)


def prompt_logprobs(
    original: Callable[..., dict[str, Any]], runner: Any, hidden_states: torch.Tensor, num_scheduled_tokens: Any
) -> dict[str, Any]:
    """Around a model runner's `_get_prompt_logprobs_dict`: one request at a time, each at its own temperature."""
    wanted: dict[str, int] = runner.num_prompt_logprobs
    answered: dict[str, Any] = {}
    try:
        for req_id, count in list(wanted.items()):
            temperature = runner.requests[req_id].sampling_params.temperature or 1.0
            # As one more attribute of the instance, before the method of its class.
            runner.sampler.compute_logprobs = partial(_compute_logprobs, temperature)
            runner.num_prompt_logprobs = {req_id: count}
            answered |= original(hidden_states, num_scheduled_tokens)
            if req_id not in runner.num_prompt_logprobs:
                del wanted[req_id]
    finally:
        runner.num_prompt_logprobs = wanted
        vars(runner.sampler).pop("compute_logprobs", None)
    return answered


def _compute_logprobs(temperature: float, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    # Divided by a tensor of the logits' device: by a number a GPU would multiply by the reciprocal.
    return Sampler.compute_logprobs(logits / logits.new_tensor(temperature))


def make_exact(runner: Any) -> None:
    """Put the exact samplers in the place of a model runner's own. Raises `EngineError` where those are not the ones
    that this module knows.
    """
    if runner.device.type == "cpu":
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        rejection_sampler.apply_top_k_top_p = apply_top_k_top_p
        runner.sample_tokens = partial(sample_tokens, runner.sample_tokens, runner)
    if runner.model_config.logprobs_mode != "processed_logprobs":
        return
    _replace(runner, "sampler", Sampler, ExactSampler)
    if hasattr(runner, "rejection_sampler"):
        _replace(runner, "rejection_sampler", RejectionSampler, ExactRejectionSampler)
        # There are log-probabilities where vLLM would take the log-softmax.
        runner.rejection_sampler.is_logits_logprobs_mode = True
    runner._get_prompt_logprobs_dict = partial(prompt_logprobs, runner._get_prompt_logprobs_dict, runner)


def _replace(runner: Any, name: str, known: type, exact: type) -> None:
    found = type(getattr(runner, name, None))
    missing = [method for method in vars(exact) if not method.startswith("__") and not hasattr(known, method)]
    if found is not known or missing:
        raise EngineError(
            f"dsv3-plugin cannot make logprobs_mode=processed_logprobs exact: vLLM's {name} is {found.__qualname__}"
            f" of {found.__module__}{', without ' + ', '.join(missing) if missing else ''}; use another logprobs_mode"
        )
    # vLLM built it, with what its constructor takes in this version.
    getattr(runner, name).__class__ = exact


def sample_tokens(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a model runner's `sample_tokens`: of a request whose prompt has not ended no token is drawn with its seed.

    vLLM draws one, drops it and sets the generator back, which no generator of a CPU can do.
    """
    generators: dict[int, torch.Generator] = runner.input_batch.generators
    dropped = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    kept = {i: generators.pop(i) for i in dropped if i in generators}
    try:
        return original(*args, **kwargs)
    finally:
        generators |= kept


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """x [requests] to [num_tokens]: each value as often as its request has tokens, by their sums `cu_num_tokens`."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts.long(), output_size=num_tokens)


def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """vLLM's, which fails in a step in which no request has drafts: logits [0, vocab_size]."""
    return topk_topp_sampler.apply_top_k_top_p(logits, k, p) if len(logits) else logits
