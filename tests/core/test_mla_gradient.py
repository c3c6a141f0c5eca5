"""MLA's gradient by heads beside that of its absorbed form: of packed documents, near float64, equal bits each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from bits import normal, same_bits
from conftest import TinyCheckpoint

from dsv3_plugin.autograd.bind import differentiable
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers import mla_gradient
from dsv3_plugin.layers.attend import Attend, WholeSequences
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.ops.head_attention_gradients import head_attention_gradients
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.slices import Slices

LENGTHS = 70, 70, 40, 2
TOKENS = sum(LENGTHS)
# The largest distance of a gradient from the other form's, over its length; 7e-7 and 7e-3 were measured.
BOUND = {"fp32": 1e-5, "bf16": 2**-6}


def documents() -> PagedBatch:
    """Packed one after the other, in pages of two tokens."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    table = starts[:-1, None] // 2 + torch.arange(max(LENGTHS) // 2)
    return PagedBatch(table.clamp_max(TOKENS // 2 - 1), torch.tensor(LENGTHS), starts, TOKENS, TOKENS // 2, 2)


class Layer:
    """One of a checkpoint's sizes with made-up weights, and its gradients, those of the input last."""

    def __init__(self, checkpoint: TinyCheckpoint, dtype: str) -> None:
        reader = CheckpointReader(checkpoint(dtype))
        self.config = reader.config
        self.ops = differentiable(bind_ops(reader.config, reader.profile(), torch.device("cpu")))
        self.mla = MLA(self.ops, reader.config, 0)
        for seed, parameter in enumerate(self.mla.parameters()):
            drawn = normal(*parameter.shape, seed=seed) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(drawn if parameter.dim() > 1 else 1 + drawn)
            parameter.requires_grad_()
        self.x = normal(TOKENS, reader.config.hidden_size, seed=90).to(self.ops.setting.profile.dtype)
        self.grad = normal(TOKENS, reader.config.hidden_size, seed=91).to(self.x.dtype)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        self.rotary = RotaryTable(reader.config)(positions)

    def run(self, form: Callable[[Attend], Attend] = lambda attend: attend) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.x.clone().requires_grad_()
        out = self.mla(x, *self.rotary, form(WholeSequences(self.ops, self.config, documents())))
        return out.detach(), list(torch.autograd.grad(out, (*self.mla.parameters(), x), self.grad))


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_forms_have_one_gradient(
    dtype: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(tiny_checkpoint, dtype)
    out, expected = layer.run(partial)
    by_heads = layer.run()
    again = layer.run()
    assert same_bits(out, by_heads[0])
    assert all(same_bits(*each) for each in zip(by_heads[1], again[1], strict=True))
    far = distance(by_heads[1], expected)
    print(f"{dtype}: {far:.1e} from the absorbed form")
    assert far < BOUND[dtype]
    # They are two: in their last bits they differ.
    assert not all(same_bits(*each) for each in zip(by_heads[1], expected, strict=True))

    # The twins: a document that sees its neighbour, and a scale that lacks YaRN's temperature.
    with monkeypatch.context() as broken:
        broken.setattr(WholeSequences, "seq_lens", lambda self, tokens: (140, *LENGTHS[2:]))
        assert distance(layer.run()[1], expected) > BOUND[dtype]
    scale = layer.config.qk_head_dim**-0.5

    def without_yarn(*args: object) -> object:
        return head_attention_gradients(*args[:-2], scale)  # type: ignore[arg-type]

    monkeypatch.setattr(mla_gradient, "head_attention_gradients", without_yarn)
    assert distance(layer.run()[1], expected) > BOUND[dtype]


@dataclass(frozen=True)
class Watching(Slices):
    """Keeps the gradient that tensor-parallel ranks add up."""

    entered: list[torch.Tensor]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        x.register_hook(self.entered.append)
        return x


def test_ranks_with_a_part_of_the_heads_add_up_to_the_whole(tiny_checkpoint: TinyCheckpoint) -> None:
    """The latent vectors that all heads share enter once, keys and values and rotary numbers together."""
    layer = Layer(tiny_checkpoint, "fp32")
    config, norm = layer.config, layer.mla.kv_a_layernorm
    count, width = config.num_attention_heads, config.v_head_dim
    heads, latent = normal(TOKENS, count, config.qk_head_dim, seed=1), normal(TOKENS, config.latent_dim, seed=2)
    w_uk, w_uv = (w.detach() for w in layer.mla.absorbed_weights())
    grad = normal(TOKENS, count * width, seed=3)
    cos, sin = layer.rotary

    def run(own: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """What entered, and the gradient of the queries."""
        ops = replace(layer.ops, slices=Watching(1, entered := []))
        by_heads = partial(mla_gradient.heads_of, ops, eps=norm.eps, cos=cos, sin=sin)
        operands = [
            x.clone().requires_grad_() for x in (heads[:, own], latent, norm.weight.detach(), w_uk[own], w_uv[own])
        ]
        part = grad.unflatten(1, (count, width))[:, own].flatten(1)
        out = mla_gradient.GradientByHeads.apply(lambda *_: part, by_heads, LENGTHS, 0.1, True, *operands)
        found = torch.autograd.grad(out, operands, part)
        (of_latent,) = entered
        return of_latent, found[0]

    whole, of_heads = run(slice(count))
    ranks = [run(slice(0, count // 2)), run(slice(count // 2, count))]
    assert whole.shape == latent.shape
    assert distance([ranks[0][0] + ranks[1][0]], [whole]) < BOUND["fp32"]
    assert distance([torch.cat([found for _, found in ranks], 1)], [of_heads]) < BOUND["fp32"]
    # The twin: one rank's part, in each half of the latent vector.
    for columns in slice(config.kv_lora_rank), slice(config.kv_lora_rank, None):
        assert distance([ranks[0][0][:, columns]], [whole[:, columns]]) > 0.1


def test_less_is_kept_for_it(tiny_checkpoint: TinyCheckpoint) -> None:
    """Neither absorbed queries nor what attention found of the latent vectors."""
    layer = Layer(tiny_checkpoint, "fp32")

    def kept(form: Callable[[Attend], Attend]) -> set[torch.Size]:
        shapes: set[torch.Size] = set()

        def pack(x: torch.Tensor) -> torch.Tensor:
            shapes.add(x.shape)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer.mla(layer.x, *layer.rotary, form(WholeSequences(layer.ops, layer.config, documents())))
        return shapes

    heads, config = layer.config.num_attention_heads, layer.config
    wide = {torch.Size((TOKENS, heads, width)) for width in (config.latent_dim, config.kv_lora_rank)}
    assert wide <= kept(partial) and not wide & kept(lambda attend: attend)


def test_without_gradients_nothing_is_kept_or_derived(tiny_checkpoint: TinyCheckpoint) -> None:
    layer = Layer(tiny_checkpoint, "bf16")
    out, _ = layer.run()
    with torch.no_grad():
        again = layer.mla(layer.x, *layer.rotary, WholeSequences(layer.ops, layer.config, documents()))
    assert same_bits(out, again) and again.grad_fn is None
