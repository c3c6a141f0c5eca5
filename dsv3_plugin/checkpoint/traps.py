"""Weights on which known mistakes show: those of the preset `traps`.

Random weights hide them. No score of theirs is negative, no two experts tie, no block is zero. A configuration with
`"planted_traps": true` gets the weights that any other would, and in them

* *six tokens* at the end of the vocabulary whose embeddings are extreme (`TOKENS`);
* *a channel* of the residual stream that those tokens alone use: no layer writes into it, and every router reads it. It
  drives all scores of a router to 1, where they tie, or to almost 0, where the 1e-20 in the denominator is the larger
  part;
* *negative scores*: every router's bias is 2 lower, so that a group left out with a score of 0 would be the best;
* *twins*: experts whose routers' rows are equal, in one group and in two, and experts whose rows differ by one bit;
* *zero blocks* in a weight, 128 columns wide as fp8 cuts them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX
from dsv3_plugin.config import FP8_BLOCK

KEY = "planted_traps"
"""Of a `config.json`; no other reader knows it."""


class Token(IntEnum):
    """The planted tokens, by their places from the end of the vocabulary."""

    ZERO = 1
    """All zeros: blocks without a largest number, and logits that all tie."""
    DENORMAL = 2
    """Numbers below the smallest normal one of fp32, which a flushing unit takes for zeros."""
    FAINT = 3
    """So small that after the norm every block is below the 1e-4 that some quantizers put under it."""
    HUGE = 4
    """2 ** 40 times the others: what layers add is rounded away."""
    FLOODED = 5
    """Every score of every router is 1."""
    DROWNED = 6
    """Every score of every router is almost 0."""

    def id(self, vocab_size: int) -> int:
        """Its token id."""
        return vocab_size - self.value


_CHANNEL = 0
_PULL = 3.5
"""A router's weight of the channel, of which the norm makes sqrt(hidden_size): logits of 56 where that is 256."""
_BIAS_SHIFT = -2.0
_SIZES = {Token.ZERO: 0.0, Token.DENORMAL: 2.0**-130, Token.FAINT: 2.0**-40, Token.HUGE: 2.0**40}
_LEVELS = {Token.FLOODED: 64.0, Token.DROWNED: -64.0}


def is_planted(config: dict[str, Any]) -> bool:
    """Whether a parsed `config.json` asks for traps."""
    return config.get(KEY) is True


def plant(name: str, weight: torch.Tensor) -> None:
    """Change the weight, before it is quantized, of the tensor that a checkpoint names so."""
    if name.endswith("embed_tokens.weight"):
        weight[:, _CHANNEL] = 0
        for token, size in _SIZES.items():
            weight[token.id(len(weight))] *= size
        for token, level in _LEVELS.items():
            weight[token.id(len(weight))] = 0
            weight[token.id(len(weight)), _CHANNEL] = level
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        weight[_CHANNEL] = 0
    elif name.endswith("eh_proj.weight"):
        weight[_CHANNEL] = 0
        weight[_CHANNEL, _CHANNEL] = 1
    elif name.endswith("mlp.gate.weight"):
        weight[:, _CHANNEL] = _PULL
        _make_twins(weight)
        near = len(weight) // 2
        weight[near + 1] = weight[near]
        weight.view(torch.int16)[near + 1, _CHANNEL + 1] ^= 1
    elif name.endswith(BIAS_SUFFIX):
        weight += _BIAS_SHIFT
        _make_twins(weight)
    elif name.endswith("shared_experts.up_proj.weight"):
        weight[:, FP8_BLOCK : 2 * FP8_BLOCK] = 0


def _make_twins(of_experts: torch.Tensor) -> None:
    """Equal rows of two experts in one group, and of two in the first group and the last."""
    of_experts[1] = of_experts[0]
    of_experts[-1] = of_experts[2]
