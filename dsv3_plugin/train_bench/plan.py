"""Who trains, and what.

A contender is a kind of layers in one of its ways. Megatron's own layers are there with its fused operations and
without them: the faster one is what ours are compared with. `two_layers.json` is DeepSeek-V3 in every width, with one
dense layer, one with experts, and MTP, as the report pre-trains it: before YaRN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from dsv3_plugin.checkpoint.make import CheckpointDtype, with_dtype
from dsv3_plugin.checkpoint.names import SCALE_SUFFIX, checkpoint_tensors
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.contenders import Setting, chosen
from dsv3_plugin.errors import EngineError
from dsv3_plugin.registry import MODE_VARIABLE
from dsv3_plugin.train_bench.protocol import Layers

TWO_LAYERS = "two-layers"
"""The model that is trained by default."""
BYTES_PER_WEIGHT = 24
"""bf16 weight, fp32 main weight, gradient and two moments; what an optimizer holds for a moment; TransformerEngine's
FP8 copies, which it keeps along and across.
"""
FILLED = 0.9
"""Of a card's memory, at the most."""


@dataclass(frozen=True)
class Contender:
    """Layers in one of their ways."""

    name: str
    layers: Layers
    fp8: bool
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its environment."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of Megatron's `TransformerConfig`."""


_STRICT, _FAST = {MODE_VARIABLE: "strict"}, {MODE_VARIABLE: "fast"}
_PLAIN = {"moe_grouped_gemm": True}
_FUSED = _PLAIN | {"moe_permute_fusion": True, "bias_activation_fusion": True, "bias_dropout_fusion": True}
_FP8 = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
CONTENDERS = (
    Contender("strict", "ours", True, _STRICT),
    Contender("fast", "ours", True, _FAST),
    Contender("bf16", "ours", False, _FAST),
    Contender("te", "theirs", True, settings=_FUSED | _FP8),
    Contender("te-plain", "theirs", True, settings=_PLAIN | _FP8),
    Contender("te-bf16", "theirs", False, settings=_FUSED),
)


def contenders(names: Sequence[str], settings: Iterable[str] = ()) -> list[Contender]:
    """Those of these names, all without any, with the user's settings.

    A setting is `WHO:NAME=VALUE`, where WHO is a contender. NAME in capitals is an environment variable, any other a
    field of Megatron's `TransformerConfig`. Raises `EngineError`.
    """
    known = {contender.name: contender for contender in CONTENDERS}
    asked = chosen(known, names)
    for text in settings:
        setting = Setting.parse(text, "te:moe_permute_fusion=false")
        if setting.who not in known:
            raise EngineError(f"--set {text}: {setting.who} is no contender; there are {', '.join(known)}")
        if contender := asked.get(setting.who):
            variables, others = setting.added_to(contender.variables, contender.settings)
            asked[setting.who] = replace(contender, variables=variables, settings=others)
    return list(asked.values())


def read_model(name: str, experts: int | None) -> dict[str, Any]:
    """The `config.json` of `two-layers`, a preset, a file or a folder, with so many experts, if that is said.

    Raises `ConfigError`.
    """
    if name == TWO_LAYERS:
        config = json.loads((files(__package__) / "two_layers.json").read_text("utf-8"))
    else:
        config = read_config(name)
    return config if experts is None else config | {"n_routed_experts": experts}


def for_contender(config: dict[str, Any], contender: Contender) -> dict[str, Any]:
    """As it holds its weights. Theirs are in bf16, and their settings say what is multiplied in FP8."""
    in_fp8 = contender.fp8 and contender.layers == "ours"
    return with_dtype(config, CheckpointDtype.FP8 if in_fp8 else CheckpointDtype.BF16)


def fitting_experts(config: dict[str, Any], tokens: int, memory: int) -> int:
    """As many experts in each layer as a card's memory in bytes has room for while it trains, of whole groups.

    Raises `EngineError` where two experts a group do not fit.
    """
    groups = config["n_group"]
    for experts in range(config["n_routed_experts"], groups, -groups):
        model = DeepseekV3Config.from_dict(config | {"n_routed_experts": experts})
        if BYTES_PER_WEIGHT * count_weights(model) + _activations(model, tokens) <= FILLED * memory:
            return experts
    raise EngineError(
        f"a card of {memory / 1e9:.0f} GB has no room to train the model with {2 * groups} experts a layer: name"
        " another MODEL, or fewer --tokens"
    )


def count_weights(model: DeepseekV3Config) -> int:
    """Numbers that are learned; what the MTP layer shares counts once."""
    specs = checkpoint_tensors(model).items()
    return sum(math.prod(spec.shape) for name, spec in specs if spec.targets and not name.endswith(SCALE_SUFFIX))


def _activations(model: DeepseekV3Config, tokens: int) -> int:
    """Bytes, roughly: logits of the model and of MTP with their gradients in fp32, and of each layer the queries and
    outputs of absorbed attention with their gradients.
    """
    heads = model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    return tokens * (24 * model.vocab_size + 8 * layers * heads)
