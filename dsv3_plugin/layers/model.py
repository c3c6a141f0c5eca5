"""The whole model, and its kernels chosen in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.hooks import Arithmetic, Setting
from dsv3_plugin.layers.attend import Attend
from dsv3_plugin.layers.decoder import DecoderLayer
from dsv3_plugin.layers.embedding import Embedding, Head
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.norm import RMSNorm
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.ops.tile import pin_one_thread
from dsv3_plugin.profile import Profile
from dsv3_plugin.registry import Mode, Ops, bind


def bind_ops(
    config: DeepseekV3Config,
    profile: Profile,
    device: torch.device,
    *,
    arithmetic: Arithmetic | None = None,
    mode: Mode | None = None,
    layout: Layout = WHOLE,
    preferred: str | None = None,
) -> Ops:
    """Choose the kernels of a model on `device`, or of the part that `layout` says; `arithmetic` defaults to the
    device's own. Kernels of the provider `preferred` go before others.

    Raises `KernelError` where an operation has none, `ConfigError` where the model has no such part.
    """
    layout.require_possible(config, profile)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if device.type == "cpu":
        pin_one_thread()
    arithmetic = arithmetic or ("cpu" if device.type == "cpu" else "sm90")
    dims = {name: value for name, value in layout.own_heads(config).model_dump().items() if type(value) is int}
    ops = bind(Setting(device.type, arithmetic, profile, capability, dims), mode, preferred=preferred)
    return replace(ops, slices=layout.slices(profile))


class DeepseekV3Model(nn.Module):
    """Embedding, decoder layers and final norm; of a pipeline stage those that are its own."""

    embed_tokens: Embedding
    """Of the first stage."""
    norm: RMSNorm
    """Of the last stage."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layout: Layout = WHOLE) -> None:
        super().__init__()
        if layout.is_first():
            self.embed_tokens = Embedding(ops, config.vocab_size, config.hidden_size)
        # By the checkpoint's numbers, whatever the first one here is.
        layers = {str(i): DecoderLayer(ops, config, i, layout) for i in layout.layers_of(config)}
        self.layers = nn.ModuleDict(layers)
        self.is_last = layout.is_last(config)
        if self.is_last:
            self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """hidden_states [T, hidden], which are embedded tokens or what the stage before returned, and positions,
        integers [T], to the normalised hidden states [T, hidden], or to those for the next stage.
        """
        return self.through(self.layers.values(), hidden_states, positions, attend)

    def through(
        self, layers: Iterable[nn.Module], hidden_states: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """The same through some of the layers."""
        cos, sin = self.rotary(positions)
        residual: torch.Tensor | None = None
        for layer in layers:
            hidden_states, residual = layer(hidden_states, residual, cos, sin, attend)
        if self.is_last:
            return self.norm(hidden_states, residual)
        return hidden_states if residual is None else hidden_states + residual


class DeepseekV3(nn.Module):
    """The causal language model: `model` and `lm_head`, as in the checkpoint."""

    lm_head: Head
    """Of the last pipeline stage."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layout: Layout = WHOLE) -> None:
        super().__init__()
        self.ops = ops
        self.model = DeepseekV3Model(ops, config, layout)
        if layout.is_last(config):
            self.lm_head = Head(ops, config.vocab_size, config.hidden_size, layout.tensor)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """input_ids and positions, integers [T], to the normalised hidden states [T, hidden], which `lm_head` and MTP
        take.
        """
        return self.model(self.model.embed_tokens(input_ids), positions, attend)


def expert_parallel_layers(model: DeepseekV3Model) -> dict[int, ExpertParallelMoE]:
    """The layers held here whose routed experts ranks share, by their numbers."""
    return {int(i): m.mlp for i, m in model.layers.items() if isinstance(m.mlp, ExpertParallelMoE)}


@torch.inference_mode()
def weights_changed(model: nn.Module) -> None:
    """Tell every layer of `model` that its parameters were written: what is derived from them is derived again, in
    place. In inference mode, in which alone torch writes to what an engine derived there.
    """
    for module in model.modules():
        if isinstance(module, MLA):
            module.weights_changed()


def derived_is_current(model: nn.Module) -> bool:
    """Whether everything that `model` derived from its parameters is derived from those that it holds now."""
    return all(module.derived_is_current() for module in model.modules() if isinstance(module, MLA))
