"""The core's layers as Megatron modules.

Megatron passes activations as [sequence, batch, hidden]; the core takes flat tokens [T, hidden], one sequence after the
other. A module here reshapes, calls the core, and keeps Megatron's conventions: constructor arguments that it does not
need, parameters in `params_dtype`, an output beside a bias that is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import InputError
from dsv3_plugin.layers.linear import Linear
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.mlp import MLP
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.ops.rope import softmax_scale
from dsv3_plugin.registry import Ops


@dataclass(frozen=True)
class Binding:
    """What every layer of a model shares. No module, so that no cast of a model's buffers reaches the rotary table."""

    ops: Ops
    """Differentiable."""
    config: DeepseekV3Config
    rotary: RotaryTable


def make_trainable(module: nn.Module, config: Any) -> None:
    """Let the core's parameters learn, and initialise them: matrices by Megatron's `init_method`, norms as ones."""
    for parameter in module.parameters():
        parameter.requires_grad_(True)
        if config.perform_initialization:
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                config.init_method(parameter)


class Norm(MegatronModule):
    """RMSNorm: `weight` [hidden_size]."""

    def __init__(self, binding: Binding, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(config)
        self.ops = binding.ops
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] to the same shape."""
        return self.ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class Attention(MegatronModule):
    """Absorbed MLA over whole sequences, causal; Megatron's attention mask is not looked at."""

    def __init__(self, config: Any, layer_number: int, binding: Binding, **_: Any) -> None:
        super().__init__(config)
        self.binding = binding
        self.core = MLA(binding.ops, binding.config, layer_number - 1)
        make_trainable(self.core, config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, packed_seq_params: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, hidden] to the same shape; with `packed_seq_params`, b is 1 and s holds its sequences.

        A shorter sequence of a batch is padded at its end: no token sees what follows it.
        """
        s, b = hidden_states.shape[:2]
        if packed_seq_params is None:
            starts = torch.arange(b + 1, device=hidden_states.device) * s
        else:
            padded = packed_seq_params.cu_seqlens_q_padded
            starts = packed_seq_params.cu_seqlens_q if padded is None else padded
        sequences = _Sequences(self.binding, starts)
        x = hidden_states.transpose(0, 1).reshape(b * s, -1)
        out = self.core(x, *self.binding.rotary(sequences.positions), sequences.attend)
        return out.view(b, s, -1).transpose(0, 1).contiguous(), None


class _Sequences:
    """Whole sequences, one after the other: the core's `Attend`. Each latent vector is a page of the cache."""

    def __init__(self, binding: Binding, starts: torch.Tensor) -> None:
        self.binding = binding
        self.starts = starts
        self.lengths = starts[1:] - starts[:-1]
        longest, limit = int(self.lengths.max()), binding.config.max_position_embeddings
        if longest > limit:
            raise InputError(f"a sequence of {longest} tokens exceeds max_position_embeddings={limit}")
        tokens = torch.arange(int(starts[-1]), device=starts.device)
        self.positions = tokens - torch.repeat_interleave(starts[:-1], self.lengths)
        last = tokens[-1]
        self.pages = (starts[:-1, None] + torch.arange(longest, device=starts.device)).clamp_max(last)

    def attend(self, layer_idx: int, q: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """See `dsv3_plugin.layers.mla.Attend`."""
        config = self.binding.config
        return self.binding.ops.mla_attention(
            q,
            latent.unsqueeze(1),
            self.pages,
            self.lengths,
            self.starts,
            kv_lora_rank=config.kv_lora_rank,
            scale=softmax_scale(config),
        )


class DenseMLP(MegatronModule):
    """The MLP of the first layers, and the shared expert of the others."""

    def __init__(self, binding: Binding, intermediate_size: int, config: Any, **_: Any) -> None:
        super().__init__(config)
        self.core = MLP(binding.ops, config.hidden_size, intermediate_size)
        make_trainable(self.core, config)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, hidden] to the same shape."""
        return self.core(hidden_states.reshape(-1, hidden_states.shape[-1])).view(hidden_states.shape), None


class SharedExpert(DenseMLP):
    """The same, in the place where Megatron expects no bias beside the output."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [s, b, hidden] to the same shape."""
        return super().forward(hidden_states)[0]


class EHProjection(MegatronModule):
    """The MTP layer's projection of [embedding; hidden]; never quantised."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, binding: Binding, **_: Any) -> None:
        super().__init__(config)
        self.core = Linear(binding.ops, input_size, output_size, quantized=False)
        make_trainable(self.core, config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [s, b, 2 hidden] to [s, b, hidden]."""
        return self.core(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1), None


class OutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """The head, with Megatron's parameter and the contract's fp32 logits."""

    def __init__(self, binding: Binding, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ops = binding.ops

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """input [s, b, hidden] to logits fp32 [s, b, vocab_size]."""
        logits = self.ops.linear(input.reshape(-1, input.shape[-1]), weight, out_dtype=torch.float32)
        # No view for autograd: Megatron's cross-entropy works in place, which a view of a kernel's output forbids.
        return torch.ops.aten._unsafe_view(logits, [*input.shape[:-1], logits.shape[1]])
