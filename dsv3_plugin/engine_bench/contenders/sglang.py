"""SGLang as a contender, with its own model or ours: its scheduler in this process, in its own loop.

The loop is the one that the engine would choose, overlapped where it overlaps. Each turn begins by asking for new
requests; that call is ours, and tells what was printed. The model runner's `forward` yields the logits that are sampled
from or verified, also where a graph is replayed. Tokenizer and detokenizer, processes of a server, are left out.

On several ranks each is such a scheduler. A server's first rank would send the others the requests; here each has them.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.conformance.testees.sglang import Idle, build_scheduler
from dsv3_plugin.conformance.testees.sglang import ranks as spread
from dsv3_plugin.engine_bench.contenders import program
from dsv3_plugin.engine_bench.contenders.ranks import Ranks, Visited, most
from dsv3_plugin.engine_bench.contenders.watch import Routers, Watch
from dsv3_plugin.engine_bench.protocol import Job
from dsv3_plugin.engine_bench.tokens import Circle
from dsv3_plugin.engines import class_name, is_ours
from dsv3_plugin.errors import EngineError
from dsv3_plugin.layers.moe import Router
from dsv3_plugin.sglang_backend import compat


class SglangContender:
    """An engine that is up."""

    def __init__(self, job: Job, circle: Circle, max_model_len: int, ranks: Ranks) -> None:
        begun = time.perf_counter()
        try:
            from sglang.srt.layers.moe.topk import TopK
            from sglang.srt.plugins import load_plugins
            from sglang.srt.utils import configure_logger
        except ImportError as error:
            raise EngineError(f"SGLang cannot be imported by this Python: {error}") from None
        load_plugins()
        imported = time.perf_counter()
        self.ranks = ranks
        place = ranks.place
        self.routers = Routers(ranks.replicas)
        self.routers.watch(Router, "forward", lambda chosen: chosen[0])
        self.routers.watch(TopK, "forward", lambda chosen: getattr(chosen, "topk_ids", None))
        self.model = DeepseekV3Config.from_pretrained(job.checkpoint)
        server_arguments = arguments(job, self.model, max_model_len, place.layout)
        configure_logger(server_arguments)
        # As SGLang does; threads that load weights do not inherit the mode.
        with torch.inference_mode(False), torch.no_grad():
            self.scheduler = build_scheduler(server_arguments, place, next(iter(place.ports), None))
        ranks.meet()
        # With data parallelism the replicas share it.
        self.max_batched_tokens = int(self.scheduler.chunked_prefill_size)
        self.runs = 0
        self._warm_up()
        up = time.perf_counter()
        self.runner = self.scheduler.tp_worker.model_runner
        exchanges = getattr(server_arguments, "moe_a2a_backend", "none") != "none"
        self.routers.gathered = ranks.replicas > 1 and not is_ours(self.runner.model) and not exchanges
        self.watch = Watch(circle, torch.device(job.device))
        self.router_ids = [id(m) for m in self.runner.model.modules() if isinstance(m, (Router, TopK))]
        self._watch_runner()
        pools = [self.runner.token_to_kv_pool]
        if job.drafts:
            drafter = self.scheduler.draft_worker.draft_worker
            self._watch_drafter(drafter)
            pools.append(drafter.draft_runner.token_to_kv_pool)
        room = int(self.scheduler.max_total_num_tokens)
        self.start = program.started(
            {"sglang": compat.sglang_version()},
            served=class_name(self.runner.model),
            import_seconds=imported - begun,
            up_seconds=up - imported,
            weight_bytes=sum(p.numel() * p.element_size() for p in self.runner.model.parameters()),
            cache_bytes_per_token=sum(map(bytes_per_slot, pools)),
            cache_tokens=room,
        )

    def _warm_up(self) -> None:
        """Answer a short request, as a server of SGLang does before it says that it is ready (`http_server`)."""
        prompt, wanted, printed = [10, 11, 12], 8, 0

        def turn(new: program.New) -> bool:
            nonlocal printed
            printed += sum(map(len, new.values()))
            return not self.ranks.all(printed >= wanted)

        self.run([prompt], wanted, self.max_batched_tokens, turn)

    def run(
        self, prompts: Sequence[list[int]], max_tokens: int, chunk: int, turn: Callable[[program.New], bool]
    ) -> None:
        """See `program.Engine`."""
        scheduler, receiver = self.scheduler, self.scheduler.request_receiver
        scheduler.chunked_prefill_size = chunk
        self.runs += 1
        requests = [self._request(f"{self.runs}.{i}", prompt, max_tokens) for i, prompt in enumerate(prompts)]
        scheduler.process_input_requests(requests)
        live = {int(req.rid.rpartition(".")[2]): req for req in scheduler.waiting_queue}
        if len(live) != len(prompts):
            raise EngineError(f"SGLang took {len(live)} of {len(prompts)} requests")
        scheduler.request_receiver = _Turns(scheduler, live, turn, self.ranks)
        try:
            scheduler.run_event_loop()
        except Idle:
            pass
        finally:
            scheduler.request_receiver = receiver

    def experts(self, rows: Sequence[int]) -> Visited | None:
        """See `program.Engine`."""
        own = self.ranks.place.dp_rank
        return self.routers.visited_by_each(self.router_ids, rows, own, self.model.n_routed_experts)

    def _request(self, name: str, prompt: list[int], max_tokens: int) -> Any:
        """As SGLang's tokenizer hands it to the scheduler."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(temperature=0, max_new_tokens=max_tokens, ignore_eos=True)
        params.normalize(None)
        return TokenizedGenerateReqInput(
            rid=name,
            input_text=None,
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )

    def _watch_runner(self) -> None:
        forward = self.runner.forward

        def watched(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.routers.begin_pass()
            output = forward(forward_batch, *args, **kwargs)
            logits = output.logits_output.next_token_logits
            if logits is not None and not forward_batch.forward_mode.is_idle():
                self.watch.force(logits, last_tokens(forward_batch, len(logits)))
            return output

        self.runner.forward = watched

    def _watch_drafter(self, drafter: Any) -> None:
        draft = drafter.draft

        def watched(*args: Any, **kwargs: Any) -> Any:
            to_verify = draft(*args, **kwargs)
            # Of each request the token that was chosen last, and the drafts behind it.
            tokens = to_verify.draft_token.view(-1, to_verify.draft_token_num)
            self.watch.force_drafts(tokens[:, 1:], tokens[:, 0])
            return to_verify

        drafter.draft = watched


class _Turns:
    """In the place of what receives a scheduler's requests, by which each turn of its loop begins."""

    def __init__(self, scheduler: Any, live: dict[int, Any], turn: Callable[[program.New], bool], ranks: Ranks) -> None:
        self.scheduler = scheduler
        self.live = live
        self.turn = turn
        self.ranks = ranks
        self.told = dict.fromkeys(live, 0)
        self.goes_on = True
        self.idle = 0

    def recv_requests(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Tell what was printed; nothing, or that all requests are to end. Raises `Idle` when they have."""
        from sglang.srt.managers.io_struct import AbortReq

        scheduler = self.scheduler
        alone = self.ranks.replicas == 1
        if not self.goes_on or (alone and all(req.finished() for req in self.live.values())):
            busy = scheduler.last_batch is not None or scheduler.waiting_queue or not scheduler.running_batch.is_empty()
            self.idle = 0 if busy else self.idle + 1
            if self.idle > 1 if alone else self.ranks.all(self.idle > 1):
                raise Idle
        if self.goes_on and not self.turn(self._new()):
            self.goes_on = False
            return [AbortReq(rid="", abort_all=True)]
        return []

    def _new(self) -> dict[int, list[int]]:
        new = {}
        for request, req in self.live.items():
            printed = len(req.output_ids)
            if printed > self.told[request]:
                new[request] = list(req.output_ids[self.told[request] :])
                self.told[request] = printed
        return new


def arguments(job: Job, model: DeepseekV3Config, max_model_len: int, layout: ParallelLayout) -> Any:
    """What the engine is started with, alike on all ranks."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ServerArgs

    from dsv3_plugin.sglang_backend import attention

    batch = max(most(measurement.requests, layout.dp) for measurement in job.measurements)
    known: dict[str, Any] = {
        "model_path": job.checkpoint,
        "dtype": model.torch_dtype,
        "device": job.device,
        "skip_tokenizer_init": True,
        "context_length": max_model_len,
        "max_running_requests": batch * layout.dp,
        "chunked_prefill_size": program.MAX_BATCHED_TOKENS,
        "disable_radix_cache": True,
        "random_seed": 0,
    }
    if attention.NAME in ATTENTION_BACKENDS:
        known["attention_backend"] = attention.NAME
    elif job.device == "cpu":
        known["attention_backend"] = "triton"
    if job.eager or job.device == "cpu":
        known["disable_cuda_graph"] = True
    else:
        known["cuda_graph_max_bs_decode"] = batch
    if job.device == "cpu":
        known["max_total_tokens"] = 1 << 15
    if job.drafts:
        known |= {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": job.drafts,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": job.drafts + 1,
        }
    return ServerArgs(**known | spread(layout) | job.arguments)


def last_tokens(forward_batch: Any, rows: int) -> torch.Tensor:
    """The tokens whose logits a pass yields: of prompts the last one of each, else all; graphs pad behind them."""
    mode, tokens = forward_batch.forward_mode, forward_batch.input_ids
    if mode.is_extend() and not mode.is_target_verify():
        return tokens[forward_batch.extend_seq_lens.cumsum(0)[:rows] - 1]
    return tokens[:rows]


def bytes_per_slot(pool: Any) -> float:
    """Of a latent pool, in all of its layers."""
    held = sum(layer.numel() * layer.element_size() for layer in pool.kv_buffer)
    return held / (pool.size + pool.page_size)  # behind the slots a page for padding


if __name__ == "__main__":
    program.main(SglangContender)
