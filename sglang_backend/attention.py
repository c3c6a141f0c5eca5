"""SGLang's latent cache behind the core's `Attend`.

SGLang keeps one vector a token in a pool of slots, and a table of the slots of each request. With `page_size` n its
allocator gives n tokens in a row n slots in a row, from a multiple of n on: a page. A pass brings the tokens of several
requests, at consecutive positions each, so a request's length is its last position plus one, in every phase: prefill,
chunks, decode, draft, verification. `LatentAttend` writes the vectors and calls `attend_to_pages`, or what the model
computes over pages: it moves data and computes nothing, and needs none of SGLang's attention backends.
`LatentBackend` is the backend of that kind to choose. It also carries the block tables into CUDA graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_context import get_attn_backend

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import is_ours
from dsv3_plugin.errors import EngineError
from dsv3_plugin.layers.attend import Compute, Select, attending, padded, select_all
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.prompt_batch import of_prompts, with_prompts
from dsv3_plugin.registry import Ops
from dsv3_plugin.sglang_backend import compat

logger = logging.getLogger("sglang.dsv3_plugin")

NAME = "dsv3"


class LatentAttend:
    """`Attend` for the tokens of one pass; layer `first_layer` of the model is layer 0 of the pool. `prompt_lens` has
    the requests' by their names, in a pass with rows of prompts.
    """

    def __init__(
        self,
        ops: Ops,
        config: DeepseekV3Config,
        first_layer: int,
        positions: torch.Tensor,
        forward_batch: Any,
        prompt_lens: Mapping[str, int],
    ) -> None:
        backend = get_attn_backend()
        self.ops = ops
        self.config = config
        self.first_layer = first_layer
        self.pool = backend.token_to_kv_pool
        self.slots = forward_batch.out_cache_loc
        self.page_size = self.pool.page_size
        counts = query_counts(forward_batch, len(positions))
        starts = host_starts(forward_batch, len(positions))
        ends = counts.cumsum(0)
        self.batch = PagedBatch(
            block_table=block_tables(backend, forward_batch.req_pool_indices),
            # All rows with which SGLang pads a graph are at position 0: their requests are as long as their queries.
            seq_lens=torch.maximum(positions[ends - 1] + 1, counts),
            query_start_loc=torch.cat((ends.new_zeros(1), ends)),
            # SGLang pads a prefill to a multiple of attention's TP ranks: what is behind is no request's.
            num_tokens=len(positions) if starts is None else starts[-1],
            num_blocks=len(self.slots_of(first_layer)) // self.page_size,
            block_size=self.page_size,
            host_query_start_loc=starts,
        )
        if ops.setting.profile.attention == "two_form":
            self.batch = with_prompts(self.batch, *prompts(forward_batch, self.batch.num_reqs, prompt_lens))

    def slots_of(self, layer_idx: int) -> torch.Tensor:
        """A layer's pool, [slots, 1, cached_dim]."""
        return self.pool.get_key_buffer(layer_idx - self.first_layer + self.pool.start_layer)

    def __call__(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        """See `dsv3_plugin.layers.attend.Attend`. Rows of no request write and read nothing, and get zeros."""
        if not self.batch.num_tokens:
            return q.new_zeros(*q.shape[:2], self.config.kv_lora_rank)
        q = q[: self.batch.num_tokens]
        return self.over_pages(layer_idx, cached, attending(self.ops, self.config, q, select))

    def has_prompts(self) -> bool:
        """See `dsv3_plugin.layers.attend.OverPages`."""
        return of_prompts(self.batch).has_prompts

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        """See `dsv3_plugin.layers.attend.OverPages`. Rows of no request get zeros."""
        tokens, pool = self.batch.num_tokens, self.slots_of(layer_idx)
        pool[self.slots[:tokens], 0] = cached[:tokens]
        pages = pool.view(-1, self.page_size, pool.shape[-1])
        return padded(compute(pages, self.batch), len(cached))


def compute(model: Callable[..., torch.Tensor], attend: LatentAttend, *rows: torch.Tensor) -> torch.Tensor:
    """`model` of a pass's rows, each [T, ...]. Without any it computes one of zeros, whose result is dropped: the ranks
    that share experts with this one have rows, and wait for it.
    """
    if len(rows[0]):
        return model(*rows, attend)
    return model(*(x.new_zeros(1, *x.shape[1:]) for x in rows), attend)[:0]


def query_counts(forward_batch: Any, tokens: int) -> torch.Tensor:
    """How many of a pass's `tokens` belong to each request, integers [requests]."""
    mode, requests = forward_batch.forward_mode, forward_batch.req_pool_indices
    if mode.is_extend() and not mode.is_target_verify():
        return forward_batch.extend_seq_lens
    # Decode, draft and verification: the same number for each.
    return torch.full_like(requests, tokens // max(len(requests), 1))


def host_starts(forward_batch: Any, tokens: int) -> tuple[int, ...] | None:
    """Where each request's tokens start, and their end, if SGLang knows it without asking the device."""
    mode, requests = forward_batch.forward_mode, len(forward_batch.req_pool_indices)
    if mode.is_extend() and not mode.is_target_verify():
        counts = forward_batch.extend_seq_lens_cpu
        return None if counts is None else tuple(accumulate(counts, initial=0))
    return tuple(tokens // max(requests, 1) * i for i in range(requests + 1))


def note_prompts(init_new: Callable[..., Any], kind: type, batch: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ForwardBatch.init_new`, the last that sees the requests: leave their prompts' lengths with our model
    in the `two_form` profile. They stay what they are when requests are retracted, and computed again with what they
    had generated.
    """
    ours = is_ours(runner.model) and runner.model.ops.setting.profile.attention == "two_form"
    if ours and batch.forward_mode.is_extend():
        runner.model.prompt_lens = {request.rid: len(request.origin_input_ids) for request in batch.reqs}
    return init_new(kind, batch, runner, *args, **kwargs)


def prompts(forward_batch: Any, requests: int, lengths: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """The prompts' lengths and the first positions of a pass's `requests`, from lengths by their names; 0 of those with
    which SGLang pads it, and in decode, draft and verification, which have no rows of prompts.
    """
    mode = forward_batch.forward_mode
    if not mode.is_extend() or mode.is_target_verify():
        return [0] * requests, [0] * requests
    found = [lengths[name] for name in forward_batch.rids]
    positions = forward_batch.extend_prefix_lens_cpu[: len(found)]
    padding = [0] * (requests - len(found))
    return found + padding, positions + padding


def block_tables(backend: Any, requests: torch.Tensor) -> torch.Tensor:
    """The pages of the requests' tokens, int32 [requests, pages of the context]."""
    if isinstance(backend, LatentBackend) and is_recorded(requests):
        return backend.tables_of_graphs[: len(requests)]
    page_size = backend.token_to_kv_pool.page_size
    return backend.req_to_token_pool.req_to_token[:, ::page_size][requests] // page_size


def is_recorded(x: torch.Tensor) -> bool:
    """Whether what is done with `x` becomes part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class LatentBackend(AttentionBackend):
    """Holds the pools, which is all that `LatentAttend` asks for in a pass that runs eagerly.

    A CUDA graph reads its inputs where they were when it was recorded. SGLang keeps positions, slots and numbers of
    requests there. The table of slots it may change as soon as a replay has begun, so the rows of a graph's requests
    are copied before.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        if is_batch_invariant_mode_enabled():  # `plugin` leaves it off, in the versions that it knows
            raise EngineError(
                "SGLang has replaced operators of torch, and its log-softmax rounds otherwise than a trainer's: leave"
                " --enable-deterministic-inference out, or use a version of SGLang that dsv3-plugin is tested with"
            )
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.max_context_len = runner.model_config.context_len
        self.tables_of_graphs = self.req_to_token_pool.req_to_token[:0, :: self.token_to_kv_pool.page_size]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Nothing: `LatentAttend` reads the batch itself."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make room for graphs of up to `max_bs` requests."""
        if len(self.tables_of_graphs) < max_bs:
            self.tables_of_graphs = self.tables_of_graphs.new_zeros(max_bs, self.tables_of_graphs.shape[1])

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Called before a graph is recorded, and before each of its replays."""
        requests = forward_batch.req_pool_indices[: forward_batch.batch_size]
        page_size = self.token_to_kv_pool.page_size
        first_slots = self.req_to_token_pool.req_to_token[:, ::page_size][requests]
        torch.floor_divide(first_slots, page_size, out=self.tables_of_graphs[: len(requests)])

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of the requests with which SGLang pads a batch."""
        return 1


class DraftSteps:
    """What SGLang's draft loop asks for: a backend for each of its steps. One graph holds all steps."""

    def __init__(self, backend: LatentBackend, steps: int) -> None:
        self.attn_backends = [backend] * steps
        self.init_forward_metadata = backend.init_forward_metadata
        self.init_cuda_graph_state = backend.init_cuda_graph_state
        self.init_forward_metadata_out_graph = backend.init_forward_metadata_out_graph
        self.init_forward_metadata_in_graph = backend.init_forward_metadata_in_graph


def size_slots(load_model: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.load_model`: SGLang sizes the slots of its pool by two numbers of config.json, which say what
    attention reads; what a slot holds is the model's to say.
    """
    loaded = load_model(runner, *args, **kwargs)
    if is_ours(runner.model):
        config: DeepseekV3Config = runner.model.config
        runner.model_config.kv_lora_rank = config.cached_dim - config.qk_rope_head_dim
    return loaded


def create_decode_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """Around `DraftBackendFactory.create_decode_backend`, which knows SGLang's own backends only."""
    backend = factory.draft_model_runner.attn_backend
    if not isinstance(backend, LatentBackend) or factory.speculative_num_steps <= 1:
        return original(factory)
    return DraftSteps(backend, factory.speculative_num_steps)


def create_draft_extend_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """Around `DraftBackendFactory.create_draft_extend_backend`."""
    backend = factory.draft_model_runner.attn_backend
    return backend if isinstance(backend, LatentBackend) else original(factory)


def record_draft_extend(record: Callable[[Any], None], worker: Any) -> None:
    """Around `EagleDraftWorker._capture_cuda_graphs`, which records the draft's pass over verified tokens for SGLang's
    own backends only. Over several ranks it stays eager.
    """
    record(worker)
    runner = worker.draft_runner
    if not isinstance(worker.draft_extend_attn_backend, LatentBackend) or runner.model.layout.experts.size > 1:
        return
    from sglang.srt.environ import envs
    from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import EAGLEDraftExtendCudaGraphRunner

    if compat.tokens_in_graphs(torch.device(runner.device)) and not envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get():
        worker.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(worker)
        logger.info("dsv3-plugin: the draft's pass over verified tokens is recorded")
