"""slime and miles, which train in Megatron and sample in SGLang:

    --custom-model-provider-path dsv3_plugin.hosts.slime.model_provider
    --custom-megatron-init-path dsv3_plugin.hosts.slime.init

Both call the provider to build a model and `init` in each trainer process, before that. They know a model's weights by
the names of Megatron's own layers, in which an expert is a parameter. Here a rank's experts are one, so that the hosts
are given views of it, under Hugging Face's names: what gathers, broadcasts and keeps copies of tensors stays theirs.
Their log-probabilities are Megatron's cross-entropy, which is another number; `init` replaces it by log-softmax.

Written for slime and miles of August 2026. `init` says by name what another version lacks.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from dsv3_plugin.checkpoint.masters import as_written
from dsv3_plugin.checkpoint.names import checkpoint_tensors
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError, InputError
from dsv3_plugin.megatron_backend.config import megatron_arguments
from dsv3_plugin.megatron_backend.log_probs import log_probs
from dsv3_plugin.megatron_backend.model import DeepseekV3GPTModel, build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint, local_tensors
from dsv3_plugin.profile import profile_for, require_one_form

Function = Callable[..., Any]


def model_provider(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> DeepseekV3GPTModel:
    """The model of `--hf-checkpoint`, with the command line's parallel sizes and other settings.

    Raises `EngineError` for an argument that says another model or that cannot be honoured, by its name.
    """
    # Here, because `megatron.training` needs Python 3.12, and `init` does not need it.
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = DeepseekV3Config.from_pretrained(given(args, "hf_checkpoint"))
    # Megatron has no argument for some of what a checkpoint says, such as the length that YaRN stretches.
    asked = Namespace(**(megatron_arguments(config) | vars(args)))
    return build_model(config, core_transformer_config_from_args(asked), pre_process, post_process, vp_stage)


def init(args: Any) -> None:
    """Put our functions where the host that calls has its own.

    Raises `EngineError` for settings with which its log-probabilities would not be the servers', the `two_form` profile
    among them, and for a version that lacks one of the functions.
    """
    temperature = given(args, "rollout_temperature")
    if temperature != 1.0:
        raise EngineError(
            f"--rollout-temperature {temperature}: the host divides by a Python number, for which a GPU"
            " multiplies with the reciprocal, and servers do not; only 1.0 gives equal log-probabilities"
        )
    if getattr(args, "true_on_policy_mode", False):
        raise EngineError("--true-on-policy-mode rounds logits to bf16, and the servers' are fp32: leave it out")
    config = DeepseekV3Config.from_pretrained(given(args, "hf_checkpoint"))
    require_one_form(profile_for(config), "slime and miles")
    if "miles.backends.megatron_utils" in sys.modules:
        weights = "miles.backends.megatron_utils"
        formula = "miles.backends.training_utils.loss_hub.math_utils"
        replace(formula, "compute_log_probs", lambda _: miles_log_probs)
        # Groups of tensors that belong together, by the names of Megatron's own layers.
        replace(f"{weights}.update_weight.common", "get_atomic_update_groups", lambda _: lambda args, model_name: [])
    else:
        weights = "slime.backends.megatron_utils"
        formula = "slime.utils.ppo_utils"
        replace(formula, "_calculate_log_probs_and_entropy_chunk", lambda theirs: partial(slime_log_probs, theirs))
        replace(f"{weights}.hf_to_megatron", "load_hf_weights", lambda _: load_hf_weights)
    replace(f"{weights}.update_weight.common", "named_params_and_buffers", lambda _: partial(named_tensors, config))
    replace(f"{weights}.megatron_to_hf", "convert_to_hf", lambda _: partial(convert_to_hf, config))


def given(args: Any, name: str) -> Any:
    """An argument of the host's. Raises `EngineError` where it has none of that name, or was given no value."""
    if (value := getattr(args, name, None)) is None:
        raise EngineError(f"--{name.replace('_', '-')} is not given, which dsv3-plugin needs")
    return value


def replace(module: str, name: str, ours: Callable[[Function], Function]) -> None:
    """Put `ours(theirs)` in the place of a host's function, wherever the host has imported it.

    Raises `EngineError` where the host has no such function.
    """
    try:
        theirs: Function | None = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # what the host needs is missing, not its module
            raise
        theirs = None
    if theirs is None:
        raise EngineError(f"{module} has no {name}, which dsv3-plugin replaces: this version is not supported")
    function = ours(theirs)
    host = module.partition(".")[0]
    for place in [known for key, known in sys.modules.items() if key.partition(".")[0] == host]:
        if vars(place).get(name) is theirs:
            setattr(place, name, function)


def load_hf_weights(args: Any, model: Sequence[nn.Module], path: str) -> None:
    """slime's function of this name: a Hugging Face checkpoint into this rank's part of a model."""
    load_checkpoint(model, path)


def named_tensors(
    config: DeepseekV3Config, args: Any, model: Sequence[nn.Module], *_: Any, **__: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The hosts' `named_params_and_buffers`: views of what this rank holds, with Megatron's marks for a part that
    tensor-parallel ranks share.
    """
    specs = checkpoint_tensors(config)
    for name, tensor in local_tensors(model, config).items():
        cut = [dim for dim, size in enumerate(tensor.shape) if size != specs[name].shape[dim]]
        view: Any = tensor
        view.tensor_model_parallel = bool(cut)
        view.partition_dim = cut[0] if cut else -1
        view.partition_stride = 1
        yield name, view


def convert_to_hf(
    config: DeepseekV3Config, args: Any, model_name: str, name: str, param: torch.Tensor, *_: Any, **__: Any
) -> list[tuple[str, torch.Tensor]]:
    """The hosts' function of this name: a whole tensor as a checkpoint holds it, and its scale if it is quantized."""
    return list(as_written(name, param, config))


def slime_log_probs(
    theirs: Function,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: ProcessGroup,
    *,
    with_entropy: bool,
    log_prob_keep_mask: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """slime's `_calculate_log_probs_and_entropy_chunk`: fp32 logits [T, vocab_size / ranks] and tokens [T], to
    log-probabilities [T, 1] and, from slime, entropies [T].

    Raises `InputError` for a nucleus that slime replays: the servers' log-probabilities are of all tokens.
    """
    if log_prob_keep_mask is not None:
        raise InputError("log-probabilities within a nucleus are not the servers', which are of all tokens: top_p=1")
    entropy = None
    if with_entropy:
        _, entropy = theirs(logits, tokens, tp_group, with_entropy=True, log_prob_keep_mask=None, **others)
    return log_probs(logits, tokens, group=tp_group)[:, None], entropy


def miles_log_probs(logits: torch.Tensor, tokens: torch.Tensor, process_group: ProcessGroup, **_: Any) -> torch.Tensor:
    """miles' `compute_log_probs`: fp32 logits [T, vocab_size / ranks] and tokens [T], to [T, 1]."""
    return log_probs(logits, tokens, group=process_group)[:, None]
