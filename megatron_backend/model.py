"""The model that a Megatron training script builds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_plugin.autograd.bind import differentiable
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import InputError
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.megatron_backend import compat
from dsv3_plugin.megatron_backend.documents import (
    document_starts,
    packed_prompts,
    require_packing,
    row_starts,
    with_prompt_lens,
)
from dsv3_plugin.megatron_backend.layer_spec import block_spec, mtp_spec
from dsv3_plugin.megatron_backend.layers import Binding, OutputLayer
from dsv3_plugin.megatron_backend.names import checkpoint_key
from dsv3_plugin.megatron_backend.optimizer import restore_exactly
from dsv3_plugin.megatron_backend.pipeline import require_embedding_group
from dsv3_plugin.megatron_backend.sequences import SequencesOfPass
from dsv3_plugin.megatron_backend.tensor_parallel import share
from dsv3_plugin.profile import Profile, profile_for

logger = logging.getLogger("megatron.dsv3_plugin")


class DeepseekV3GPTModel(GPTModel):  # type: ignore[misc]
    """Megatron's `GPTModel` with our layers and head; its embedding, losses, pipeline and checkpoints stay."""

    documents_share_rows = False
    """Whether positions begin anew within a row (`--reset-position-ids`)."""

    def __init__(self, binding: Binding, config: TransformerConfig, **kwargs: Any) -> None:
        self.binding = binding
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(binding, config, kwargs.get("vp_stage")),
            mtp_block_spec=mtp_spec(binding),
            vocab_size=binding.config.vocab_size,
            max_sequence_length=binding.config.max_position_embeddings,
            # Attention has its own table.
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            **kwargs,
        )
        if hasattr(self, "embedding"):
            # Else its gradient is `F.embedding`'s, which a GPU adds up in another order each time.
            self.embedding.word_embeddings.deterministic_mode = True

    def setup_embeddings_and_output_layer(self) -> None:
        """Called by Megatron when its own head is built, which ours replaces."""
        if self.post_process:
            self.output_layer = OutputLayer(
                self.binding,
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=not self.parallel_output,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        *args: Any,
        prompt_lens: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Megatron's, of input_ids and position_ids [b, s]. Stages in the middle of a pipeline may be given None.

        `prompt_lens` says how many first tokens of each sequence were the prompt that a server answered, so that in the
        `two_form` profile the other rows have its bits. Without it all tokens are of prompts, as in pretraining. In the
        other profile no bit depends on it.

        Raises `InputError` for positions or a mask that are no causal attention over whole documents
        (`document_starts`), where tensor-parallel ranks cannot share s tokens, for lengths that are not the sequences',
        and for inference.
        """
        if inference_context is not None or kwargs.get("inference_params") is not None:
            raise InputError("a trainer's model has no cache: it computes whole sequences")
        position_ids, starts = self._sequences_begin(
            input_ids, position_ids, attention_mask, packed_seq_params, prompt_lens
        )
        return super().forward(
            input_ids, position_ids, starts, decoder_input, labels, None, packed_seq_params, *args, **kwargs
        )

    def build_schedule_plan(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        prompt_lens: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Megatron's, for `--overlap-moe-expert-parallel-comm`: what `forward` would compute, in pieces.

        Raises what `forward` does.
        """
        position_ids, starts = self._sequences_begin(
            input_ids, position_ids, attention_mask, packed_seq_params, prompt_lens
        )
        return super().build_schedule_plan(
            input_ids, position_ids, starts, *args, packed_seq_params=packed_seq_params, **kwargs
        )

    def _sequences_begin(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        packed_seq_params: Any,
        prompt_lens: Sequence[int] | torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Begin a pass: position_ids [b, s], and where its documents begin (`document_starts`, `with_prompt_lens`)."""
        self.binding.sequences.begin()
        ranks = self.config.tensor_model_parallel_size
        if input_ids is not None and input_ids.shape[1] % ranks:
            raise InputError(
                f"sequences of {input_ids.shape[1]} tokens cannot be divided among tensor_model_parallel_size={ranks}"
                " ranks: pad them"
            )
        if packed_seq_params is None:
            if position_ids is None and self.documents_share_rows:
                raise InputError("documents share rows, so that every pipeline stage must be given position_ids")
            if position_ids is not None and input_ids is not None and position_ids.shape != input_ids.shape:
                if position_ids.shape != (1, input_ids.shape[1]):
                    raise InputError(
                        f"position_ids {tuple(position_ids.shape)} are not of the tokens {tuple(input_ids.shape)}"
                    )
                position_ids = position_ids.expand_as(input_ids)
            attention_mask = document_starts(position_ids, attention_mask)
        else:
            if input_ids is not None:
                require_packing(packed_seq_params, (input_ids.shape[0], input_ids.shape[1]))
            if attention_mask is not None:
                raise InputError("packed sequences take no attention mask: attention is causal over each of them")
        if prompt_lens is None:
            return position_ids, attention_mask
        if packed_seq_params is not None:
            return position_ids, packed_prompts(packed_seq_params, prompt_lens)
        starts = attention_mask
        if starts is None:
            tokens = position_ids if input_ids is None else input_ids
            if tokens is None:
                raise InputError(
                    "prompt_lens were given, so that every pipeline stage must be given input_ids or position_ids"
                )
            b, s = tokens.shape
            starts = row_starts(b, s, tokens.device)
        return position_ids, with_prompt_lens(starts, prompt_lens)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's, under the keys of Megatron's own layers."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        for tensor in nested_values(state):
            tensor.key = checkpoint_key(tensor.key, self.binding.config)
        return state


def build_model(
    config: DeepseekV3Config,
    transformer_config: TransformerConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    profile: Profile | None = None,
    *,
    preferred_kernels: str | None = None,
) -> DeepseekV3GPTModel:
    """A model provider for Megatron's `get_model`: `partial(build_model, config, transformer_config)`. Kernels of the
    provider `preferred_kernels` go before others that may serve.

    Raises `EngineError` for what the layers cannot compute as the contracts say, and `KernelError` where an operation
    has no kernel.
    """
    profile = profile or profile_for(config)
    if warning := compat.untested_warning():
        logger.warning(warning)
    compat.require_supported(transformer_config, config, profile)
    compat.require_whole_experts()
    require_embedding_group(transformer_config)
    restore_exactly()
    compat.recompute_without_transformer_engine()
    device = compat.require_device()
    ops = differentiable(bind_ops(config, profile, device, preferred=preferred_kernels))
    if transformer_config.tensor_model_parallel_size > 1:
        ops = share(ops, parallel_state.get_tensor_model_parallel_group())
    logger.info(ops.announcement("GPTModel"))
    if preferred_kernels and not any(choice.provider == preferred_kernels for choice in ops.provenance):
        logger.warning("no kernel of %s serves here: `dsv3 kernels list --profile fp8` says why", preferred_kernels)
    # The core's parameters and tables are created where the default device is.
    with device:
        return DeepseekV3GPTModel(
            Binding(ops, config, RotaryTable(config), SequencesOfPass(config.max_position_embeddings)),
            transformer_config,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
