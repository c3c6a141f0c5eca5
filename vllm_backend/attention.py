"""The latent cache as a vLLM attention layer.

vLLM allocates the pages and tells, for each step, which tokens belong to which request (`query_start_loc`,
`seq_lens`, `block_table`) and where to write them (`slot_mapping`). The layer writes what is cached and calls
`attend_to_pages`, or what the model computes over pages: it moves data and computes nothing. It does not use vLLM's
attention backends, so it runs on every platform, size and dtype that the kernels serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group, is_v1_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.attend import FAST_PAGE_SIZE, Compute, Select, attending, padded, select_all
from dsv3_plugin.layers.two_form import take_memory
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.prompt_batch import no_requests, of_prompts, with_prompts
from dsv3_plugin.registry import Ops
from dsv3_plugin.vllm_backend import compat, graphs
from dsv3_plugin.vllm_backend.prompts import Prompts


@dataclass
class LatentMetadata:
    """One step's batch, the same for all layers, and where its tokens are kept."""

    batch: PagedBatch
    slots: torch.Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Picks what `LatentCache` needs out of vLLM's common metadata, once a step for all layers.

    A CUDA graph of a decode step reads it where it was when the graph was captured. So what is made here stays in
    buffers of the builder; the rest are views of vLLM's own.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    answers = True
    """Whether the next pass is of requests. A rank also makes passes only because others wait for it."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        caches = vllm_config.compilation_config.static_forward_context
        self.cache = caches[layer_names[0]]
        self.weight_loaders = {caches[name].weight_loader for name in layer_names}
        scheduler = vllm_config.scheduler_config
        self.seq_lens = torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        most_tokens = scheduler.max_num_batched_tokens + scheduler.max_num_seqs
        self.slots = torch.zeros(most_tokens, dtype=torch.int64, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """Called once a step for each cache group; raises `CheckpointError` where the weights may not answer.

        Here and not in the model, whose forward pass no one enters when a CUDA graph is replayed.
        """
        if self.answers:
            for weight_loader in self.weight_loaders:
                weight_loader.require_whole()
        return self._build(common_attn_metadata, self.cache.prompts if self.answers else None)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> LatentMetadata:
        """A capture answers nobody: it may come before the weights."""
        return self._build(common_attn_metadata)

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> LatentMetadata:
        """The first pass of a draft is over the target's tokens. What it drafts then is in no prompt: where the target
        is amid one, nobody reads it.
        """
        return self.build(0, common_attn_metadata) if draft_index == 0 else self._build(common_attn_metadata)

    def _build(self, common: Any, prompts: Prompts | None = None) -> LatentMetadata:
        tokens, requests = common.num_actual_tokens, common.num_reqs
        batch = PagedBatch(
            block_table=common.block_table_tensor[:requests],
            # Copied: the draft loop changes vLLM's tensor in place between its steps.
            seq_lens=self.seq_lens[:requests].copy_(common.seq_lens[:requests]),
            query_start_loc=common.query_start_loc[: requests + 1],
            num_tokens=tokens,
            num_blocks=len(compat.latent_pages(self.cache.kv_cache)),
            block_size=self.block_size,
            host_query_start_loc=tuple(common.query_start_loc_cpu[: requests + 1].tolist()),
        )
        if self.cache.ops.setting.profile.attention == "two_form":
            nothing = [0] * requests, [0] * requests
            batch = with_prompts(batch, *(nothing if prompts is None else prompts.of(requests)))
        # A slot of -1 marks a token that must not be kept: it goes to page 0, which vLLM gives to no request.
        slots = torch.clamp(common.slot_mapping[:tokens], min=0, out=self.slots[:tokens])
        return LatentMetadata(batch, slots)


class _NoImpl:
    """vLLM reads capabilities off the implementation class and never instantiates it: `LatentCache` attends by
    itself.
    """

    supports_pcp = False
    supports_dcp = False


class LatentBackend(AttentionBackend):
    """Tells vLLM how to build the metadata of `LatentCache`."""

    supported_dtypes = (torch.bfloat16, torch.float32)

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's log."""
        return "DSV3_LATENT"

    @staticmethod
    def get_impl_cls() -> type:
        """See `_NoImpl`."""
        return _NoImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """The builder of `LatentMetadata`."""
        return LatentMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """The pages' shape; asked for by vLLM before 0.29."""
        return num_blocks, block_size, head_size

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user names none. Smaller blocks cost a GPU time, and change no bit."""
        default: int = super().get_preferred_block_size(default_block_size)
        return max(default, FAST_PAGE_SIZE) if current_platform.is_cuda() else default

    @classmethod
    def is_mla(cls) -> bool:
        """One latent vector a token, shared by all heads."""
        return True


class LatentCache(nn.Module, AttentionLayerBase):
    """The pages of one layer, registered with vLLM under `prefix`; `weight_loader` is that of the layer's model."""

    def __init__(
        self,
        ops: Ops,
        config: DeepseekV3Config,
        vllm_config: VllmConfig,
        prefix: str,
        weight_loader: WeightLoader,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.config = config
        self.weight_loader = weight_loader
        self.layer_name = prefix
        self.kv_cache = torch.tensor([])
        self.prompts: Prompts | None = None
        """In the `two_form` profile, from the moment on from which requests may come."""
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"duplicate attention layer {prefix}")
        context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Called by vLLM to find the metadata builder."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        """Called by vLLM to size the pages."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.config.cached_dim,
            dtype=self.ops.setting.profile.dtype,
            cache_dtype_str="auto",
        )

    def forward(self, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all) -> torch.Tensor:
        """q [T, H, latent_dim], cached [T, cached_dim] to [T, H, kv_lora_rank]; rows that vLLM padded are zero."""
        if graphs.is_recording():
            return graphs.fill_between(self._fill, self._rows(q), q, cached, select)
        return self._attend(q, cached, select)

    def _fill(self, out: torch.Tensor, q: torch.Tensor, cached: torch.Tensor, select: Select) -> None:
        out.copy_(self._attend(q, cached, select))

    def _attend(self, q: torch.Tensor, cached: torch.Tensor, select: Select) -> torch.Tensor:
        metadata = self._metadata()
        if metadata is None:
            return self._rows(q).zero_()
        q = q[: metadata.batch.num_tokens]
        return self._compute(metadata, cached, attending(self.ops, self.config, q, select))

    def _rows(self, q: torch.Tensor) -> torch.Tensor:
        return q.new_empty(*q.shape[:2], self.config.kv_lora_rank)

    def has_prompts(self) -> bool:
        """Whether rows of the pass are of prompts, in the `two_form` profile. Where none is a request's, all might be,
        but not in a graph.
        """
        if self.ops.setting.profile.attention != "two_form" or graphs.is_recording():
            return False
        metadata = self._metadata()
        return metadata is None or of_prompts(metadata.batch).has_prompts

    def over_pages(self, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        """cached [T, cached_dim] to what is computed over the pages, [T, ...]; rows that vLLM padded are zero."""
        metadata = self._metadata()
        if metadata is None:
            take_memory(cached)  # vLLM measures it
            return padded(compute(cached, no_requests(cached.device)), len(cached))
        return self._compute(metadata, cached, compute)

    def _metadata(self) -> LatentMetadata | None:
        """None where no row is a request's: profiling, warm-up, and what a rank computes so that others can."""
        by_layer = get_forward_context().attn_metadata
        return None if by_layer is None else by_layer[self.layer_name]

    def _compute(self, metadata: LatentMetadata, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        connector = _connector()
        if connector is not None:
            connector.wait_for_layer_load(self.layer_name)
        pages = compat.latent_pages(self.kv_cache)
        pages.view(-1, pages.shape[-1])[metadata.slots] = cached[: metadata.batch.num_tokens]
        out = compute(pages, metadata.batch)
        if connector is not None:
            connector.save_kv_layer(self.layer_name, self.kv_cache, metadata)
        return padded(out, len(cached))


def _connector() -> Any:
    """What takes a layer's pages to other servers and brings theirs, if this pass has to do with it; else None."""
    if not (has_kv_transfer_group() and is_v1_kv_transfer_group()):
        return None
    connector = get_kv_transfer_group()
    return connector if connector.has_connector_metadata() else None
