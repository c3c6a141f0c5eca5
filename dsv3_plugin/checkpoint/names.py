"""Every tensor of a checkpoint, and where it goes in our modules.

The layout is the released one (`model.safetensors.index.json` of DeepSeek-V3, "README_WEIGHTS.md"): one tensor an
expert and projection, gate and up apart, the MTP layer after the last decoder layer with its own copies of embedding
and head. Our modules hold gate and up, and all experts, as one parameter, so a tensor has a place *inside* a parameter.
Reader, loader and maker all work from this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

from dsv3_plugin.config import FP8_BLOCK, DeepseekV3Config
from dsv3_plugin.layout import WHOLE, Group, Layout
from dsv3_plugin.ops.quantize import E4M3

Part = Literal["main", "mtp"]
"""`main` is `layers.model.DeepseekV3`, `mtp` is `layers.mtp.DeepseekV3MTP`."""

SCALE_SUFFIX = "_scale_inv"
BIAS_SUFFIX = ".e_score_correction_bias"
ROWS, COLUMNS = 0, 1
_FLOAT = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Target:
    """A place in a module, `parameter[index]`, and which part of a checkpoint's tensor goes there. Where an index is
    empty it is all of it.
    """

    parameter: str
    index: tuple[int | slice, ...] = ()
    part: tuple[slice, ...] = ()
    replicas: tuple[tuple[int | slice, ...], ...] = ()
    """Further places in the parameter that hold the same: an expert may lie in several slots of a rank."""

    def whole(self, held: torch.Tensor, ranks: Group) -> torch.Tensor:
        """The checkpoint's tensor, of which each of the tensor-parallel ranks, which make this call together, holds
        what stands here.
        """
        return ranks.gather_cut(held, len(self.part) - 1) if self.part else held


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    """Dtypes that the file may hold it in; the first is what the maker writes for a bf16 or fp8 model."""
    targets: Mapping[Part, Target] = field(default_factory=dict)
    """Embedding and head go to both parts; the MTP layer's copies of them, and what other ranks hold, go nowhere."""
    optional: bool = False

    def mismatch(self, shape: tuple[int, ...], dtype: torch.dtype | str) -> str | None:
        """What is wrong with a tensor found under this name, in a few words, or None."""
        if shape != self.shape:
            return f"tensor {self.name} has shape {list(shape)}, the configuration gives {list(self.shape)}"
        if dtype in self.dtypes:
            return None
        if dtype == E4M3:
            return f"tensor {self.name} is float8_e4m3fn, but the configuration has no quantization_config for it"
        if self.dtypes == (E4M3,):
            return f"tensor {self.name} is {dtype_name(dtype)}, but quantization_config says fp8 (float8_e4m3fn)"
        return f"tensor {self.name} is {dtype_name(dtype)}, expected {' or '.join(map(dtype_name, self.dtypes))}"


def dtype_name(dtype: torch.dtype | str) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def copied_from(name: str) -> str:
    """The tensor that an MTP layer's copy repeats."""
    return "lm_head.weight" if name.endswith("shared_head.head.weight") else "model.embed_tokens.weight"


def checkpoint_tensors(config: DeepseekV3Config, layout: Layout = WHOLE) -> Mapping[str, TensorSpec]:
    """All tensors of a checkpoint with this configuration by name, in the order of the released files, with their
    targets on a rank of `layout`.
    """
    return _checkpoint_tensors(config, layout)


# Behind a function of its own: with a default, `f(x)` and `f(x, WHOLE)` would be two entries of 92,000 tensors.
@lru_cache(maxsize=8)
def _checkpoint_tensors(config: DeepseekV3Config, layout: Layout) -> Mapping[str, TensorSpec]:
    table = _Table(config, layout)
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = "model.embed_tokens.weight"
    targets: dict[Part, Target] = {"main": Target(embedding)} if layout.is_first() else {}
    table.add(embedding, (vocab, hidden), {**targets, "mtp": Target("embed_tokens.weight")})
    for layer_idx in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer_idx}"
        held = layer_idx in layout.layers_of(config)
        table.layer(_Place("main" if held else None, prefix, prefix), layer_idx)
    mtp_layers = config.num_nextn_predict_layers
    for layer_idx in range(config.num_hidden_layers, config.num_hidden_layers + mtp_layers):
        # Of several none has a place: drafts are made by one (`DeepseekV3Config.mtp_layer_idx`).
        place = _Place("mtp" if mtp_layers == 1 else None, f"model.layers.{layer_idx}", "layer")
        table.add(f"{place.name}.embed_tokens.weight", (vocab, hidden), {}, optional=True)
        for norm in ("enorm", "hnorm"):
            table.norm(place / norm, hidden)
        table.linear(place / "eh_proj", hidden, 2 * hidden, quantized=False, cut=ROWS)
        table.layer(place, layer_idx)
        table.norm(place / "shared_head" / "norm", hidden)
        table.add(f"{place.name}.shared_head.head.weight", (vocab, hidden), {}, optional=True)
    last: Part | None = "main" if layout.is_last(config) else None
    table.norm(_Place(last, "model.norm", "model.norm"), hidden)
    head = Target("lm_head.weight", part=table.part((vocab, hidden), ROWS))
    table.add("lm_head.weight", (vocab, hidden), {"main": head, "mtp": head} if last else {"mtp": head})
    return table.specs


@dataclass(frozen=True)
class _Place:
    """A module: its name in the checkpoint, and in which part, if any, and under which name it is ours."""

    part: Part | None
    name: str
    module: str

    def target(self, target: Target) -> dict[Part, Target]:
        """Where a tensor goes, if the module is in one of our parts."""
        return {} if self.part is None else {self.part: target}

    def __truediv__(self, child: str) -> _Place:
        return _Place(self.part, f"{self.name}.{child}", f"{self.module}.{child}")


class _Table:
    """The specs, gathered module by module."""

    def __init__(self, config: DeepseekV3Config, layout: Layout) -> None:
        self.config = config
        self.ranks = layout.tensor
        self.layout = layout
        self.specs: dict[str, TensorSpec] = {}

    def part(self, shape: tuple[int, ...], cut: int | None) -> tuple[slice, ...]:
        """A tensor-parallel rank's part of a tensor that is cut along a dimension."""
        if cut is None or self.ranks.size == 1:
            return ()
        size = shape[cut] // self.ranks.size
        return (*[slice(None)] * cut, slice(self.ranks.rank * size, (self.ranks.rank + 1) * size))

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        targets: Mapping[Part, Target],
        *,
        dtypes: tuple[torch.dtype, ...] = _FLOAT,
        optional: bool = False,
    ) -> None:
        self.specs[name] = TensorSpec(name, shape, dtypes, targets, optional)

    def norm(self, place: _Place, size: int) -> None:
        self.add(f"{place.name}.weight", (size,), place.target(Target(f"{place.module}.weight")))

    def linear(
        self,
        place: _Place,
        rows: int,
        columns: int,
        *,
        quantized: bool = True,
        module: str | None = None,
        slots: list[int] | None = None,
        fused: int | None = None,
        cut: int | None = None,
    ) -> None:
        """A projection [rows, columns], of an expert in some slots, cut for tensor-parallel ranks along a dimension;
        `fused`: after how many others of its size it stands in `module`.
        """
        module = module or place.module

        def target(parameter: str, shape: tuple[int, int]) -> dict[Part, Target]:
            rows: tuple[slice, ...] = ()
            if fused is not None:
                own_rows = shape[0] if cut is None else shape[0] // self.ranks.size
                rows = (slice(fused * own_rows, (fused + 1) * own_rows),)
            if slots is None:
                return place.target(Target(f"{module}.{parameter}", rows, self.part(shape, cut)))
            if not slots:
                return {}
            places: list[tuple[int | slice, ...]] = [(slot, *rows) for slot in slots]
            return place.target(Target(f"{module}.{parameter}", places[0], replicas=tuple(places[1:])))

        weight, shape = f"{place.name}.weight", (rows, columns)
        if not (quantized and self.config.quantization_config):
            self.add(weight, shape, target("weight", shape))
            return
        self.add(weight, shape, target("weight", shape), dtypes=(E4M3,))
        # Fused parts begin at a whole block: the configuration refuses other sizes. So does what ranks hold.
        blocks = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
        scale = f"weight{SCALE_SUFFIX}"
        self.add(weight + SCALE_SUFFIX, blocks, target(scale, blocks), dtypes=(torch.float32,))

    def mlp(self, place: _Place, size: int, *, module: str | None = None, slots: list[int] | None = None) -> None:
        """gate, up and down of `size` intermediate features; a routed expert is whole on its rank."""
        module = module or place.module
        hidden = self.config.hidden_size
        gate_up, down = f"{module}.gate_up_proj", f"{module}.down_proj"
        rows, columns = (ROWS, COLUMNS) if slots is None else (None, None)
        self.linear(place / "gate_proj", size, hidden, module=gate_up, slots=slots, fused=0, cut=rows)
        self.linear(place / "up_proj", size, hidden, module=gate_up, slots=slots, fused=1, cut=rows)
        self.linear(place / "down_proj", hidden, size, module=down, slots=slots, cut=columns)

    def attention(self, place: _Place) -> None:
        config = self.config
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.linear(place / "q_proj", heads * config.qk_head_dim, hidden, cut=ROWS)
        else:
            self.linear(place / "q_a_proj", config.q_lora_rank, hidden)
            self.norm(place / "q_a_layernorm", config.q_lora_rank)
            self.linear(place / "q_b_proj", heads * config.qk_head_dim, config.q_lora_rank, cut=ROWS)
        self.linear(place / "kv_a_proj_with_mqa", config.latent_dim, hidden)
        self.norm(place / "kv_a_layernorm", config.kv_lora_rank)
        keys_and_values = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.linear(place / "kv_b_proj", keys_and_values, config.kv_lora_rank, cut=ROWS)
        self.linear(place / "o_proj", hidden, heads * config.v_head_dim, cut=COLUMNS)

    def layer(self, place: _Place, layer_idx: int) -> None:
        config = self.config
        self.attention(place / "self_attn")
        mlp = place / "mlp"
        if config.is_moe_layer(layer_idx):
            gate = mlp / "gate"
            self.linear(gate, config.n_routed_experts, config.hidden_size, quantized=False)
            # bf16 is what some converters leave; widening it to fp32 is exact.
            self.add(
                gate.name + BIAS_SUFFIX,
                (config.n_routed_experts,),
                place.target(Target(gate.module + BIAS_SUFFIX)),
                dtypes=(torch.float32, torch.bfloat16),
            )
            slots: dict[int, list[int]] = {}
            for slot, expert in enumerate(self.layout.own_experts(config, layer_idx)):
                slots.setdefault(expert, []).append(slot)
            for expert in range(config.n_routed_experts):
                experts, size = mlp / "experts", config.moe_intermediate_size
                self.mlp(experts / str(expert), size, module=experts.module, slots=slots.get(expert, []))
            self.mlp(mlp / "shared_experts", config.shared_intermediate_size)
        else:
            self.mlp(mlp, config.intermediate_size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.norm(place / norm, config.hidden_size)
