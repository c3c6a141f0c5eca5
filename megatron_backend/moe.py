"""The mixture of experts: Megatron's `MoELayer`, dispatcher and bias update around the core's router and experts.

Megatron's dispatcher sends each token's row to the rank of its expert and back. It would then add the rows up in its
own order; instead they are combined as the contract says. They come back sorted by expert, and by token within an
expert, on every number of ranks: that is the core's order, so no expert-parallel size can change a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter

from dsv3_plugin.layers.moe import Experts
from dsv3_plugin.megatron_backend.layers import Binding, make_trainable
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.ops.permute import sort_by_expert
from dsv3_plugin.ops.router import route, router_linear
from dsv3_plugin.registry import Ops


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's parameters, losses and counters; the core's logits and choice.

    `expert_bias` is `e_score_correction_bias`. The tokens of each expert are counted in integers.
    """

    expert_bias: torch.Tensor | None

    def __init__(self, binding: Binding, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.binding = binding
        if self.enable_expert_bias:
            counts = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=self.weight.device)
            self.register_buffer("local_tokens_per_expert", counts, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        """Cast and move like any module, but keep the bias in fp32: in bf16 a step of 0.001 would be lost."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.expert_bias = bias.to(self.weight.device)
        return self

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input [s, b, hidden], padding_mask [s, b], True for padding; to weights fp32 and choice bool, both [s b, E].

        Padding is dispatched like any token, and neither counted nor balanced.
        """
        config, ops = self.binding.config, self.binding.ops
        s, b, hidden = input.shape
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        # Losses change no number on their way: they add their gradients to those of the logits and the weights.
        logits = self.apply_z_loss(ops[router_linear](input.reshape(s * b, hidden), self.weight), mask)
        bias = self.expert_bias
        if bias is None:
            bias = logits.new_zeros(config.n_routed_experts)
        topk_ids, topk_weights = ops[route](
            logits,
            bias,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        probs = torch.zeros_like(logits).scatter(1, topk_ids, topk_weights)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, topk_ids, True)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            of_aux_loss, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=mask
            )
            padded = mask is not None
            probs = self._apply_aux_loss(probs, scores, of_aux_loss, with_padding_mask=padded)
            probs = self._apply_seq_aux_loss(probs, scores, of_aux_loss, s, b, with_padding_mask=padded)
            probs = self._apply_global_aux_loss(probs, scores, of_aux_loss, with_padding_mask=padded)
        self._apply_expert_bias(routing_map, None if mask is None else mask.unsqueeze(1))
        return probs, routing_map


class LocalExperts(MegatronModule):
    """The experts of this rank, stacked."""

    def __init__(self, binding: Binding, num_local_experts: int, config: Any, *, pg_collection: Any, **_: Any) -> None:
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.expert_dp_group = pg_collection.expt_dp
        self.core = Experts(binding.ops, num_local_experts, config.hidden_size, binding.config.moe_intermediate_size)
        for parameter in self.parameters():
            make_trainable(parameter, config, random_state=get_expert_parallel_rng_tracker_name())
            # Megatron's mark for gradients that are summed over the ranks with the same experts, not over the
            # data-parallel ones. Set on one rank too: the optimizer's state then has the same names in every layout.
            parameter.allreduce = False  # type: ignore[attr-defined]

    @property
    def first_expert(self) -> int:
        """The model's index of this rank's first expert."""
        return self.ep_group.rank() * self.num_local_experts

    def forward(
        self, dispatched: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """dispatched [S, hidden] sorted by expert to [S, hidden]; the weights are applied where rows are combined."""
        # Megatron may have moved the counts to the host, to plan its all-to-all by them.
        rows = self.core(dispatched.contiguous(), tokens_per_expert.to(dispatched.device))
        # Megatron's schedule that overlaps communication asks for their gradient all the same.
        return _BesideUnused.apply(rows, probs) if self.config.overlap_moe_expert_parallel_comm else rows, None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The stacked weights as one tensor, cut along the experts."""
        prepended = len(sharded_offsets)
        replica_id = 0, 0, self.expert_dp_group.rank()
        cut = prepended, self.ep_group.rank(), self.ep_group.size()
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                cut,
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )
            for name, parameter in self.named_parameters()
        }


class _BesideUnused(torch.autograd.Function):
    """Rows as they are, beside a tensor whose gradient is then zero and not missing."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Returns `rows`."""
        ctx.save_for_backward(unused)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Of both."""
        (unused,) = ctx.saved_tensors
        return gradient, torch.zeros_like(unused)


class _Copies(torch.autograd.Function):
    """Tokens' rows, a copy for each of a token's experts: its gradient is the sum of theirs as `combine` has it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ops: Ops, tokens: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """tokens [s, b, hidden], which were copied to rows [s b k, hidden] at slots [s b, k]; returns `rows`."""
        ctx.save_for_backward(slots)
        ctx.ops, ctx.shape = ops, tokens.shape
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """Of the tokens."""
        (slots,) = ctx.saved_tensors
        nothing = gradient.new_zeros(len(slots), gradient.shape[1])
        ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
        return None, ctx.ops[combine](gradient.contiguous(), slots, ones, nothing).view(ctx.shape), None, None


class MoE(MoELayer):  # type: ignore[misc]
    """Megatron's layer, combining as the contract says."""

    def __init__(self, binding: Binding, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.binding = binding

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's, but for the gradient of hidden_states [s, b, hidden], which it copies once for each expert of a
        token: a GPU would add the copies' gradients up in whatever order.
        """
        topk_ids = routing_map.nonzero()[:, 1].contiguous().view(len(routing_map), -1)
        _, slots, _ = self.binding.ops[sort_by_expert](topk_ids, routing_map.shape[1])
        rows, probs = super().preprocess(hidden_states.detach(), probs, routing_map)
        self.token_dispatcher.slots = slots
        return _Copies.apply(self.binding.ops, hidden_states, rows, slots), probs

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's. `probs` [s b k] are the weights of the rows that this rank sends, sorted by expert; they are kept
        for `postprocess`. Under a schedule that overlaps communication they are this part's own: it cuts gradients at
        the borders of parts, and frees what this one was given; a copy leads the gradient back there.
        """
        self.weights = probs.clone() if self.config.overlap_moe_expert_parallel_comm else probs
        dispatched: tuple[torch.Tensor, torch.Tensor] = super().dispatch(hidden_states, probs)
        return dispatched

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """output [s b k, hidden], this rank's rows as they came back from the experts; to [s, b, hidden]."""
        assert shared_expert_output is not None
        shape, slots = shared_expert_output.shape, self.token_dispatcher.slots
        weights = self.weights[slots]
        shared = shared_expert_output.reshape(-1, shape[-1])
        return self.binding.ops[combine](output, slots, weights, shared).view(shape)
