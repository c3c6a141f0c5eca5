"""Which Megatron-Core this is, and what this adapter cannot do."""

from __future__ import annotations

from dataclasses import fields
from importlib import metadata
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import untested_version_warning
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend import options
from dsv3_plugin.profile import SLICES_VARIABLE, Profile

TESTED = ("0.19.2", "0.19.2")


def megatron_version() -> str:
    """The installed version. Raises `EngineError` where there is none."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise EngineError("Megatron-Core is not installed: pip install 'dsv3-plugin[megatron]'") from None


def untested_warning() -> str | None:
    """A warning for a Megatron-Core outside the tested range, else None.

    Raises `EngineError` for one before 0.19, which builds layers from specifications of another kind.
    """
    version = megatron_version()
    if version.startswith(tuple(f"0.{minor}." for minor in range(19))):
        raise EngineError(f"Megatron-Core {version} is too old: dsv3-plugin needs {TESTED[0]}")
    return untested_version_warning("Megatron", version, TESTED)


def require_device() -> torch.device:
    """The device to train on. Raises `EngineError` without one: Megatron-Core calls CUDA whatever the device."""
    try:
        return torch.device(torch.cuda.current_device())
    except (AssertionError, RuntimeError):
        raise EngineError(
            "Megatron-Core needs a GPU; the tests run it on a CPU in an environment with requirements/megatron-cpu"
        ) from None


def require_whole_experts() -> None:
    """Raise `EngineError` where the process groups cut routed experts, as Megatron's do under tensor parallelism."""
    # Here, so that a program without Megatron can import this module and say so.
    from megatron.core import parallel_state

    ranks = parallel_state.get_expert_tensor_parallel_world_size()
    if ranks > 1:
        raise EngineError(
            f"the process groups cut each routed expert over {ranks} ranks, and dsv3-plugin keeps it whole: give"
            " initialize_model_parallel expert_tensor_parallel_size=1 (--expert-tensor-parallel-size 1)"
        )


def require_supported(transformer_config: Any, config: DeepseekV3Config, profile: Profile) -> None:
    """Raise `EngineError`, one line, for what the layers cannot compute exactly as the contracts say."""
    # Here, so that a program without Megatron can import this module and say so.
    from dsv3_plugin.megatron_backend.config import of_model

    asked = transformer_config
    values = {field.name: getattr(asked, field.name) for field in fields(asked)}
    options.require_supported(values, of_model(config, profile), config)
    if asked.sequence_parallel != (asked.tensor_model_parallel_size > 1):
        raise EngineError(
            f"sequence_parallel={asked.sequence_parallel} with tensor_model_parallel_size="
            f"{asked.tensor_model_parallel_size}: tensor-parallel ranks need it, and one rank has no use for it"
        )
    _require_recomputable(asked)
    slices, ranks = profile.reduction_slices, asked.tensor_model_parallel_size
    if slices % ranks:
        raise EngineError(
            f"tensor_model_parallel_size={ranks} needs sums in as many slices, and these are in {slices}: set"
            f" {SLICES_VARIABLE}={ranks} for this trainer and for every server that must have its bits"
        )
    experts, ranks = config.n_routed_experts, asked.expert_model_parallel_size
    if experts % ranks:
        raise EngineError(f"{experts} experts cannot be divided among expert_model_parallel_size={ranks} ranks")
    if profile.scale_format == "float32":
        raise EngineError(
            "training in fp8 needs power-of-two scales (scale_fmt ue8m0): a weight that is read with other scales"
            " and quantized again is not the same"
        )


_RECOMPUTED = ("layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


def _require_recomputable(transformer_config: Any) -> None:
    """Raise `EngineError` for a part that is not recomputed."""
    if transformer_config.recompute_granularity != "selective":
        return
    for name in transformer_config.recompute_modules:
        if name not in _RECOMPUTED:
            raise EngineError(
                f"recompute_modules={name} is not supported, {', '.join(_RECOMPUTED)} are; attention's probabilities"
                " are recomputed always"
            )


def recompute_without_transformer_engine() -> None:
    """Let norms be recomputed where TransformerEngine is missing.

    `CheckpointWithoutOutput(fp8)` asks it whether it computes in FP8 unless `fp8` is None, and Megatron's layer, which
    recomputes the norms, leaves the default of False. Here the default is None.
    """
    from megatron.core.tensor_parallel import random

    if not random.HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
