"""References that fall into the traps of `conformance.traps`: each changes one definition, for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from dsv3_plugin.conformance import sampling
from dsv3_plugin.conformance.testees.reference import ReferenceTestee
from dsv3_plugin.layers import attend
from dsv3_plugin.layers.moe import Router
from dsv3_plugin.ops import absorb, quantize, rope, router
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.mla_attention import mla_attention

Tensor = torch.Tensor
Patch = pytest.MonkeyPatch


def routed(logits: Tensor, bias: Tensor, *, mask: float = -torch.inf, epsilon: float = 1e-20, last: bool = False, **r):
    """`router.route` with other groups masked by `mask`, `epsilon` in the denominator, ties to the last."""
    order = -1 if last else 1

    def best(x: Tensor, count: int) -> Tensor:
        turned = x.flip(-1) if last else x
        ids = torch.sort(turned, dim=-1, descending=True, stable=True).indices[..., :count]
        return x.shape[-1] - 1 - ids if order < 0 else ids

    scores = sigmoid(logits)
    groups = (scores + bias).unflatten(1, (r["n_group"], -1))
    of_groups = groups.gather(-1, best(groups, 2))
    kept = torch.zeros_like(groups[..., 0], dtype=torch.bool)
    kept.scatter_(1, best(of_groups[..., 0] + of_groups[..., 1], r["topk_group"]), True)
    choice = groups.masked_fill(~kept.unsqueeze(-1), mask).flatten(1)
    ids = best(choice, r["num_experts_per_tok"]).sort(dim=-1).values
    weights = scores.gather(1, ids)
    total = weights[:, 0]
    for i in range(1, ids.shape[1]):
        total = total + weights[:, i]
    return ids, weights / (total + epsilon).unsqueeze(1) * r["routed_scaling_factor"]


def _no_temperature(patch: Patch, testee: ReferenceTestee) -> None:
    patch.setattr(attend, "softmax_scale", lambda config: config.qk_head_dim**-0.5)


def _halves(patch: Patch, testee: ReferenceTestee) -> None:
    def of_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rope.rope(torch.stack(x.chunk(2, -1), -1).flatten(-2), cos, sin)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    patch.setattr(absorb, "rope", of_halves)


def _route(**mistake: Any) -> Callable[[Patch, ReferenceTestee], None]:
    return lambda patch, testee: patch.setattr(router, "route", partial(routed, **mistake))


def _bf16_router(patch: Patch, testee: ReferenceTestee) -> None:
    right = router.route
    patch.setattr(router, "route", lambda logits, bias, **r: right(logits.bfloat16().float(), bias, **r))


def _bias_not_loaded(patch: Patch, testee: ReferenceTestee) -> None:
    for module in testee.model.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias.data.zero_()


def _position_zero(patch: Patch, testee: ReferenceTestee) -> None:
    assert testee.mtp is not None
    right, mtp = testee.mtp.layer.predict, testee.mtp
    positions: list[Tensor] = []
    mtp.register_forward_pre_hook(lambda module, args: positions.append(args[1]))

    def predict(embedded: Tensor, *args: Any) -> Tensor:
        return right(embedded * (positions[-1] != 0).to(embedded.dtype).unsqueeze(1), *args)

    patch.setattr(mtp.layer, "predict", predict)


def _floor(patch: Patch, testee: ReferenceTestee) -> None:
    right = quantize.scale_for
    patch.setattr(quantize, "scale_for", lambda amax, form: right(amax.clamp_min(1e-4), form))


def _zero_by_zero(patch: Patch, testee: ReferenceTestee) -> None:
    right = quantize.scale_for
    patch.setattr(quantize, "scale_for", lambda amax, form: torch.where(amax == 0, amax, right(amax, form)))


def _scale_dropped(patch: Patch, testee: ReferenceTestee) -> None:
    testee.model.model.layers["1"].mlp.shared_experts.down_proj.weight_scale_inv.data.fill_(1)


def _shared_scaled(patch: Patch, testee: ReferenceTestee) -> None:
    right = testee.ops[combine]
    testee.ops.kernels[combine] = lambda out, slots, weights, shared: right(out, slots, weights, shared * 2.5)


def _where(condition: Callable[[Any], bool]) -> Callable[[Patch, ReferenceTestee], None]:
    """Attention whose last bit is another one in some batches."""

    def fall(patch: Patch, testee: ReferenceTestee) -> None:
        right = testee.ops[mla_attention]

        def attention(q: Tensor, cache: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
            out = right(q, cache, batch, *args, **kwargs)
            return (out.view(torch.int16) ^ 1).view(out.dtype) if condition(batch) else out

        testee.ops.kernels[mla_attention] = attention

    return fall


def _verifies(batch: Any) -> bool:
    queries = batch.query_start_loc.diff()
    return bool(((queries > 1) & (batch.seq_lens > queries)).any())


def _raw_logprobs(patch: Patch, testee: ReferenceTestee) -> None:
    patch.setattr(sampling, "processed_logprobs", lambda logits, temperature: logits.log_softmax(-1))


FALLS: dict[str, Callable[[Patch, ReferenceTestee], None]] = {
    "yarn_temperature": _no_temperature,
    "rotary_halves": _halves,
    "zero_group_mask": _route(mask=0.0),
    "bf16_router": _bf16_router,
    "no_epsilon": _route(epsilon=0.0),
    "scale_after_combine": _shared_scaled,
    "bias_not_loaded": _bias_not_loaded,
    "mtp_position_zero": _position_zero,
    "quantizer_floor": _floor,
    "zero_block": _zero_by_zero,
    "scale_dropped": _scale_dropped,
    "phases_apart": _where(lambda batch: batch.num_tokens == batch.num_reqs),
    "verify_apart": _where(_verifies),
    "logprobs_of_another_kind": _raw_logprobs,
    "tie_order": _route(last=True),
    "denormals_flushed": lambda patch, testee: None,
}


@contextmanager
def fallen(trap: str, testee: ReferenceTestee) -> Iterator[None]:
    """The testee falls into the trap for as long as this lasts; some of its weights stay wrong."""
    with pytest.MonkeyPatch.context() as patch:
        FALLS[trap](patch, testee)
        if trap == "denormals_flushed":
            assert torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
