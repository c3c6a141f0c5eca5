"""Where a layer's attention meets an engine's pages.

An engine's `Attend` does two things for each layer: it writes what is cached for the step's tokens, and calls
`attend_to_pages` with its pages and with the `PagedBatch` that it built for the step. What is cached, and which keys of
it are attended to, is the layer's affair. So a relative with sparse attention needs no engine's help: its layer caches
its indexer's keys behind the latent vectors (`cached_dim`), and hands on a function that selects by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.paged_batch import PagedBatch, whole_sequence
from dsv3_plugin.ops.prompt_batch import of_prompts
from dsv3_plugin.ops.rope import softmax_scale
from dsv3_plugin.registry import Ops

FAST_PAGE_SIZE = 64
"""Keys that attention's kernels copy at once. Smaller pages cost a GPU time, and change no bit."""

Select = Callable[[torch.Tensor, PagedBatch], KeySelection]
"""Pages [num_blocks, block_size, cached_dim], with the step's tokens written, and the batch, to the keys of its
`num_tokens` queries. An engine may have padded what the layer was given: rows behind `num_tokens` are none of it."""


def select_all(pages: torch.Tensor, batch: PagedBatch) -> KeySelection:
    """DeepSeek-V3's own: no choice."""
    return ALL_KEYS


class Attend(Protocol):
    """What an engine supplies for each forward pass."""

    def __call__(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        """Write cached [T, cached_dim] to layer `layer_idx`'s pages, then attend q [T, H, latent_dim] to the keys that
        `select` chooses of them.

        Returns [T, H, kv_lora_rank], the result of `attend_to_pages`.
        """


Compute = Callable[[torch.Tensor, PagedBatch], torch.Tensor]
"""Pages [num_blocks, block_size, cached_dim], with the step's tokens written, and the batch, to rows [num_tokens, ...].
"""


@runtime_checkable
class OverPages(Protocol):
    """An `Attend` over whose pages a layer may compute what it wants, as the `two_form` profile does for prompts."""

    def has_prompts(self) -> bool:
        """Whether rows of the pass may be of prompts; if none is, a layer calls it as an `Attend`.

        Raises `InputError` where its batch does not say.
        """

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        """Write cached [T, cached_dim] to layer `layer_idx`'s pages, then `compute` with them and with the batch."""


def attend_to_pages(
    ops: Ops, config: DeepseekV3Config, q: torch.Tensor, pages: torch.Tensor, batch: PagedBatch, select: Select
) -> torch.Tensor:
    """Attend q [num_tokens, H, latent_dim] to pages [num_blocks, block_size, cached_dim], which hold the step's tokens.

    A key is the first `latent_dim` numbers of a token. Returns [num_tokens, H, kv_lora_rank].
    """
    latent = pages if pages.shape[-1] == config.latent_dim else pages[..., : config.latent_dim]
    return ops[mla_attention](
        q, latent, batch, select(pages, batch), kv_lora_rank=config.kv_lora_rank, scale=softmax_scale(config)
    )


def attending(ops: Ops, config: DeepseekV3Config, q: torch.Tensor, select: Select) -> Compute:
    """`attend_to_pages` by q [num_tokens, H, latent_dim], of pages and batch."""

    def attend(pages: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        return attend_to_pages(ops, config, q, pages, batch, select)

    return attend


def padded(out: torch.Tensor, rows: int) -> torch.Tensor:
    """out [tokens, ...] with rows of zeros behind it, where an engine has padded a pass, to [rows, ...]."""
    return torch.cat((out, out.new_zeros(rows - len(out), *out.shape[1:]))) if len(out) < rows else out


class WholeSequences:
    """An `Attend` of whole sequences without a cache: all tokens are queries, and what a layer caches is the pages."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, batch: PagedBatch | None = None) -> None:
        self.ops, self.config = ops, config
        self.batch = batch
        """The sequences, one after the other; or None for one of all tokens."""

    def seq_lens(self, tokens: int) -> tuple[int, ...]:
        """Of the sequences that `tokens` are."""
        return (tokens,) if self.batch is None else self.batch.read_seq_lens()

    def __call__(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        """See `Attend`."""
        return self.over_pages(layer_idx, cached, attending(self.ops, self.config, q, select))

    def has_prompts(self) -> bool:
        """See `OverPages`."""
        return self.batch is None or of_prompts(self.batch).has_prompts

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        """See `OverPages`."""
        batch = whole_sequence(len(cached), cached.device) if self.batch is None else self.batch
        pages = self.ops.slices.enter(cached).unflatten(0, (-1, batch.block_size))
        return compute(pages, batch)
