"""The model as a bridge of `mbridge`, which builds Megatron's models from Hugging Face's (verl's `vanilla_mbridge`).

Importing this module registers it for DeepSeek-V3 and Kimi-K2, in place of mbridge's own. Written for mbridge 0.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mbridge.core import Bridge, register_model
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.export import hf_tensors
from dsv3_plugin.megatron_backend.layers import OutputLayer
from dsv3_plugin.megatron_backend.model import DeepseekV3GPTModel, build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint, save_tensors
from dsv3_plugin.profile import profile_for, require_one_form

_OF_A_POLICY = {"moe_router_load_balancing_type": "none", "moe_router_bias_update_rate": 0.0, "moe_aux_loss_coeff": 0.0}
"""A policy gradient moves no token for balance's sake. `set_extra_args` wins over these."""


@register_model(["deepseek_v3", "kimi_k2"])
class DeepseekV3Bridge(Bridge):  # type: ignore[misc]
    """mbridge's interface, as far as a host calls it."""

    def _build_config(self) -> Any:
        """Megatron's configuration: the checkpoint's, mbridge's parallel sizes, and the host's `set_extra_args`.

        Raises `ConfigError` for a checkpoint that is no DeepSeek-V3, or has no profile for the host's dtype, and
        `EngineError` for the `two_form` profile: hosts do not tell a model where prompts end.
        """
        ranks = self.mpu
        self.described = config_of(self.hf_config, self._get_actual_hf_path(self.hf_config.name_or_path))
        settings = {
            "tensor_model_parallel_size": ranks.tp_size,
            "pipeline_model_parallel_size": ranks.pp_size,
            "virtual_pipeline_model_parallel_size": ranks.vpp_size,
            "context_parallel_size": ranks.cp_size,
            "expert_model_parallel_size": ranks.ep_size,
            "expert_tensor_parallel_size": ranks.etp_size,
            "variable_seq_lengths": True,
            "overlap_p2p_comm": ranks.vpp_size is not None and ranks.pp_size > 1,
            "batch_p2p_comm": False,
        }
        profile = profile_for(self.described, self.dtype)
        require_one_form(profile, "hosts of mbridge, such as verl")
        return transformer_config(self.described, profile, **(_OF_A_POLICY | settings | self.extra_args))

    def get_model(
        self,
        weight_path: str | None = None,
        *,
        wrap_with_ddp: bool = False,
        fp16: bool = False,
        bf16: bool = True,
        ddp_config: dict[str, Any] | None = None,
        post_model_creation_callbacks: Sequence[Callable[..., None]] = (),
        **others: Any,
    ) -> list[nn.Module]:
        """This rank's virtual pipeline stages, in mixed precision, and with DDP if asked for. mbridge's own calls what
        Megatron-Core 0.19 has no longer.

        Raises `EngineError` for fp16, for a critic and for options that are not named here, and what `build_model`
        does.
        """
        if fp16 or (unknown := sorted(name for name, value in others.items() if value)):
            raise EngineError(
                f"mbridge's get_model: {'fp16' if fp16 else ', '.join(unknown)} is not supported; leave it out"
            )
        stages = self.mpu.vpp_size or 1
        models: list[nn.Module] = [
            self._build_stage(stage if stages > 1 else None, post_model_creation_callbacks) for stage in range(stages)
        ]
        if bf16:
            models = [Float16Module(self.config, model) for model in models]
        if wrap_with_ddp:
            models = [self._with_gradients(model, ddp_config or {}, first=model is models[0]) for model in models]
        if weight_path is not None:
            self.load_weights(models, weight_path)
        return models

    def _build_stage(self, vp_stage: int | None, callbacks: Sequence[Callable[..., None]]) -> DeepseekV3GPTModel:
        place = {"ignore_virtual": False, "vp_stage": vp_stage}
        pre_process = parallel_state.is_pipeline_first_stage(**place)
        post_process = parallel_state.is_pipeline_last_stage(**place)
        profile = profile_for(self.described, self.dtype)
        model = build_model(self.described, self.config, pre_process, post_process, vp_stage, profile)
        for callback in callbacks:
            callback(
                model,
                pre_process=pre_process,
                post_process=post_process,
                config=self.config,
                hf_config=self.hf_config,
            )
        if post_process and not isinstance(model.output_layer, OutputLayer):
            raise EngineError(
                "a critic is not supported: use an estimator without one, such as algorithm.adv_estimator=grpo"
            )
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        return model

    def _with_gradients(self, model: nn.Module, ddp_config: dict[str, Any], *, first: bool) -> nn.Module:
        chosen = DistributedDataParallelConfig(
            **({"grad_reduce_in_fp32": True, "use_distributed_optimizer": True} | ddp_config)
        )
        if not chosen.overlap_grad_reduce:
            chosen.bucket_size = None
        wrapped = DistributedDataParallel(self.config, chosen, model, disable_bucketing=not first)
        wrapped.broadcast_params()
        return wrapped

    def load_weights(self, models: list[nn.Module], weights_path: str, memory_efficient: bool = False) -> None:
        """Read a checkpoint into this rank's part. Raises `CheckpointError` for whatever is wrong with it."""
        load_checkpoint(models, self._get_actual_hf_path(weights_path))

    def export_weights(self, models: list[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
        """See `dsv3_plugin.megatron_backend.export.hf_tensors`."""
        return hf_tensors(models, self.described)

    def save_weights(self, models: list[nn.Module], weights_path: str, memory_efficient: bool = False) -> None:
        """Write a checkpoint. mbridge writes into a folder that may exist, beside what the host has put there."""
        path = Path(weights_path)
        path.mkdir(parents=True, exist_ok=True)
        if torch.distributed.get_rank() == 0:
            self.hf_config.save_pretrained(path)
        torch.distributed.barrier()
        save_tensors(models, self.described, path)


def config_of(hf_config: Any, path: str) -> DeepseekV3Config:
    """The checkpoint's `config.json` as it stands, with as many MTP layers as the host left in its copy of it."""
    config = DeepseekV3Config.from_pretrained(path)
    mtp_layers = getattr(hf_config, "num_nextn_predict_layers", config.num_nextn_predict_layers)
    return config.model_copy(update={"num_nextn_predict_layers": mtp_layers})
