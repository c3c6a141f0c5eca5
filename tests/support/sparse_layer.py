"""A toy relative of DeepSeek-V3 with sparse attention: what such a model needs of an engine, and nothing else.

A token caches a flag behind its latent vector. A query attends to the flagged keys and to its own: it reads the flags
from the pages, as an indexer reads its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.attend import Attend, Select, select_all
from dsv3_plugin.layers.linear import Activation
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.ops.key_selection import KeySelection
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.profile import profile_for
from dsv3_plugin.registry import Ops

LENGTHS = 90, 41, 7


class SparseConfig(DeepseekV3Config):
    """Pages are wider than what attention reads."""

    @property
    def cached_dim(self) -> int:
        """The latent vector and a flag."""
        return self.latent_dim + 1


class SparseMLA(MLA):
    """`MLA` that selects keys."""

    def forward(self, x: Activation, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """See `MLA.forward`; every token whose first number is positive is flagged."""
        assert isinstance(x, torch.Tensor)
        flags = (x[:, :1] > 0).to(x.dtype)

        def attend_to_flagged(
            layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
        ) -> torch.Tensor:
            return attend(layer_idx, q, torch.cat((cached, flags), 1), self.select)

        return super().forward(x, cos, sin, attend_to_flagged)

    def select(self, pages: torch.Tensor, batch: PagedBatch) -> KeySelection:
        """The flagged keys of the queries' requests, and the queries' own; reads nothing of a device."""
        rows = torch.arange(batch.num_tokens, device=pages.device)
        request = torch.searchsorted(batch.query_start_loc, rows, right=True) - 1
        own = batch.seq_lens[request] - batch.query_start_loc[request + 1] + rows
        flags = pages[batch.block_table[request], :, self.config.latent_dim].flatten(1)
        keys = torch.arange(flags.shape[1], device=pages.device)
        chosen = (flags == 1) | (keys == own[:, None])
        return KeySelection(keys.where(chosen, -1))


@dataclass(frozen=True)
class Toy:
    """A sparse layer, and sequences of `LENGTHS` tokens for it."""

    ops: Ops
    config: SparseConfig
    layer: SparseMLA
    x: list[torch.Tensor]
    rotary: RotaryTable

    def run(self, spans: list[tuple[int, int]], attend: Attend, padding: int = 0) -> list[torch.Tensor]:
        """The layer's outputs for tokens first to last of each sequence, all in one batch; rows of padding behind."""
        x = torch.cat([own[first:last] for own, (first, last) in zip(self.x, spans, strict=True)])
        positions = torch.cat([torch.arange(*span) for span in spans])
        x, positions = (torch.cat((rows, rows[:1].expand(padding, *rows.shape[1:]))) for rows in (x, positions))
        out = self.layer(x, *self.rotary(positions), attend)
        return list(out[: len(out) - padding].split([last - first for first, last in spans]))


def toy(checkpoint: str | Path) -> Toy:
    """With the sizes and the profile of a checkpoint, and made-up weights."""
    config = SparseConfig.from_pretrained(checkpoint)
    assert isinstance(config, SparseConfig)
    ops = bind_ops(config, profile_for(config), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    layer = SparseMLA(ops, config, 0)
    for parameter in layer.parameters():
        numbers = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data.copy_(numbers if parameter.dim() > 1 else 1 + numbers)
    dtype = ops.setting.profile.dtype
    x = [torch.randn(length, config.hidden_size, generator=generator).to(dtype) for length in LENGTHS]
    return Toy(ops, config, layer, x, RotaryTable(config))


STEPS = [(0, 0, 0), (60, 0, 7), (61, 30, 7), (62, 31, 7), (90, 41, 7)]
"""How many tokens of each sequence are cached before and after each step: a prefill, chunks and decodes, in batches."""


def spans(step: int) -> list[tuple[int, int]]:
    """First and last token of each sequence in a step."""
    return list(zip(STEPS[step], STEPS[step + 1], strict=True))


def joined(steps: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Each sequence's outputs, one behind the other."""
    return [torch.cat(parts) for parts in zip(*steps, strict=True)]
