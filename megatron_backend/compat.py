"""What this adapter cannot do, and what Megatron-Core needs on a machine without a GPU."""

from __future__ import annotations

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import untested_version_warning
from dsv3_plugin.errors import EngineError
from dsv3_plugin.profile import Profile

TESTED = ("0.19.2", "0.19.2")


def megatron_version() -> str:
    """The installed version. Raises `EngineError` where there is none."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise EngineError("Megatron-Core is not installed: pip install megatron-core") from None


def prepare_device() -> str | None:
    """Call before Megatron is imported; returns a warning for an untested version.

    Megatron-Core calls CUDA whatever the device. Without a GPU the test-only distribution `megatron-cpu` answers those
    calls. Raises `EngineError` where neither is there.
    """
    version = megatron_version()
    if not torch.cuda.is_available():
        if find_spec("megatron_cpu") is None:
            raise EngineError(
                "Megatron-Core needs a GPU; tests run it on a CPU in an environment with requirements/megatron-cpu"
            )
        import_module("megatron_cpu").install()
    return untested_version_warning("Megatron-Core", version, TESTED)


def require_supported(transformer_config: Any, config: DeepseekV3Config, profile: Profile) -> None:
    """Raise `EngineError`, one line, for what the layers cannot compute exactly as the contracts say."""
    asked = transformer_config
    required = {
        "tensor_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": None,
        "moe_shared_expert_overlap": False,
        "moe_router_padding_for_quantization": False,
        "moe_permute_fusion": False,
        "moe_latent_size": None,
        "moe_input_jitter_eps": None,
        "moe_router_force_load_balancing": False,
        "overlap_moe_expert_parallel_comm": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "fp32_residual_connection": False,
        "fp8": None,
        "params_dtype": profile.dtype,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "layernorm_epsilon": config.rms_norm_eps,
        "num_moe_experts": config.n_routed_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "mtp_num_layers": config.num_nextn_predict_layers or None,
    }
    for name, value in required.items():
        found = getattr(asked, name, value)
        if found != value:
            raise EngineError(f"dsv3-plugin's layers need {name}={value}, but {found} was asked for")
    experts, ranks = config.n_routed_experts, asked.expert_model_parallel_size
    if experts % ranks:
        raise EngineError(f"{experts} experts cannot be divided among expert_model_parallel_size={ranks} ranks")
    if profile.scale_format == "float32":
        raise EngineError(
            "training in fp8 needs power-of-two scales (scale_fmt ue8m0): a weight that is read with other scales"
            " and quantised again is not the same"
        )
