"""The whole model, and its kernels chosen in one place."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.hooks import Arithmetic, Setting
from dsv3_plugin.layers.attend import Attend
from dsv3_plugin.layers.decoder import DecoderLayer
from dsv3_plugin.layers.embedding import Embedding, Head
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.norm import RMSNorm
from dsv3_plugin.layers.rotary import RotaryTable
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
) -> Ops:
    """Choose the kernels of a model on `device`; `arithmetic` defaults to the device's own.

    Raises `KernelError` where an operation has none.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if device.type == "cpu":
        pin_one_thread()
    arithmetic = arithmetic or ("cpu" if device.type == "cpu" else "sm90")
    dims = {name: value for name, value in config.model_dump().items() if type(value) is int}
    return bind(Setting(device.type, arithmetic, profile, capability, dims), mode)


class DeepseekV3Model(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, ops: Ops, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(ops, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(ops, config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)

    def forward(self, inputs_embeds: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """inputs_embeds [T, hidden], positions integers [T], to the normalised hidden states [T, hidden]."""
        cos, sin = self.rotary(positions)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)


class DeepseekV3(nn.Module):
    """The causal language model: `model` and `lm_head`, as in the checkpoint."""

    def __init__(self, ops: Ops, config: DeepseekV3Config) -> None:
        super().__init__()
        self.ops = ops
        self.model = DeepseekV3Model(ops, config)
        self.lm_head = Head(ops, config.vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """input_ids and positions, integers [T], to the normalised hidden states [T, hidden], which `lm_head` and MTP
        take.
        """
        return self.model(self.model.embed_tokens(input_ids), positions, attend)


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
