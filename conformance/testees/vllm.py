"""The vLLM testee: a real vLLM engine in this process, with whatever model it builds.

The rows are taken where the engine itself computes them. Three calls of its model runner tell what a row is:
`_prepare_inputs` (which requests, how many tokens each, which rows are sampled from), the model's forward pass (token
ids and positions) and `compute_logits`. The engine's schedule is its own.

On several ranks each is such an engine, in a process of its own, with the same requests but for data parallelism: what
vLLM calls an external launcher. They schedule the same, and compute together.
"""

from __future__ import annotations

import os

from dsv3_plugin.engines import class_name, is_ours, switched_off

# In one process, so that the model can be observed; on one thread, as the CPU arithmetic requires.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if not switched_off():
    # Without AMX vLLM switches chunked prefill and prefix caching off for its own CPU MLA kernels, which are not used.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import gc
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.cases import SPARE, TOP_LOGPROBS
from dsv3_plugin.conformance.layouts import ALONE, ONE_RANK, RankOf
from dsv3_plugin.conformance.protocol import Case, Job, Request, RequestResult, Served, TopLogprobs
from dsv3_plugin.conformance.rows import LayerRecorder, RowKey, TokenTracker, pick
from dsv3_plugin.conformance.taps import OperationRecorder
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.vllm_ranks import join
from dsv3_plugin.errors import ConformanceError, DSV3Error
from dsv3_plugin.vllm_backend import compat

NO_DRAFTS = "vLLM's model runner V1 has no drafter on the first of several stages"


class VllmTestee:
    """One engine at a time; a new one where the number of draft tokens changes, which vLLM fixes at start."""

    name = "vllm"
    own_model_devices = ("cpu", "cuda")
    schedule_not_followed = None

    def __init__(self, job: Job, rank: RankOf = ALONE) -> None:
        os.environ.setdefault("VLLM_CACHE_ROOT", tempfile.mkdtemp(prefix="dsv3-vllm-"))
        try:
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConformanceError(f"vLLM cannot be imported by this Python: {error}") from None
        if current_platform.device_type != job.device:
            raise ConformanceError(
                f"this vLLM is built for {current_platform.device_type}, the job asks for {job.device}"
            )
        self.job = job
        self.rank = rank
        self.ports = iter(rank.ports)
        self.num_speculative_tokens: int | None = None
        self.observer: Observer | None = None
        self.llm: Any = None
        self._served: list[Served] = []

    def versions(self) -> dict[str, str]:
        """vLLM's version."""
        return {"vllm": compat.vllm_version()}

    def served(self) -> Served:
        """The classes that vLLM built; with speculative decoding where any case had it."""
        return max(self._served, key=lambda served: served.draft_class is not None)

    def run(self, case: Case) -> program.Outcome:
        """Submit the case's rounds and step the engine until each has finished."""
        if case.num_speculative_tokens and self.rank.layout.pp > 1:
            return program.Outcome.declined(case, NO_DRAFTS)
        if case.num_speculative_tokens != self.num_speculative_tokens:
            self.start_engine(case.num_speculative_tokens)
        assert self.observer is not None
        self.llm.reset_prefix_cache()
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = case.max_num_batched_tokens or self.scheduled_tokens
        outcome = program.Outcome()
        self.observer.start_case(outcome)
        drafted, accepted = self.draft_counters()
        index = 0
        for requests in case.rounds:
            outcome.requests += self.run_round(index, requests, case.prompt_logits)
            index += sum(request.n for request in requests)
        drafted_after, accepted_after = self.draft_counters()
        outcome.num_draft_tokens, outcome.num_accepted_tokens = drafted_after - drafted, accepted_after - accepted
        return outcome

    def draft_counters(self) -> tuple[int, int]:
        """Draft tokens that the engine has verified and accepted so far, by its own metrics."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
        drafted, accepted = (metrics[name].value if name in metrics else 0 for name in names)
        return drafted, accepted

    def run_round(self, first: int, requests: tuple[Request, ...], prompt_logits: bool) -> list[RequestResult]:
        """Submit requests together and generate; `first` is the index of the first one's first sequence."""
        assert self.observer is not None
        engine = self.llm.llm_engine
        index = first
        declined: dict[int, str] = {}
        own = [self.rank.has(i) for i in range(len(requests))]
        for is_own, request in zip(own, requests, strict=True):
            if not is_own:
                index += request.n
                continue
            for i in range(request.n):
                self.observer.start_request(index + i, request)
            try:
                params = sampling_params(request, prompt_logits)
                engine.add_request(str(index), {"prompt_token_ids": list(request.prompt_token_ids)}, params)
            except refusals() as error:
                declined[index] = str(error)
            index += request.n
        finished = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[int(output.request_id)] = output
        results: list[RequestResult] = []
        for is_own, request in zip(own, requests, strict=True):
            index = first + len(results)
            if not is_own:
                results += [RequestResult(token_ids=(), num_cached_tokens=0)] * request.n
            elif index in declined:
                nothing = RequestResult(token_ids=(), num_cached_tokens=0, unsupported=declined[index])
                results += [nothing] * request.n
            else:
                results += [answered(request, finished[index], i) for i in range(request.n)]
        return results

    def start_engine(self, num_speculative_tokens: int) -> None:
        """Build an engine for the job's checkpoint, after taking down the one before."""
        from vllm import LLM

        self.stop_engine()
        speculative = {"method": "mtp", "num_speculative_tokens": num_speculative_tokens}
        model = DeepseekV3Config.from_pretrained(self.job.checkpoint)
        self.llm = LLM(
            model=self.job.checkpoint,
            # Said outright: on a CPU vLLM turns a float32 checkpoint into bfloat16 by default.
            dtype=model.torch_dtype,
            # In the warm-up, which vLLM leaves out in eager mode, a later stage gets a buffer for what is sent to it.
            enforce_eager=self.rank.layout.pp == 1,
            # Its layers are watched as they run, and a graph that is replayed runs none.
            compilation_config={"cudagraph_mode": "NONE"},
            max_model_len=min(max(512, self.job.longest + SPARE), model.max_position_embeddings),
            max_num_seqs=max(8, self.job.most_requests),
            max_num_batched_tokens=2048,
            block_size=self.job.block_size,
            kv_cache_memory_bytes=max(64 << 20, self.job.longest << 14),
            # The share of a card that must be free at the start: other testees run beside this one.
            gpu_memory_utilization=0.05,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            disable_log_stats=False,
            logprobs_mode="processed_logprobs",
            max_logprobs=TOP_LOGPROBS,
            seed=0,
            speculative_config=speculative if num_speculative_tokens else None,
            **self.joined(),
        )
        self.num_speculative_tokens = num_speculative_tokens
        core = self.llm.llm_engine.engine_core.engine_core
        config = self.llm.llm_engine.vllm_config
        if not (config.cache_config.enable_prefix_caching and config.scheduler_config.enable_chunked_prefill):
            raise ConformanceError("vLLM switched prefix caching or chunked prefill off; the cases need both")
        self.scheduled_tokens = core.scheduler.max_num_scheduled_tokens
        runner = core.model_executor.driver_worker.worker.model_runner
        if self.rank.layout.pp > 1:
            send_prompt_logprobs(runner)
        self.observer = Observer(runner, self.job)
        self._served.append(self.observer.served())

    def joined(self) -> dict[str, Any]:
        """The engine's arguments of ranks, of which it becomes one."""
        if self.rank.layout == ONE_RANK:
            return {}
        # Without its scheduler's look ahead a step is a pass, which ranks of data parallelism make together.
        return {**join(self.rank, next(self.ports)), "async_scheduling": self.rank.layout.dp == 1}

    def stop_engine(self) -> None:
        """Free the engine's memory."""
        if self.llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = self.observer = None
        cleanup_dist_env_and_memory()
        gc.collect()


def send_prompt_logprobs(runner: Any) -> None:
    """To all stages, from the last: of an external launcher's vLLM sends them the logits of generated tokens only."""
    from vllm.distributed.parallel_state import get_pp_group

    stages, compute = get_pp_group(), runner._get_prompt_logprobs_dict

    def get_prompt_logprobs(*args: Any) -> Any:
        return stages.broadcast_object(compute(*args) if stages.is_last_rank else None, stages.world_size - 1)

    runner._get_prompt_logprobs_dict = get_prompt_logprobs


def sampling_params(request: Request, prompt_logits: bool) -> Any:
    """A request in vLLM's words."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        temperature=request.temperature,
        seed=request.seed,
        n=request.n,
        top_k=request.top_k or 0,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=dict(request.logit_bias) or None,
        logprobs=request.top_logprobs,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        detokenize=False,
        # Makes the engine compute logits for the prompt; such a request skips the prefix cache.
        prompt_logprobs=request.top_logprobs if request.prompt_logprobs else 0 if prompt_logits else None,
    )


def refusals() -> tuple[type[Exception], ...]:
    """What a request raises that asks what vLLM or the adapter cannot do: older versions have no class for it."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:
        return ValueError, DSV3Error
    return VLLMValidationError, ValueError, DSV3Error


def answered(request: Request, output: Any, i: int) -> RequestResult:
    """What vLLM answered for sequence i of a request."""
    generated = output.outputs[i]
    logprobs, top = _logprobs(generated.token_ids, generated.logprobs or (), request.top_logprobs)
    scored = output.prompt_logprobs[1:] if request.prompt_logprobs else ()
    of_prompt, of_prompt_top = _logprobs(request.prompt_token_ids[1:], scored, request.top_logprobs)
    return RequestResult(
        token_ids=request.prompt_token_ids + tuple(generated.token_ids),
        num_cached_tokens=output.num_cached_tokens or 0,
        logprobs=logprobs,
        top_logprobs=top,
        prompt_logprobs=of_prompt,
        prompt_top_logprobs=of_prompt_top,
    )


def _logprobs(
    token_ids: Sequence[int], answers: Sequence[Any], count: int
) -> tuple[tuple[float, ...], tuple[TopLogprobs, ...]]:
    """vLLM answers for each position token to `Logprob`, the position's own token and the likeliest ones in one."""
    chosen = tuple(of_token[token].logprob for token, of_token in zip(token_ids, answers, strict=False))
    top = (sorted(((t, a.logprob) for t, a in of_token.items()), key=lambda pair: -pair[1]) for of_token in answers)
    return chosen, tuple(tuple(pairs[:count]) for pairs in top)


class Observer:
    """Watches a vLLM model runner and its drafter."""

    def __init__(self, runner: Any, job: Job) -> None:
        self.runner = runner
        self.job = job
        self.outcome: program.Outcome | None = None
        self.seen = TokenTracker()
        self.seen_by_draft = TokenTracker()
        self.keys: list[RowKey] | None = None
        self.sampled_rows: list[int] = []
        self.hidden: torch.Tensor | None = None
        self.segments: list[tuple[int, int]] | None = None
        self.layers = self._watch_target(runner.get_model())
        self.drafter = getattr(runner, "drafter", None)
        if self.drafter is not None:
            self._watch_draft(self.drafter)

    def start_case(self, outcome: program.Outcome) -> None:
        """Record into `outcome` from now on."""
        self.outcome = outcome
        self.layers.recorder = outcome.recorder

    def start_request(self, index: int, request: Request) -> None:
        """Announce a request."""
        self.seen.start(index, request.prompt_token_ids)
        self.seen_by_draft.start(index, request.prompt_token_ids)

    def served(self) -> Served:
        """What the runner built."""
        ops = getattr(self.runner.get_model(), "ops", None)
        return Served(
            model_class=class_name(self.runner.get_model()),
            draft_class=class_name(self.drafter.model) if self.drafter is not None else None,
            profile=str(ops.setting.profile) if ops is not None else "unknown",
            kernels=program.kernels_of(ops) if ops is not None else {},
        )

    # The target model.

    def _watch_target(self, model: Any) -> LayerRecorder:
        prepare = self.runner._prepare_inputs

        def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any) -> Any:
            prepared = prepare(scheduler_output, num_scheduled_tokens, *args)
            self._step_begins(num_scheduled_tokens.tolist(), prepared[0].tolist())
            return prepared

        self.runner._prepare_inputs = prepare_inputs
        layers = LayerRecorder(model.model, model.config.num_hidden_layers)
        if is_ours(model) and self.job.operations:
            OperationRecorder(model.model, model.ops, layers.current, capture=self.job.capture)
        # Not by hooks: vLLM's own models have a `__call__` that passes them by.
        model.forward = partial(self._target_forward, model.forward)
        model.compute_logits = partial(self._target_logits, model.compute_logits)
        return layers

    def _step_begins(self, counts: list[int], sampled_rows: list[int]) -> None:
        requests = [_sequence(req_id) for req_id in self.runner.input_batch.req_ids]
        self.segments = list(zip(requests, counts, strict=True))
        self.sampled_rows = sampled_rows

    def _target_forward(self, forward: Any, **kwargs: Any) -> torch.Tensor:
        self.keys = None
        if self.outcome is not None and self.segments is not None and not _is_dummy():
            self.keys = _observe(self.seen, self.segments, kwargs["positions"], kwargs["input_ids"], 0)
        self.layers.keys = self.keys
        self.hidden = forward(**kwargs)
        self.layers.keys = None
        return self.hidden

    def _target_logits(self, compute_logits: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(hidden_states)
        if self.outcome is not None and self.keys is not None:
            self.outcome.recorder.add("logits", pick(self.keys, self._rows(hidden_states)), logits.float())
        return logits

    def _rows(self, hidden_states: torch.Tensor) -> list[int]:
        """Which rows of the pass these are: a slice for prompt logits, else the rows to sample from, gathered."""
        assert self.hidden is not None
        if hidden_states.untyped_storage().data_ptr() == self.hidden.untyped_storage().data_ptr():
            offset = hidden_states.storage_offset() - self.hidden.storage_offset()
            first = offset // self.hidden.stride(0)
            return list(range(first, first + len(hidden_states)))
        return self.sampled_rows

    # The draft model.

    def _watch_draft(self, drafter: Any) -> None:
        self.draft_step = 0
        self.draft_segments: list[tuple[int, int]] | None = None
        self.draft_keys: list[RowKey] = []
        self.draft_rows: list[int] | None = None
        first_pass = drafter.set_inputs_first_pass

        def set_inputs_first_pass(**kwargs: Any) -> Any:
            prepared = first_pass(**kwargs)
            starts = prepared[2].query_start_loc.tolist()
            assert self.segments is not None
            counts = [end - start for start, end in pairwise(starts)]
            self.draft_step = 0
            self.draft_rows = prepared[1].tolist()
            self.draft_segments = [(r, n) for (r, _), n in zip(self.segments, counts, strict=True)]
            return prepared

        drafter.set_inputs_first_pass = set_inputs_first_pass
        drafter.model.forward = partial(self._draft_forward, drafter.model.forward)
        drafter.model.compute_logits = partial(self._draft_logits, drafter.model.compute_logits)

    def _draft_forward(self, forward: Any, **kwargs: Any) -> Any:
        if self.outcome is not None and self.draft_segments is not None and not _is_dummy():
            if self.draft_step > 0:
                self.draft_segments = [(request, 1) for request, _ in self.draft_segments]
                self.draft_rows = None
            self.draft_keys = _observe(
                self.seen_by_draft, self.draft_segments, kwargs["positions"], kwargs["input_ids"], 1
            )
        return forward(**kwargs)

    def _draft_logits(self, compute_logits: Any, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        logits = compute_logits(hidden_states, *args)
        if self.outcome is not None and self.draft_segments is not None:
            keys = self.draft_keys if self.draft_rows is None else pick(self.draft_keys, self.draft_rows)
            self.outcome.recorder.add(f"mtp.{self.draft_step}", keys, logits.float())
            self.draft_step += 1
        return logits


def _is_dummy() -> bool:
    """Whether this pass is none of a request's: vLLM makes it because other ranks have one."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata is None


def _sequence(req_id: str) -> int:
    """The sequence that vLLM's id stands for: it appends a random suffix to the id that a request was submitted with,
    and puts the number of one of n sequences before it.
    """
    i, _, index = req_id.split("-")[0].rpartition("_")
    return int(i or 0) + int(index)


def _observe(
    tracker: TokenTracker,
    segments: list[tuple[int, int]],
    positions: torch.Tensor,
    input_ids: torch.Tensor,
    shift: int,
) -> list[RowKey]:
    """The keys of a pass over consecutive segments (request, tokens); `shift` is 1 for the draft, which sees the next
    token.
    """
    keys: list[RowKey] = []
    for request, count in segments:
        rows = slice(len(keys), len(keys) + count)
        keys += tracker.observe(request, (positions[rows] + shift).tolist(), input_ids[rows].tolist())
    return keys


if __name__ == "__main__":
    program.main(VllmTestee, VllmTestee)
