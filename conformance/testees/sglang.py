"""The SGLang testee: a real SGLang scheduler in this process, with whatever model it builds.

SGLang runs its scheduler (waiting queue, radix cache, model runner, draft worker) in a process of its own; here it is
built in this one and stepped by hand, without tokenizer and HTTP server, so that the model can be observed. The
engine's schedule is its own. The rows are taken where the engine itself computes them: the model's forward pass tells
which tokens of which requests a batch holds, the logits processor which of their rows it computes logits for.

On several ranks each is such a scheduler, in a process of its own. All get the same requests, but for data parallelism;
SGLang would broadcast them.
"""

from __future__ import annotations

import os

# On one thread, as the CPU arithmetic requires.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import sys
from array import array
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.cases import CHUNK, SPARE
from dsv3_plugin.conformance.layouts import ALONE, ParallelLayout, RankOf
from dsv3_plugin.conformance.protocol import Case, Job, Request, RequestResult, Served, TopLogprobs
from dsv3_plugin.conformance.rows import LayerRecorder, RowKey, RowRecorder, TokenTracker, pick
from dsv3_plugin.conformance.taps import OperationRecorder
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.engines import class_name, is_ours
from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.profile import attention_from_environment
from dsv3_plugin.sglang_backend import compat

MAX_BATCHED_TOKENS = 2048


class SglangTestee:
    """One engine at a time; a new one where the number of draft tokens changes, which SGLang fixes at start."""

    name = "sglang"
    # On a CPU its Triton kernels are interpreted, attention too, whose results there are no numbers of the model's.
    own_model_devices = ("cuda",)
    schedule_not_followed = None

    def __init__(self, job: Job, rank: RankOf = ALONE) -> None:
        try:
            from sglang.srt.plugins import load_plugins
        except ImportError as error:
            raise ConformanceError(f"SGLang cannot be imported by this Python: {error}") from None
        load_plugins()
        self.job = job
        self.rank = rank
        self.ports = iter(rank.ports)
        self.num_speculative_tokens: int | None = None
        self.observer: Observer | None = None
        self.scheduler: Any = None
        self._served: list[Served] = []
        self.without_radix_cache = attention_from_environment() == "two_form"
        """The adapter asks for it."""

    def versions(self) -> dict[str, str]:
        """SGLang's version."""
        return {"sglang": compat.sglang_version()}

    def served(self) -> Served:
        """The classes that SGLang built; with speculative decoding where any case had it."""
        return max(self._served, key=lambda served: served.draft_class is not None)

    def run(self, case: Case) -> program.Outcome:
        """Submit the case's rounds and step the engine until each has finished."""
        if case.num_speculative_tokens and self.rank.layout.pp > 1:
            return program.Outcome.declined(case, "SGLang makes no drafts for a model in stages")
        if case.num_speculative_tokens and min(self.rank.layout.tp, self.rank.layout.dp) > 1:
            return program.Outcome.declined(case, "no drafts where ranks share the heads of a data-parallel replica")
        if case.num_speculative_tokens != self.num_speculative_tokens:
            # As SGLang does; threads that load weights do not inherit the mode.
            with torch.inference_mode(False), torch.no_grad():
                self.start_engine(case.num_speculative_tokens)
        assert self.observer is not None
        if not self.scheduler.flush_cache():
            raise ConformanceError("SGLang did not empty its cache between two cases")
        self.scheduler.chunked_prefill_size = case.max_num_batched_tokens or MAX_BATCHED_TOKENS
        outcome = program.Outcome()
        self.observer.start_case(outcome)
        index = 0
        for requests in case.single_rounds:
            self.run_round(outcome, index, requests, case.prompt_logits)
            index += len(requests)
        return outcome

    def run_round(
        self, outcome: program.Outcome, first: int, requests: tuple[Request, ...], prompt_logits: bool
    ) -> None:
        """Submit requests together and generate."""
        from dsv3_plugin.sglang_backend import sampling

        assert self.observer is not None
        inputs = {}
        for index, request in enumerate(requests, first):
            if self.rank.has(index - first):
                self.observer.start_request(index, request)
                inputs[index] = tokenized_request(index, request, prompt_logits)
        self.scheduler.process_input_requests(list(inputs.values()))
        live = {int(req.rid): req for req in self.scheduler.waiting_queue}
        run_until_idle(self.scheduler)
        for index, request in enumerate(requests, first):
            req = live.get(index)
            if index not in inputs:
                outcome.requests.append(RequestResult(token_ids=(), num_cached_tokens=0))
                continue
            if req is None:
                reason = sampling.unsupported(self.scheduler, inputs[index])
                outcome.requests.append(RequestResult(token_ids=(), num_cached_tokens=0, unsupported=reason))
                continue
            if not req.finished():
                raise ConformanceError(f"SGLang stopped before request {index} was finished")
            outcome.requests.append(answered(request, req))
            outcome.num_draft_tokens += req.spec_verify_ct * (self.num_speculative_tokens or 0)
            outcome.num_accepted_tokens += req.spec_num_correct_drafts

    def start_engine(self, num_speculative_tokens: int) -> None:
        """Build an engine for the job's checkpoint, after taking down the one before."""
        from sglang.srt.utils import configure_logger

        self.stop_engine()
        job = self.job
        arguments = server_arguments(
            job.checkpoint,
            job.device,
            num_speculative_tokens,
            longest=job.longest,
            most_requests=job.most_requests,
            disable_cuda_graph=True,
            disable_radix_cache=self.without_radix_cache,
            **ranks(self.rank.layout),
        )
        configure_logger(arguments)
        self.scheduler = build_scheduler(arguments, self.rank, next(self.ports, None))
        if self.rank.layout.pp > 1:
            self.scheduler.init_pp_loop_state()  # its loop has not begun, and a flush looks there
        # Some versions never mix chunks with drafts; the cases with drafts have no chunks.
        mixed = self.scheduler.is_mixed_chunk or num_speculative_tokens
        if self.scheduler.disable_radix_cache != self.without_radix_cache or not mixed:
            raise ConformanceError("SGLang switched the radix cache or mixed chunks off; the cases need both")
        self.num_speculative_tokens = num_speculative_tokens
        self.observer = Observer(self.scheduler, job)
        self._served.append(self.observer.served())

    def stop_engine(self) -> None:
        """Free the engine's memory."""
        if self.scheduler is None:
            return
        from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
        from sglang.srt.eplb.expert_location import set_global_expert_location_metadata

        self.scheduler.release_host_resources()
        self.scheduler = self.observer = None
        destroy_model_parallel()
        destroy_distributed_environment()
        set_global_expert_location_metadata(None, allow_overwrite=True)
        gc.collect()


def ranks(layout: ParallelLayout) -> dict[str, Any]:
    """SGLang's arguments of a layout. Its TP group is all ranks of a stage."""
    return {
        "tp_size": layout.dp * layout.tp,
        "dp_size": layout.dp,
        "enable_dp_attention": layout.dp > 1,
        "pp_size": layout.pp,
        "ep_size": layout.ep,
    }


def server_arguments(
    checkpoint: str,
    device: str,
    num_speculative_tokens: int,
    *,
    longest: int = 0,
    most_requests: int = 0,
    **others: Any,
) -> Any:
    """How the suite starts SGLang.

    Args:
        checkpoint: a folder.
        device: `cpu` or `cuda`.
        num_speculative_tokens: drafts a step.
        longest: tokens of the longest sequence to come; 512 are always taken.
        most_requests: that are to run together; 8 always may.
        others: its arguments of CUDA graphs and of ranks.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ServerArgs

    from dsv3_plugin.sglang_backend import attention

    config = DeepseekV3Config.from_pretrained(checkpoint)
    ours = attention.NAME in ATTENTION_BACKENDS
    speculative = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": num_speculative_tokens,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": num_speculative_tokens + 1,
    }
    return ServerArgs(
        model_path=checkpoint,
        # Said outright: SGLang runs a float32 checkpoint in another dtype by default.
        dtype=config.torch_dtype,
        device=device,
        attention_backend=attention.NAME if ours else "triton",
        # Honours seeds. With its own attention SGLang would cut chunks to multiples of 4096 tokens.
        enable_deterministic_inference=ours,
        skip_tokenizer_init=True,
        context_length=min(max(512, longest + SPARE), config.max_position_embeddings),
        max_total_tokens=max(4096, 3 * longest, 4 * CHUNK * most_requests),
        max_running_requests=max(8, most_requests),
        chunked_prefill_size=MAX_BATCHED_TOKENS,
        enable_mixed_chunk=True,
        disable_overlap_schedule=True,
        random_seed=0,
        # The cases' chunks are whole pages. On a CPU a page is a slot.
        page_size=CHUNK if ours and device == "cuda" else None,
        **others,
        **(speculative if num_speculative_tokens else {}),
    )


def build_scheduler(arguments: Any, rank: RankOf = ALONE, port: int | None = None) -> Any:
    """The scheduler of one rank; several meet at a port."""
    from sglang.srt import runtime_context
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import PortArgs

    layout = rank.layout
    ports = PortArgs.init_new(arguments)
    if port is not None:
        # Not an argument: each rank would wait until nobody listens there, and the first does.
        ports.nccl_port = port
    gpu_id = 0 if arguments.device == "cpu" else rank.rank
    dp_rank = rank.dp_rank if layout.dp > 1 else None
    tp_rank = rank.dp_rank * layout.tp + rank.tp_rank
    if hasattr(runtime_context, "SpawnRanks"):
        world_rank = rank.pp_rank * layout.dp * layout.tp + tp_rank
        spawned = runtime_context.SpawnRanks(world_rank=world_rank, dp_rank=dp_rank, gpu_id=gpu_id)
        runtime_context.publish(arguments, role="scheduler", ranks=spawned)
        return Scheduler(arguments, ports)
    runtime_context.publish(arguments, role="scheduler")
    return Scheduler(
        arguments,
        ports,
        gpu_id=gpu_id,
        tp_rank=tp_rank,
        moe_ep_rank=tp_rank if layout.ep > 1 else 0,
        pp_rank=rank.pp_rank,
        attn_cp_rank=0,
        moe_dp_rank=0,
        dp_rank=dp_rank,
    )


def run_until_idle(scheduler: Any) -> None:
    """Turns of the scheduler's own loop until it has nothing to do; ranks make the same."""
    if scheduler.pp_group.world_size > 1:
        run_stages(scheduler)
        return
    for batch in steps(scheduler):
        # For the log: the schedule that the engine chose. One write: ranks share the pipe.
        sys.stdout.write(f"{batch.forward_mode.name} of {len(batch.reqs)} requests\n")
        sys.stdout.flush()


class Idle(Exception):  # noqa: N818 - no error
    """Ends the loop of a stage."""


class UntilIdle:
    """In the place of what receives a stage's requests, by which each turn of its loop begins. All stages see in the
    same turn that none has had a batch for some.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.receiver = scheduler.request_receiver
        self.idle = 0

    def recv_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `Idle` in the end."""
        scheduler = self.scheduler
        busy = scheduler.waiting_queue or any(batch is not None for batch in scheduler.mbs)
        self.idle = 0 if busy else self.idle + 1
        if self.idle > 2 * scheduler.pp_loop_size:
            raise Idle
        return self.receiver.recv_requests(*args, **kwargs)


def run_stages(scheduler: Any) -> None:
    """The loop of pipeline stages, which would go on for ever."""
    scheduler.request_receiver = UntilIdle(scheduler)
    try:
        scheduler.run_event_loop()
    except Idle:
        # What was sent last is on its way, and the next loop would forget it.
        for work in (scheduler.send_req_work, scheduler.send_proxy_work, scheduler.send_output_work):
            scheduler._pp_commit_comm_work(work)
        scheduler.request_receiver = scheduler.request_receiver.receiver


def steps(scheduler: Any) -> Iterator[Any]:
    """Turns of the loop of a single stage; yields each batch before it runs."""
    idle = 0
    # Where all requests of a batch have finished, it takes a turn to see that others wait.
    while idle < 2:
        plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        idle = 0 if batch else idle + 1
        if batch:
            yield batch
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        scheduler.last_batch = batch


def tokenized_request(index: int, request: Request, prompt_logits: bool) -> Any:
    """A request as SGLang's tokenizer hands it to the scheduler."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=request.temperature,
        sampling_seed=request.seed,
        top_k=request.top_k or -1,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias={str(token): bias for token, bias in request.logit_bias} or None,
        max_new_tokens=request.max_tokens,
        ignore_eos=True,
    )
    params.normalize(None)
    return TokenizedGenerateReqInput(
        rid=str(index),
        input_text=None,
        input_ids=array("q", request.prompt_token_ids),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=request.logprobs or request.prompt_logprobs or prompt_logits,
        # From the first on: makes the engine compute logits for the prompt.
        logprob_start_len=0 if prompt_logits or request.prompt_logprobs else -1,
        top_logprobs_num=request.top_logprobs,
        token_ids_logprob=None,
        stream=False,
    )


def answered(request: Request, req: Any) -> RequestResult:
    """What SGLang answered; it verifies a step to its end, also beyond the last token that a request asked for."""
    said, tokens = req.logprob, tuple(req.output_ids_through_stop)
    of_prompt: dict[str, Any] = {}
    if request.prompt_logprobs:
        # The prompt's first token has none.
        of_prompt = {
            "prompt_logprobs": tuple(said.input_token_logprobs_val[1:]),
            "prompt_top_logprobs": _pairs(request, said.input_top_logprobs_idx, said.input_top_logprobs_val, first=1),
        }
    return RequestResult(
        token_ids=request.prompt_token_ids + tokens,
        num_cached_tokens=req.cached_tokens,
        logprobs=tuple(said.output_token_logprobs_val[: len(tokens)]) if request.logprobs else (),
        top_logprobs=_pairs(request, said.output_top_logprobs_idx, said.output_top_logprobs_val)[: len(tokens)],
        **of_prompt,
    )


def _pairs(request: Request, token_ids: Any, logprobs: Any, first: int = 0) -> tuple[TopLogprobs, ...]:
    """Of the positions from `first` on. SGLang keeps tokens and values apart, and nothing where none were asked for."""
    if not request.top_logprobs:
        return ()
    return tuple(tuple(zip(*pairs, strict=True)) for pairs in zip(token_ids[first:], logprobs[first:], strict=True))


class Observer:
    """Watches the models of a scheduler's workers."""

    def __init__(self, scheduler: Any, job: Job) -> None:
        self.outcome: program.Outcome | None = None
        self.target = Watched(scheduler.tp_worker.model_runner.model, 0)
        if job.operations and self.target.layers is not None and is_ours(self.target.model):
            model = self.target.model
            OperationRecorder(model.model, model.ops, self.target.layers.current, capture=job.capture)
        self.draft: Watched | None = None
        if scheduler.draft_worker is not None:
            self.draft = Watched(scheduler.draft_worker.draft_worker.draft_runner.model, 1)

    def start_case(self, outcome: program.Outcome) -> None:
        """Record into `outcome` from now on."""
        for watched in (self.target, self.draft):
            if watched is not None:
                watched.start_case(outcome.recorder)

    def start_request(self, index: int, request: Request) -> None:
        """Announce a request."""
        for watched in (self.target, self.draft):
            if watched is not None:
                watched.seen.start(index, request.prompt_token_ids)

    def served(self) -> Served:
        """What the workers built."""
        ops = getattr(self.target.model, "ops", None)
        return Served(
            model_class=class_name(self.target.model),
            draft_class=class_name(self.draft.model) if self.draft is not None else None,
            profile=str(ops.setting.profile) if ops is not None else "unknown",
            kernels=program.kernels_of(ops) if ops is not None else {},
        )


class Watched:
    """A model, and what its passes compute. `shift` is 1 for the draft, which sees the next token."""

    def __init__(self, model: Any, shift: int) -> None:
        self.model = model
        self.shift = shift
        self.seen = TokenTracker()
        self.recorder: RowRecorder | None = None
        self.keys: list[RowKey] = []
        self.rows: list[int] = []
        """Rows of the pass whose logits are still to come."""
        self.kept: set[int] | None = None
        """Rows of the pass that continue what was accepted; None: all."""
        self.draft_step = 0
        self.layers: LayerRecorder | None = None
        if shift == 0:
            self.layers = LayerRecorder(model.model, model.config.num_hidden_layers)
        processor = model.logits_processor
        model.forward = partial(self._forward, model.forward)
        processor._get_pruned_states = partial(self._prune, processor._get_pruned_states)
        processor._compute_lm_head = partial(self._head, processor._compute_lm_head)

    def start_case(self, recorder: RowRecorder) -> None:
        """Record from now on."""
        self.recorder = recorder
        if self.layers is not None:
            self.layers.recorder = recorder

    def _forward(
        self, forward: Any, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, *args: Any, **kw: Any
    ) -> Any:
        if self.recorder is None:  # the engine's warm-up
            return forward(input_ids, positions, forward_batch, *args, **kw)
        counts = _tokens_of_requests(forward_batch, len(input_ids))
        self.keys = []
        for rid, count in zip(forward_batch.rids, counts, strict=True):
            rows = slice(len(self.keys), len(self.keys) + count)
            positions_seen = (positions[rows] + self.shift).tolist()
            self.keys += self.seen.observe(int(rid), positions_seen, input_ids[rows].tolist())
        mode = forward_batch.forward_mode
        # The draft loop decodes; what precedes it, over a prompt or over what was just verified, is its first step.
        self.draft_step = self.draft_step + 1 if mode.is_decode() else 0
        self.kept = None
        if mode.is_draft_extend_v2():
            # The draft runs over all verified tokens, also over those that were rejected; only the last accepted row
            # is read.
            accepted = forward_batch.spec_info.num_accept_tokens[: len(counts)].tolist()
            self.kept = {i * counts[0] + count - 1 for i, count in enumerate(accepted)}
        if self.layers is not None:
            self.layers.keys = self.keys or None
        try:
            return forward(input_ids, positions, forward_batch, *args, **kw)
        finally:
            if self.layers is not None:
                self.layers.keys = None

    def _prune(self, prune: Any, hidden: torch.Tensor, before_norm: Any, aux: Any, metadata: Any) -> Any:
        """The logits processor picks the rows that it needs; let it pick from their numbers too."""
        numbers = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        self.rows = prune(numbers, None, None, metadata)[0].flatten().tolist()
        return prune(hidden, before_norm, aux, metadata)

    def _head(self, head: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = head(hidden, *args, **kwargs)
        rows, self.rows = self.rows[: len(hidden)], self.rows[len(hidden) :]
        assert len(rows) == len(hidden), "logits of rows that the pass does not have"
        if self.recorder is not None:
            # Rows behind those of requests are padding.
            kept = [i for i, row in enumerate(rows) if row < len(self.keys) and (self.kept is None or row in self.kept)]
            stream = f"mtp.{self.draft_step}" if self.shift else "logits"
            self.recorder.add(stream, pick(self.keys, [rows[i] for i in kept]), logits[kept].float())
        return logits


def _tokens_of_requests(forward_batch: Any, tokens: int) -> list[int]:
    """How many of a pass's tokens belong to each request; data-parallel ranks pad to each other's numbers."""
    mode, requests = forward_batch.forward_mode, len(forward_batch.rids)
    if requests and mode.is_extend() and not mode.is_target_verify():
        return list(forward_batch.extend_seq_lens_cpu[:requests])
    if (unpadded := forward_batch._original_num_tokens) is not None:
        tokens = unpadded
    return [tokens // requests] * requests if requests else []


if __name__ == "__main__":
    program.main(SglangTestee, SglangTestee)
