"""How far apart log-probabilities are, in the words of the hosts that print such figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsv3_plugin.conformance.compare import bits
from dsv3_plugin.diff.sides import Pair

FIGURES = {
    "rollout_probs_diff_max": "verl: largest |exp(a) - exp(b)|",
    "rollout_probs_diff_mean": "verl: mean |exp(a) - exp(b)|",
    "rollout_probs_diff_std": "verl: its standard deviation",
    "rollout_actor_probs_pearson_corr": "verl: correlation of the probabilities",
    "train_rollout_logprob_abs_diff": "slime: mean |a - b|",
    "token_mult_prob_error": "NeMo-RL: mean exp(|a - b|)",
    "k3_kl": "mean exp(a - b) - (a - b) - 1",
    "logprob_abs_diff_max": "largest |a - b|",
    "logprob_abs_diff_p99": "of 100 tokens one is further apart",
}
"""Name to what it is; a is the first side's log-probability of a token, b the second's."""


def figures(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Of log-probabilities fp32 [n] of the same tokens, `FIGURES` in fp64, and `tokens` and `equal`, bit for bit; NaN
    equals nothing.
    """
    equal = int(((bits(left) == bits(right)) & ~left.isnan()).sum())
    found: dict[str, float] = {"tokens": len(left), "equal": equal}
    if not len(left):
        return found
    a, b = left.double(), right.double()
    difference, of_probs = a - b, (a.exp() - b.exp()).abs()
    apart = difference.abs()
    return found | {
        "rollout_probs_diff_max": of_probs.max().item(),
        "rollout_probs_diff_mean": of_probs.mean().item(),
        "rollout_probs_diff_std": of_probs.std().item() if len(left) > 1 else 0.0,
        "rollout_actor_probs_pearson_corr": _pearson(a.exp(), b.exp()),
        "train_rollout_logprob_abs_diff": apart.mean().item(),
        "token_mult_prob_error": apart.exp().mean().item(),
        "k3_kl": (difference.exp() - difference - 1).mean().item(),
        "logprob_abs_diff_max": apart.max().item(),
        "logprob_abs_diff_p99": apart.sort().values[min(len(apart) - 1, int(0.99 * len(apart)))].item(),
    }


def _pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 for what does not vary and is equal."""
    if torch.equal(a, b):
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def summarize(pairs: Sequence[Pair]) -> dict[str, Any]:
    """`figures` of all pairs, and of those of each version of the second side and of each staleness, where told."""
    versions = sorted({pair.right.version for pair in pairs if pair.right.version is not None})
    stale = sorted({pair.staleness for pair in pairs if pair.staleness is not None})
    return {
        "all": _of(pairs),
        "by_version": {str(v): _of([pair for pair in pairs if pair.right.version == v]) for v in versions},
        "by_staleness": {str(s): _of([pair for pair in pairs if pair.staleness == s]) for s in stale},
    }


def _of(pairs: Sequence[Pair]) -> dict[str, float]:
    sides = [pair.logprobs() for pair in pairs if pair.tokens]
    empty = torch.empty(0)
    left, right = (torch.cat([empty, *(values[i] for values in sides)]) for i in (0, 1))
    return figures(left, right)
