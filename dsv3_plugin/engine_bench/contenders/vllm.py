"""vLLM as a contender, with its own model or ours: its engine in this process, stepped as `LLM.generate` steps it.

On several ranks each is such an engine, as vLLM's external launcher starts them. Replicas without requests make dummy
passes, as a server's do; those of a server ask each other only now and then, so here `Ranks` asks, and not `LLMEngine`.

Three calls of its model runner tell what is needed: `_prepare_inputs` which rows are sampled from, `_model_forward`
which tokens the rows have, also where a graph is replayed, and `compute_logits` what is sampled from.
"""

from __future__ import annotations

import os
import time

from dsv3_plugin.engines import class_name, is_ours, switched_off

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the model is another process's
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.layouts import ONE_RANK, RankOf
from dsv3_plugin.conformance.testees.vllm_ranks import join
from dsv3_plugin.engine_bench.contenders import program
from dsv3_plugin.engine_bench.contenders.ranks import Ranks, Visited, most
from dsv3_plugin.engine_bench.contenders.watch import Routers, Watch
from dsv3_plugin.engine_bench.protocol import Job
from dsv3_plugin.engine_bench.tokens import Circle
from dsv3_plugin.errors import EngineError
from dsv3_plugin.layers.moe import Router
from dsv3_plugin.vllm_backend import compat


class VllmContender:
    """An engine that is up."""

    max_batched_tokens = program.MAX_BATCHED_TOKENS

    def __init__(self, job: Job, circle: Circle, max_model_len: int, ranks: Ranks) -> None:
        begun = time.perf_counter()
        try:
            from vllm import LLM
            from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
            from vllm.platforms import current_platform
        except ImportError as error:
            raise EngineError(f"vLLM cannot be imported by this Python: {error}") from None
        if current_platform.device_type != job.device:
            raise EngineError(f"this vLLM is built for {current_platform.device_type}, the job is for {job.device}")
        imported = time.perf_counter()
        self.ranks = ranks
        self.routers = Routers(ranks.replicas)
        self.routers.watch(Router, "forward", lambda chosen: chosen[0])
        self.routers.watch(BaseRouter, "_select_experts", lambda chosen: chosen[1])
        self.model = DeepseekV3Config.from_pretrained(job.checkpoint)
        self.llm = LLM(**arguments(job, self.model, max_model_len, ranks.place))
        ranks.meet()
        up = time.perf_counter()
        core = self.llm.llm_engine.engine_core.engine_core
        self.core = core
        self.scheduler = core.scheduler
        self.scheduled_tokens = core.scheduler.max_num_scheduled_tokens
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.watch = Watch(circle, self.runner.device)
        self.graph_rows = 0
        model = self.runner.get_model()
        self.router_ids = routers_of(model, Router, BaseRouter)
        self.routers.gathered = ranks.replicas > 1 and any(dispatches(module) for module in model.modules())
        self._watch_runner()
        if job.drafts:
            self._watch_drafter()
        caches = [cache for cache in _tensors(self.runner.kv_caches) if cache.numel()]
        cache_config = self.llm.llm_engine.vllm_config.cache_config
        room = cache_config.num_gpu_blocks * cache_config.block_size
        self.start = program.started(
            {"vllm": compat.vllm_version()},
            served=class_name(model),
            import_seconds=imported - begun,
            up_seconds=up - imported,
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            cache_bytes_per_token=sum(cache.numel() * cache.element_size() for cache in caches) / room,
            cache_tokens=room,
        )
        self.runs = 0

    def run(
        self, prompts: Sequence[list[int]], max_tokens: int, chunk: int, turn: Callable[[program.New], bool]
    ) -> None:
        """See `program.Engine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.runs += 1
        self.scheduler.max_num_scheduled_tokens = min(chunk, self.scheduled_tokens)
        engine = self.llm.llm_engine
        number = {f"{self.runs}.{index}": index for index in range(len(prompts))}
        for name, index in number.items():
            engine.add_request(name, {"prompt_token_ids": prompts[index]}, params)
        goes_on = True
        while goes_on:
            outputs = []
            # Not the engine's own question, which asks all replicas.
            if engine.output_processor.has_unfinished_requests():
                outputs = engine.step()
            elif self.ranks.replicas > 1:
                self.core.execute_dummy_batch()
            else:
                return
            new = {number[output.request_id]: output.outputs[0].token_ids for output in outputs}
            goes_on = turn({index: list(tokens) for index, tokens in new.items() if tokens})
        engine.abort_request(list(number))

    def experts(self, rows: Sequence[int]) -> Visited | None:
        """See `program.Engine`."""
        place = self.ranks.place
        if place.layout.tp > 1 and place.layout.dp > 1 and not is_ours(self.runner.get_model()):
            return None  # vLLM then shares the rows of a replica among its ranks
        return self.routers.visited_by_each(self.router_ids, rows, place.dp_rank, self.model.n_routed_experts)

    def _watch_runner(self) -> None:
        runner, watch = self.runner, self.watch
        model = runner.get_model()
        prepare, forward, compute = runner._prepare_inputs, runner._model_forward, model.compute_logits
        rows: torch.Tensor | None = None
        tokens: torch.Tensor | None = None

        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            nonlocal rows
            prepared = prepare(*args, **kwargs)
            rows = prepared[0]
            return prepared

        def model_forward(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            tokens, self.graph_rows = input_ids, len(input_ids)
            self.routers.begin_pass()
            return forward(input_ids, *args, **kwargs)

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute(*args, **kwargs)
            if rows is not None and tokens is not None and len(rows) == len(logits):
                watch.force(logits, tokens[rows])
            return logits

        runner._prepare_inputs, runner._model_forward = prepare_inputs, model_forward
        model.compute_logits = compute_logits

    def _watch_drafter(self) -> None:
        propose = self.runner.drafter.propose

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.watch.looking:
                self.routers.copy(self.graph_rows)
            drafts = propose(*args, **kwargs)
            self.watch.force_drafts(drafts, kwargs["next_token_ids"])
            return drafts

        self.runner.drafter.propose = watched


def arguments(job: Job, model: DeepseekV3Config, max_model_len: int, place: RankOf) -> dict[str, Any]:
    """What the engine of a rank is started with."""
    layout = place.layout
    known: dict[str, Any] = {
        "model": job.checkpoint,
        "dtype": model.torch_dtype,
        "skip_tokenizer_init": True,
        "max_model_len": max_model_len,
        "max_num_seqs": max(most(measurement.requests, layout.dp) for measurement in job.measurements),
        "max_num_batched_tokens": program.MAX_BATCHED_TOKENS,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "enforce_eager": job.eager or job.device == "cpu",
        "seed": 0,
    }
    if layout != ONE_RANK:
        known |= join(place, place.ports[0])
    if job.drafts:
        known["speculative_config"] = {"method": "mtp", "num_speculative_tokens": job.drafts}
    if job.device == "cpu":
        known |= {"kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.3}
        if not switched_off():
            # Without AMX vLLM switches chunked prefill off for its own CPU MLA kernels, which are not used.
            os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    return known | job.arguments


def dispatches(module: torch.nn.Module) -> bool:
    """Whether tokens of all replicas are gathered before experts are chosen for them."""
    parts = (module, *vars(module).values())
    return any(getattr(part, "do_naive_dispatch_combine", False) is True for part in parts)


def routers_of(model: torch.nn.Module, ours: type, theirs: type) -> list[int]:
    """The routers of a model in the order of its layers, by what `Routers` knows them by."""
    found: dict[int, None] = {}
    for module in model.modules():
        for candidate in (module, *vars(module).values()):
            if isinstance(candidate, (ours, theirs)):
                found[id(candidate)] = None
    return list(found)


def _tensors(caches: Any) -> list[torch.Tensor]:
    """All tensors in lists of lists."""
    if isinstance(caches, torch.Tensor):
        return [caches]
    return [tensor for cache in caches for tensor in _tensors(cache)]


if __name__ == "__main__":
    program.main(VllmContender)
