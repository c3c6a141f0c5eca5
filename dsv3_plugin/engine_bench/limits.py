"""What a step needs at the least, and what a card can do at the most.

Bytes are those of the checkpoint: every weight that a step multiplies by is read once, of the routed experts those that
the step visited, and each request's cached tokens. Of the MTP layer's experts, which nobody counts, none: what is
computed here is a bound, which a true time never beats. What the L2 cache may still hold is taken off. Several ranks
are as many cards, each of which may take an equal part of all that. Replicas read attention's weights each for
themselves; all others they may share, as SGLang's do the head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dsv3_plugin.checkpoint.names import TensorSpec, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout
from dsv3_plugin.engine_bench.protocol import Measurement, Row

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")
_PROJECTION = re.compile(r"_proj(_with_mqa)?\.weight$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Card:
    """By its maker's figures."""

    bandwidth: float
    """Bytes a second."""
    cache: int
    """Bytes of the L2 cache."""
    operations: Mapping[str, float]
    """A second, in `bf16` and `fp8`, dense."""


_HOPPER = {"bf16": 989.5e12, "fp8": 1979e12}
CARDS = {
    "H200": Card(4.8e12, 50 << 20, _HOPPER),
    "H100": Card(3.35e12, 50 << 20, _HOPPER),
}


def card_of(device: str) -> Card | None:
    """The card of a device's name; None for one that this table does not have, whose limits nobody checks."""
    return next((card for name, card in CARDS.items() if name in device), None)


class Model(BaseModel):
    """What the limits need to know of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    profile: str
    layers: int
    expert_layers: int
    experts: int
    experts_per_token: int
    max_positions: int
    vocab_size: int
    mtp_layers: int
    step_bytes: int
    """Of the weights that every step reads."""
    attention_bytes: int
    """Attention's part of that."""
    mtp_bytes: int
    """Of those that each draft reads besides: the MTP layer's and the head's."""
    expert_bytes: int
    """Of one routed expert."""
    cached_bytes: int
    """Of one token in one layer."""
    token_operations: float
    """Of a token's products with weights, head left out."""
    pair_operations: float
    """Of a token and a key that it attends to, in all layers, in the form with keys and values of each head."""


def read_model(checkpoint: Path) -> Model:
    """A checkpoint's sizes. Raises `CheckpointError` or `ConfigError`."""
    reader = CheckpointReader(checkpoint)
    config = reader.config
    specs = checkpoint_tensors(config)
    headers = reader.headers()
    size = {name: math.prod(h.shape) * h.dtype.itemsize for name, h in headers.items() if not isinstance(h.dtype, str)}

    def part(name: str) -> str:
        if name.endswith("embed_tokens.weight") or not specs[name].targets:
            return "unread"
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            return "unread" if _EXPERT.match(name) else "mtp"
        if _EXPERT.match(name):
            return "expert"
        return "attention" if ".self_attn." in name else "step"

    sizes = {"unread": 0, "mtp": 0, "expert": 0, "attention": 0, "step": 0}
    for name in size.keys() & specs.keys():
        sizes[part(name)] += size[name]
    expert_layers = config.num_hidden_layers - config.first_k_dense_replace
    head = size["lm_head.weight"]
    return Model(
        name=checkpoint.resolve().name,
        profile=str(reader.profile()),
        layers=config.num_hidden_layers,
        expert_layers=expert_layers,
        experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        mtp_layers=config.num_nextn_predict_layers,
        step_bytes=sizes["attention"] + sizes["step"],
        attention_bytes=sizes["attention"],
        mtp_bytes=sizes["mtp"] + head if config.num_nextn_predict_layers else 0,
        expert_bytes=sizes["expert"] // max(1, expert_layers * config.n_routed_experts),
        cached_bytes=config.cached_dim * reader.profile().dtype.itemsize,
        token_operations=_token_operations(config, specs),
        pair_operations=2.0
        * config.num_hidden_layers
        * config.num_attention_heads
        * (config.qk_head_dim + config.v_head_dim),
    )


def _token_operations(config: DeepseekV3Config, specs: Mapping[str, TensorSpec]) -> float:
    """Two for each weight of a matrix, and of the routed experts' those of the experts that a token takes."""
    total = 0.0
    share = config.num_experts_per_tok / config.n_routed_experts
    for name, spec in specs.items():
        layer = _LAYER.match(name)
        if layer and int(layer[1]) < config.num_hidden_layers and _PROJECTION.search(name):
            total += 2 * math.prod(spec.shape) * (share if _EXPERT.match(name) else 1)
    return total


def step_bytes(model: Model, row: Row, layout: ParallelLayout = ONE_RANK) -> float | None:
    """That a decode step has to read, all ranks together; None where its experts were not counted."""
    if row.experts is None or row.cached_tokens is None:
        return None
    measurement = row.measurement
    replicas = min(layout.dp, measurement.requests)
    weights = model.step_bytes + (replicas - 1) * model.attention_bytes + measurement.drafts * model.mtp_bytes
    experts = sum(row.experts) * model.expert_bytes
    layers = model.layers + (model.mtp_layers if measurement.drafts else 0)
    return weights + experts + measurement.requests * row.cached_tokens * model.cached_bytes * layers


def prefill_operations(model: Model, measurement: Measurement) -> tuple[float, float]:
    """Of products with weights, and of attention."""
    pairs = measurement.requests * measurement.tokens * (measurement.tokens + 1) / 2
    return measurement.requests * measurement.tokens * model.token_operations, pairs * model.pair_operations


def least_seconds(model: Model, row: Row, card: Card, layout: ParallelLayout = ONE_RANK) -> float | None:
    """Below which no decode step, or no prefill, can be on a card for each rank; None where that is not known."""
    if row.measurement.kind == "prefill":
        products, attention = prefill_operations(model, row.measurement)
        dtype = "fp8" if "fp8" in model.profile else "bf16"
        return (products / card.operations[dtype] + attention / card.operations["bf16"]) / layout.ranks
    read = step_bytes(model, row, layout)
    return None if read is None else max(0.0, read / layout.ranks - card.cache) / card.bandwidth
