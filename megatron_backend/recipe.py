"""What the DeepSeek-V3 report changes in the course of pre-training (section 4.2), over 14.8 trillion tokens.

Megatron's own schedules know the learning rate and the size of the batch. Two settings it reads from the model's
configuration at each step, so a training script sets them there (`follow`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv3_plugin.errors import EngineError

_TOKENS = 14.8
LR_DECAY_BEGINS = 10.0 / _TOKENS
"""Share of a run after which the learning rate falls, along a cosine."""
LR_DECAY_ENDS = 14.3 / _TOKENS
MTP_LOSS_FACTOR = 0.3
"""The weight of the MTP loss to begin with."""
_MTP_LOSS_FALLS = 10.0 / _TOKENS
_BIAS_STOPS = 14.3 / _TOKENS


def follow(config: Any, progress: float, bias_update_rate: float) -> None:
    """Set what changes: the MTP loss is weighed with 0.3, then 0.1; the bias moves at its rate, then rests.

    Args:
        config: the model's `TransformerConfig`, changed in place.
        progress: the share of the run's samples that are done, 0 to 1.
        bias_update_rate: the rate while the bias moves; the report's is 0.001.
    """
    config.mtp_loss_scaling_factor = MTP_LOSS_FACTOR if progress < _MTP_LOSS_FALLS else 0.1
    config.moe_router_bias_update_rate = bias_update_rate if progress < _BIAS_STOPS else 0.0


def batch_size_schedule(rampup: Sequence[int] | None, global_batch_size: int) -> str:
    """Megatron's `step_batch_size_schedule` for its older `--rampup-batch-size`, which it ignores since 0.19.

    `rampup` is START, INCREMENT and SAMPLES: batches grow by equal steps to the global size over so many samples.
    Raises `EngineError` where the steps do not end there.
    """
    if rampup is None:
        return f"0:{global_batch_size}"
    start, increment, samples = rampup
    steps, rest = divmod(global_batch_size - start, increment) if increment > 0 else (0, 1)
    if rest or steps < 1 or samples < steps:
        raise EngineError(
            f"--rampup-batch-size {start} {increment} {samples}: batches cannot grow from {start} by {increment} to"
            f" {global_batch_size} over {samples} samples"
        )
    return " ".join(f"{-(-samples * step // steps)}:{start + step * increment}" for step in range(steps + 1))
