"""Compiling, before the first request comes, what requests may need.

A kernel is compiled for a kind of shape when it first meets it: a tile for few rows and one for many, rows that fill
whole vectors and rows that do not. Layers of one kind have the same shapes, so one of each kind, run at enough numbers
of tokens, meets all that a server will. Compilers keep what they made in caches of their own, under a name of all that
went in: the next start loads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsv3_plugin.layers.attend import Attend, Compute, Select, attend_to_pages, select_all
from dsv3_plugin.layers.decoder import DecoderLayer
from dsv3_plugin.layers.embedding import Head
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
from dsv3_plugin.layers.model import DeepseekV3Model
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.layout import Layout
from dsv3_plugin.ops.mla_attention import SPLIT_KEYS
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.prompt_batch import with_prompts

_EACH = 256
_STEP = 128


def token_counts(most: int) -> list[int]:
    """Numbers of tokens, 1 to `most`, that meet every tile and every alignment: each of the first ones, the powers of
    two with their neighbours, where tiles change, and steps of the largest tile.
    """
    powers = [2**n for n in range(most.bit_length() + 1)]
    near = {power + i for power in powers for i in (-1, 0, 1)}
    found = {*range(1, _EACH), *near, *range(_EACH, most, _STEP), most}
    return sorted(count for count in found if 1 <= count <= most)


@torch.inference_mode()
def warm_up(
    model: DeepseekV3Model | DeepseekV3MTP,
    head: Head | None,
    layout: Layout,
    *,
    block_size: int,
    most_tokens: int,
    most_logits: int,
) -> float:
    """Run one layer of each kind, and the head, at all `token_counts`; their results are dropped. Returns the seconds.

    layout: which part of the model this is. block_size: keys of a page. most_tokens: of a pass. most_logits: rows of
    them that get logits. Nothing that the model holds changes. Ranks that share the model make this call together.
    """
    began = time.perf_counter()
    attend = _Nothing(model, block_size)
    with _uncounted(model):
        for tokens in token_counts(max(most_tokens, most_logits)):
            for prompts in attend.kinds:
                attend.prompts = prompts
                layout.begin_pass(tokens)
                hidden = _pass(model, tokens, attend)
            if head is not None and tokens <= most_logits:
                head(hidden)
    if model.rotary.cos.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _pass(model: DeepseekV3Model | DeepseekV3MTP, tokens: int, attend: Attend) -> torch.Tensor:
    device = model.rotary.cos.device
    positions = torch.zeros(tokens, dtype=torch.int64, device=device)
    hidden = _different_rows(tokens, _layers(model)[0].input_layernorm.weight)
    if isinstance(model, DeepseekV3MTP):
        return model(positions, positions, hidden, attend)
    return model.through(one_of_each_kind(model), hidden, positions, attend)


def _different_rows(tokens: int, like: torch.Tensor) -> torch.Tensor:
    """[tokens, len(like)] of its dtype. Of equal rows all tokens would choose the same experts, and ranks would never
    get a number of rows that fills no vector, as requests send.
    """
    columns = torch.arange(len(like), device=like.device, dtype=torch.int32)
    rows = torch.arange(tokens, device=like.device, dtype=torch.int32)
    return ((columns + 7 * rows[:, None]) % 251 - 125).to(like.dtype)


def _layers(model: DeepseekV3Model | DeepseekV3MTP) -> list[DecoderLayer]:
    if isinstance(model, DeepseekV3MTP):
        return [model.layer]
    return [layer for layer in model.layers.values() if isinstance(layer, DecoderLayer)]


def one_of_each_kind(model: DeepseekV3Model) -> list[DecoderLayer]:
    """The first layer, which has no residual yet, and of the others the first of each kind."""
    first, *others = _layers(model)
    kinds = {type(layer.mlp): layer for layer in reversed(others)}
    return [first, *reversed(kinds.values())]


class _Nothing:
    """An `Attend` over one empty page: each pass is one request, long enough for its keys to be split."""

    def __init__(self, model: DeepseekV3Model | DeepseekV3MTP, block_size: int) -> None:
        attention = _layers(model)[0].self_attn
        self.ops, self.config = attention.ops, attention.config
        self.device, dtype = model.rotary.cos.device, self.ops.setting.profile.dtype
        self.page = torch.zeros(1, block_size, self.config.cached_dim, dtype=dtype, device=self.device)
        self.kinds = (False, True) if self.ops.setting.profile.attention == "two_form" else (False,)
        """Of passes: whether rows are of prompts."""
        self.prompts = False

    def __call__(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        return attend_to_pages(self.ops, self.config, q, self.page, self._batch(len(q)), select)

    def has_prompts(self) -> bool:
        return self.prompts

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        batch = self._batch(len(cached))
        compute(self.page, with_prompts(batch, (0,)))
        return compute(self.page, with_prompts(batch, batch.read_seq_lens()))

    def _batch(self, tokens: int) -> PagedBatch:
        keys, block_size = tokens + SPLIT_KEYS, self.page.shape[1]
        return PagedBatch(
            block_table=torch.zeros(1, -(-keys // block_size), dtype=torch.int32, device=self.device),
            seq_lens=torch.full((1,), keys, dtype=torch.int32, device=self.device),
            query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=self.device),
            num_tokens=tokens,
            num_blocks=1,
            block_size=block_size,
            host_seq_lens=(keys,),
            host_query_start_loc=(0, tokens),
        )


@contextmanager
def _uncounted(model: DeepseekV3Model | DeepseekV3MTP) -> Iterator[None]:
    """No expert's load is counted meanwhile."""
    counting = [m for m in model.modules() if isinstance(m, ExpertParallelMoE)]
    loads = [m.expert_load for m in counting]
    for m in counting:
        m.expert_load = None
    try:
        yield
    finally:
        for m, load in zip(counting, loads, strict=True):
            m.expert_load = load
