"""Pipeline stages: which of them hold the embedding.

The first stage embeds tokens, and so does the one with the MTP layer, which has a copy. Megatron adds up the gradients
of both over a group of ranks that a script hands it (`get_embedding_ranks`). Its default, the first and the last stage,
is right where the MTP layer is on the last one. Elsewhere the last stage would add the gradient of its head, which is
another weight here.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from torch import distributed as dist

from dsv3_plugin.errors import EngineError


def embedding_ranks(pp_ranks: list[int], transformer_config: Any) -> list[int]:
    """Those of a pipeline's ranks that hold the embedding: Megatron's `get_embedding_ranks`, for a configuration."""
    return sorted({pp_ranks[0], *get_mtp_ranks(pp_ranks, transformer_config)})


def require_embedding_group(transformer_config: Any) -> None:
    """Raise `EngineError` where the gradients of the embedding and its copy would not be added up, or others too."""
    if not transformer_config.mtp_num_layers or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return
    layout = transformer_config.pipeline_model_parallel_layout
    if layout is not None and any(LayerType.mtp in stage for stage in layout.layout[0][1:]):
        raise EngineError(
            "pipeline_model_parallel_layout has the MTP layer on the first rank, and in another virtual stage than the"
            " embedding: Megatron does not add up the gradients of both, so put it on another rank"
        )
    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    needed = embedding_ranks(ranks, transformer_config)
    group = parallel_state.get_embedding_group(check_initialized=False)
    found = dist.get_process_group_ranks(group) if group is not None and dist.get_rank() in ranks else []
    if found != (needed if dist.get_rank() in needed else []):
        raise EngineError(
            f"the embedding is on ranks {needed} of the pipeline {ranks}, and the process group for its gradients is of"
            f" {found or 'others'}: hand initialize_model_parallel or pretrain a get_embedding_ranks"
            " (dsv3_plugin.megatron_backend.provider's, or pipeline.embedding_ranks)"
        )
