"""verl: what `actor_rollout_ref.model.external_lib=dsv3_plugin.hosts.verl` imports in each of its workers.

With `actor.strategy=megatron` and `vanilla_mbridge=True` a trainer then builds, loads, exports and saves this model
(`dsv3_plugin.hosts.mbridge`), and takes log-softmax as log-probabilities. verl's own formula, Megatron's cross-entropy,
is another number for most tokens. Written for verl 0.9.1.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch


def install() -> None:
    """Take both places, where there is a trainer: a server's process may be without Megatron."""
    if "sglang" in sys.modules:
        # A server of verl's, which builds SGLang's arguments before SGLang loads plugins.
        from dsv3_plugin.sglang_backend.plugin import load_early

        load_early()
    if find_spec("megatron") is None:
        return
    from verl.workers.engine.megatron import transformer_impl

    import dsv3_plugin.hosts.mbridge  # noqa: F401

    # Where verl's engine looks it up.
    transformer_impl.vocab_parallel_log_probs_from_logits = log_probs_from_logits


def log_probs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """verl's `vocab_parallel_log_probs_from_logits`: fp32 logits [..., vocab_size / ranks], which verl has divided by
    the temperature, and labels [...], to fp32 [...].

    Raises `InputError` for logits in another dtype, which are another model's.
    """
    from dsv3_plugin.megatron_backend.log_probs import log_probs

    return log_probs(logits, labels)


install()
