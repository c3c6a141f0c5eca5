"""verl: what `actor_rollout_ref.model.external_lib=dsv3_plugin.hosts.verl` imports in each of its workers.

With `actor.strategy=megatron` and `vanilla_mbridge=True` a trainer then builds, loads, exports and saves this model
(`dsv3_plugin.hosts.mbridge`), and takes log-softmax as log-probabilities. verl's own formula, Megatron's cross-entropy,
is another number for most tokens. Written for verl 0.9.1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch

from dsv3_plugin.errors import EngineError


def install() -> None:
    """Take our places in this process: of a server's, which may be without Megatron, and of a trainer's."""
    if "sglang" in sys.modules:
        # verl builds SGLang's arguments before SGLang loads plugins.
        from dsv3_plugin.sglang_backend.plugin import load_early

        load_early()
    if find_spec("megatron") is None:
        return
    from verl.workers.engine.megatron import transformer_impl

    require(transformer_impl, "vocab_parallel_log_probs_from_logits")
    require(transformer_impl, "MegatronEngine")
    engine = transformer_impl.MegatronEngine
    require(engine, "_build_tf_config")

    import dsv3_plugin.hosts.mbridge  # noqa: F401

    # Where verl's engine looks it up.
    transformer_impl.vocab_parallel_log_probs_from_logits = log_probs_from_logits
    engine._build_tf_config = through_mbridge(engine._build_tf_config)


def require(owner: Any, name: str) -> None:
    """Raise `EngineError` where verl has no such function: put there all the same, ours would never be called."""
    if not hasattr(owner, name):
        raise EngineError(
            f"{owner.__name__} has no {name}, which dsv3-plugin replaces: this version of verl is not supported"
        )


def log_probs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """verl's `vocab_parallel_log_probs_from_logits`: fp32 logits [..., vocab_size / ranks], which verl has divided by
    the temperature, and labels [...], to fp32 [...].

    Raises `InputError` for logits in another dtype, which are another model's.
    """
    from dsv3_plugin.megatron_backend.log_probs import log_probs

    return log_probs(logits, labels)


def through_mbridge(build: Callable[[Any], None]) -> Callable[[Any], None]:
    """verl's `MegatronEngine._build_tf_config`, which chooses the bridge that builds a model.

    It raises `EngineError` for Megatron-Bridge, verl's default, which would build a model of its own.
    """

    @wraps(build)
    def checked(engine: Any) -> None:
        if not engine.engine_config.vanilla_mbridge:
            raise EngineError(
                "Megatron-Bridge builds its own model: set actor_rollout_ref.actor.megatron.vanilla_mbridge=True"
            )
        build(engine)

    return checked


install()
