"""The core's layers as Megatron modules.

Megatron passes activations as [sequence, batch, hidden]; the core takes flat tokens [T, hidden], one sequence after the
other. A module here reshapes, calls the core, and keeps Megatron's conventions: constructor arguments that it does not
need, parameters in `params_dtype`, an output beside a bias that is None.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import _MODEL_PARALLEL_RNG_TRACKER_NAME, CheckpointWithoutOutput
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import InputError
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.linear import Activation, ColumnLinear, linear_in_slices
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.mlp import MLP
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.megatron_backend.documents import packed_starts
from dsv3_plugin.megatron_backend.sequences import SequencesOfPass
from dsv3_plugin.megatron_backend.tensor_parallel import all_tokens, cut_weights, own_tokens
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.registry import Ops


@dataclass(frozen=True)
class Binding:
    """What every layer of a model shares. No module, so that no cast of a model's buffers reaches the rotary table."""

    ops: Ops
    """Differentiable."""
    config: DeepseekV3Config
    rotary: RotaryTable
    sequences: SequencesOfPass


def make_trainable(parameter: nn.Parameter, config: Any, *, random_state: str | None = None) -> None:
    """Let a parameter of the core learn, and initialise it: a matrix by Megatron's `init_method`, a norm as ones.

    `random_state` names the state of Megatron's tracker to draw from, for what differs between ranks.
    """
    parameter.requires_grad_(True)
    if not config.perform_initialization:
        return
    with get_cuda_rng_tracker().fork(random_state) if random_state else nullcontext():
        nn.init.ones_(parameter) if parameter.dim() == 1 else config.init_method(parameter)


class CoreModule(MegatronModule):
    """A layer of the core, as `core`. Tensor-parallel ranks share the weights of its column and row projections."""

    def __init__(self, core: nn.Module, config: Any) -> None:
        super().__init__(config)
        self.core = core
        self.register_forward_pre_hook(_wait_for_weights)
        self.cut = cut_weights(core)
        for name, parameter in core.named_parameters():
            if name in self.cut and config.tensor_model_parallel_size > 1:
                make_trainable(parameter, config, random_state=_MODEL_PARALLEL_RNG_TRACKER_NAME)
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=self.cut[name], stride=1)
            else:
                make_trainable(parameter, config)

    def backward_dw(self) -> None:
        """Weight gradients are never delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each weight as one tensor, cut along its dimension; of gate and up each."""
        prefix = f"{prefix}core."
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.core.state_dict(keep_vars=True),
            prefix,
            self.cut,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        for name, module in self.core.named_modules():
            if isinstance(module, ColumnLinear) and module.fused == 2:
                key = f"{prefix}{name}.weight"
                state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


def _wait_for_weights(module: CoreModule, _: Any) -> None:
    """Wait for all weights of a layer that `--overlap-param-gather` is still gathering.

    Megatron waits in a hook of the module whose parameter it is. The core reads some without calling that module (the
    absorbed halves of `kv_b_proj`), so that the hooks are called here.
    """
    for part in module.core.modules():
        for hook in part._forward_pre_hooks.values():
            hook(part, ())


class Norm(MegatronModule):
    """RMSNorm: `weight` [hidden_size]."""

    def __init__(self, binding: Binding, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(config)
        self.ops = binding.ops
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron's mark for gradients of a rank's own tokens, which it adds over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] to the same shape."""
        return self.ops[rms_norm](x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class RecomputedMLA(MLA):
    """MLA that does not keep its heads' queries for its backward pass (`recompute_modules=mla_up_proj`)."""

    def up_project(self, queries: Any) -> torch.Tensor:
        """See `MLA.up_project`."""
        self.checkpoint = CheckpointWithoutOutput(fp8=None)
        heads: torch.Tensor = self.checkpoint.checkpoint(super().up_project, queries)
        return heads

    def attention(self, *operands: Any) -> Activation:
        """See `MLA.attention`."""
        values = super().attention(*operands)
        self.checkpoint.discard_output_and_register_recompute(values)
        return values


class Attention(CoreModule):
    """MLA, causal over each document of a batch."""

    def __init__(self, config: Any, layer_number: int, binding: Binding, **_: Any) -> None:
        heads = binding.config.num_attention_heads // config.tensor_model_parallel_size
        own_heads = binding.config.model_copy(update={"num_attention_heads": heads})
        recompute = config.recompute_granularity == "selective" and "mla_up_proj" in config.recompute_modules
        kind = RecomputedMLA if recompute else MLA
        super().__init__(kind(binding.ops, own_heads, layer_number - 1), config)
        self.binding = binding

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, hidden] to the same shape; under sequence parallelism s are this rank's tokens.

        In the place of Megatron's mask comes what it means: `document_starts`, or `with_prompt_lens`. With
        `packed_seq_params`, b is 1 and s holds its sequences. A shorter sequence of a batch is padded at its end: no
        token sees what follows it.
        """
        hidden_states = all_tokens(hidden_states, self.config)
        s, b = hidden_states.shape[:2]
        starts: torch.Tensor | None = attention_mask
        if starts is not None and starts.dtype != torch.int64:
            raise InputError("attention takes the starts of documents (document_starts), not a mask")
        if starts is None and packed_seq_params is not None:
            starts = packed_starts(packed_seq_params)
        sequences = self.binding.sequences.of(starts, b, s, hidden_states.device)
        x = hidden_states.transpose(0, 1).reshape(b * s, -1)
        attend = WholeSequences(self.binding.ops, self.binding.config, sequences.batch)
        out = self.core(x, *self.binding.rotary(sequences.positions), attend)
        return own_tokens(out.view(b, s, -1).transpose(0, 1).contiguous(), self.config), None


class DenseMLP(CoreModule):
    """The MLP of the first layers, and the shared expert of the others."""

    def __init__(self, binding: Binding, intermediate_size: int, config: Any, **_: Any) -> None:
        own_features = intermediate_size // config.tensor_model_parallel_size
        super().__init__(MLP(binding.ops, config.hidden_size, own_features), config)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, hidden] to the same shape."""
        x = all_tokens(hidden_states, self.config)
        return own_tokens(self.core(x.reshape(-1, x.shape[-1])).view(x.shape), self.config), None


class SharedExpert(DenseMLP):
    """The same, in the place where Megatron expects no bias beside the output."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [s, b, hidden] to the same shape."""
        return super().forward(hidden_states)[0]


class EHProjection(CoreModule):
    """The MTP layer's projection of [embedding; hidden]; never quantized. Megatron gathers the ranks' outputs."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, binding: Binding, **_: Any) -> None:
        own_size = output_size // config.tensor_model_parallel_size
        super().__init__(ColumnLinear(binding.ops, input_size, own_size, quantized=False), config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [s, b, 2 hidden] to [s, b, hidden], all tokens and this rank's part of hidden."""
        x = all_tokens(x, self.config)
        return self.core(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1), None


class OutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """The head, with Megatron's parameter and the contract's fp32 logits."""

    def __init__(self, binding: Binding, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ops = binding.ops

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """input [s, b, hidden] to logits fp32 [s, b, vocab_size], all tokens and this rank's part of the vocabulary."""
        input = all_tokens(input, self.config)
        slices = self.ops.slices
        x = slices.enter(input.reshape(-1, input.shape[-1]))
        logits = linear_in_slices(self.ops, x, weight, slices.held, out_dtype=torch.float32)
        # No view for autograd: Megatron's cross-entropy works in place, which a view of a kernel's output forbids.
        return torch.ops.aten._unsafe_view(logits, [*input.shape[:-1], logits.shape[1]])
