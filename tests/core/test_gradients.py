"""Gradients of the whole model, every parameter, against autograd of the float64 oracle.

Attention's has two forms: by heads, which serves whole sequences, and the absorbed one for any selection of keys. The
twins break one gradient each; the same bound must catch every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from float64_oracle import Float64Oracle, float64_tensors
from torch.nn.functional import cross_entropy

from dsv3_plugin.autograd.bind import differentiable
from dsv3_plugin.checkpoint.loader import load_model, load_mtp, load_weights
from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.attend import Attend, WholeSequences
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.ops.absorb import absorb
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.linear import grouped_linear, head_linear
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.operation import Operation
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.quantize import dequantize_weight
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope
from dsv3_plugin.ops.router import moe_router
from dsv3_plugin.ops.silu_and_mul import silu_and_mul
from dsv3_plugin.registry import Ops

TOKENS = 70  # more than one key block and one CPU tile
MTP_WEIGHT = 0.3
# The largest error of a parameter's gradient over its largest element, in fp32: 5e-6 was measured.
BOUND = 2e-5

Break = Callable[[Ops], Ops]


def by_heads(attend: Attend) -> Attend:
    """As the layer has it for whole sequences."""
    return attend


def absorbed(attend: Attend) -> Attend:
    """An engine's own, of which the layer knows nothing."""
    return partial(attend)


FORMS = by_heads, absorbed


def loss_of(logits: torch.Tensor, mtp_logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [T + 2]: the main logits [T] predict the next, the MTP logits [T] the one after."""
    return cross_entropy(logits, tokens[1:-1]) + MTP_WEIGHT * cross_entropy(mtp_logits, tokens[2:])


def tokens_of(checkpoint: Path) -> torch.Tensor:
    vocab = CheckpointReader(checkpoint).config.vocab_size
    return torch.randint(vocab, (TOKENS + 2,), generator=torch.Generator().manual_seed(3))


def our_gradients(
    checkpoint: Path, broken: Break = lambda ops: ops, form: Callable[[Attend], Attend] = by_heads
) -> dict[str, torch.Tensor]:
    """By the checkpoint's names, through the core's layers and the explicit backward passes."""
    reader = CheckpointReader(checkpoint)
    config = reader.config
    ops = broken(differentiable(bind_ops(config, reader.profile(), torch.device("cpu"))))
    main, mtp = load_model(reader, ops), load_mtp(reader, ops)
    parameters = {"main": dict(main.named_parameters()), "mtp": dict(mtp.named_parameters())}
    for parameter in (*main.parameters(), *mtp.parameters()):
        parameter.requires_grad_(True)
    tokens, positions, attend = tokens_of(checkpoint), torch.arange(TOKENS), form(WholeSequences(ops, config))
    hidden = main(tokens[:-2], positions, attend)
    drafted = mtp(tokens[1:-1], positions, hidden, attend)
    loss_of(main.lm_head(hidden), mtp.lm_head(drafted), tokens).backward()
    gradients = {}
    for name, spec in checkpoint_tensors(config).items():
        if name.endswith(BIAS_SUFFIX):
            continue
        places = [(parameters[part][target.parameter], target.index) for part, target in spec.targets.items()]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad)[index] for p, index in places]
        if parts:
            gradients[name] = torch.stack(parts).sum(0)
    return gradients


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: TinyCheckpoint) -> dict[str, torch.Tensor]:
    """float64 gradients by name. An expert that no token chose has none: zero."""
    checkpoint = tiny_checkpoint("fp32")
    tensors = {n: t.requires_grad_(not n.endswith(BIAS_SUFFIX)) for n, t in float64_tensors(checkpoint).items()}
    oracle = Float64Oracle(CheckpointReader(checkpoint).config, tensors)
    tokens = tokens_of(checkpoint)
    loss_of(oracle.logits(tokens[:-2]), oracle.mtp_logits(tokens[:-1]), tokens).backward()
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in tensors.items()}


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference over the largest expected element, by name."""
    return {
        name: float((gradient.double() - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name, gradient in found.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_is_the_oracles(
    form: Callable[[Attend], Attend], tiny_checkpoint: TinyCheckpoint, expected: dict[str, torch.Tensor]
) -> None:
    found = errors(our_gradients(tiny_checkpoint("fp32"), form=form), expected)
    worst = max(found, key=lambda name: found[name])
    print(f"{len(found)} tensors, the worst gradient is {worst}'s: {found[worst]:.1e}")
    copies = {name for name in expected if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))}
    assert set(expected) - set(found) <= copies | {name for name in expected if name.endswith(BIAS_SUFFIX)}
    assert found[worst] < BOUND


class _Scaled(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.001


def _spoil(op: Operation[..., Any]) -> Break:
    """Make one operation's gradient one part in a thousand too large."""

    def broken(ops: Ops) -> Ops:
        right = ops[op]

        def run(*args: object, **kwargs: object) -> object:
            out = right(*args, **kwargs)
            return (out[0], _Scaled.apply(out[1])) if isinstance(out, tuple) else _Scaled.apply(out)

        return ops.with_kernel(op, run)

    return broken


def _no_weight_gradient(ops: Ops) -> Ops:
    """The router's weights as constants: the router would never learn."""

    def run(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        topk_ids, topk_weights = ops[moe_router](*args, **kwargs)
        return topk_ids, topk_weights.detach()

    return ops.with_kernel(moe_router, run)


@pytest.mark.parametrize(
    ("form", "broken"),
    [
        *((by_heads, _spoil(op)) for op in (grouped_linear, rms_norm, rope, silu_and_mul, moe_router, combine)),
        (by_heads, _no_weight_gradient),
        *((absorbed, _spoil(op)) for op in (absorb, head_linear, mla_attention)),
    ],
)
def test_one_wrong_gradient_is_caught(
    form: Callable[[Attend], Attend],
    broken: Break,
    tiny_checkpoint: TinyCheckpoint,
    expected: dict[str, torch.Tensor],
) -> None:
    found = errors(our_gradients(tiny_checkpoint("fp32"), broken, form), expected)
    assert max(found.values()) > BOUND


def masters(reader: CheckpointReader, ops: Ops) -> tuple[DeepseekV3, DeepseekV3MTP]:
    """The model with FP8's master weights in bf16, from an FP8 checkpoint."""
    stored = dict(reader.tensors())
    plain = {
        name: dequantize_weight(tensor, stored[f"{name}_scale_inv"]).bfloat16()
        if f"{name}_scale_inv" in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    config = reader.config.model_copy(update={"quantization_config": None})
    main, mtp = DeepseekV3(ops, reader.config), DeepseekV3MTP(ops, reader.config)
    load_weights(main, config, plain.items(), "main")
    load_weights(mtp, config, plain.items(), "mtp")
    return main, mtp


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_the_forward_keeps_its_bits(dtype: str, tiny_checkpoint: TinyCheckpoint) -> None:
    reader = CheckpointReader(tiny_checkpoint(dtype))
    ops = bind_ops(reader.config, reader.profile(), torch.device("cpu"))
    trained = differentiable(ops)
    tokens, positions = tokens_of(reader.path), torch.arange(TOKENS)
    outputs = []
    for kernels in (ops, trained):
        models = masters(reader, kernels) if kernels.master_weights else (load_model(reader, kernels),)
        main = models[0]
        mtp = models[1] if len(models) > 1 else load_mtp(reader, kernels)
        attend = WholeSequences(kernels, reader.config)
        hidden = main(tokens[:-2], positions, attend)
        outputs.append((main.lm_head(hidden), mtp.lm_head(mtp(tokens[1:-1], positions, hidden, attend))))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


SELECTIONS = {
    "all": ALL_KEYS,
    # The last two keys of each query and the first; the second request is a chunk from position 6 on.
    "window": KeySelection(torch.tensor([[0, p - 1, p] for p in (0, 1, 2, 3, 4, 6, 7)])),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_attention_gradients_of_chunks_and_shared_pages(selection: str) -> None:
    """Two requests on one page, the second a chunk with a cached prefix, against autograd in float64. The twin: the
    gradients of the other selection are others.
    """
    chosen = SELECTIONS[selection]
    (other,) = (keys for name, keys in SELECTIONS.items() if name != selection)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(7, 2, 6, generator=generator).requires_grad_()
    cache = torch.randn(4, 4, 6, generator=generator).requires_grad_()
    table, lengths, starts = torch.tensor([[2, 0], [2, 3]]), torch.tensor([5, 8]), torch.tensor([0, 5, 7])
    grad = torch.randn(7, 2, 4, generator=generator)
    run = mla_attention.differentiable({mla_attention: mla_attention})
    batch = PagedBatch.of(q, cache, table, lengths, starts)
    run(q, cache, batch, chosen, kv_lora_rank=4, scale=0.5).backward(grad)
    of_other = torch.autograd.grad(run(q, cache, batch, other, kv_lora_rank=4, scale=0.5), (q, cache), grad)

    wide_q, wide_cache = q.detach().double().requires_grad_(), cache.detach().double().requires_grad_()
    outputs = []
    for request, length in enumerate(lengths.tolist()):
        keys = wide_cache[table[request]].flatten(0, 1)[:length]
        rows = slice(starts[request], starts[request + 1])
        queries = wide_q[rows]
        scores = torch.einsum("thc,lc->htl", queries, keys) * 0.5
        future = torch.arange(length) > torch.arange(length - len(queries), length).unsqueeze(1)
        if chosen.positions is not None:
            future |= ~torch.stack([torch.isin(torch.arange(length), own) for own in chosen.positions[rows]])
        outputs.append(torch.einsum("htl,lr->thr", scores.masked_fill(future, -torch.inf).softmax(-1), keys[:, :4]))
    torch.cat(outputs).backward(grad.double())
    assert wide_q.grad is not None and wide_cache.grad is not None
    torch.testing.assert_close(q.grad, wide_q.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.grad, wide_cache.grad.float(), rtol=1e-4, atol=1e-5)
    for found, wide in zip(of_other, (wide_q, wide_cache), strict=True):
        assert wide.grad is not None and (found - wide.grad.float()).abs().max() > 0.01
