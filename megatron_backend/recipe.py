"""The course of DeepSeek-V3's pre-training (report, section 4.2), scaled to a run of any length.

The report says when things change in tokens of its 14.8 trillion. A run of N samples has each change at the same share
of N, rounded up to a sample: a step whose first sample is that one or a later one is the first of the new phase.
Megatron counts a run in samples, too. Only the warm-up of 2,000 steps and the batches that grow need a translation:

* The warm-up lasts for the share of tokens that the report's first 2,000 steps had, at 3,072 sequences of 4,096 tokens.
* The report's batches grow from 3,072 to 15,360 sequences over 469 billion tokens, and it does not say by which steps.
  Here they grow by fifths of the last batch, over equal numbers of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_plugin.errors import EngineError

_TOKENS = 14_800_000_000_000
_WARMUP = 2_000 * 3_072 * 4_096
_BATCHES_GROW = 469_000_000_000
_DECAY_BEGINS = 10_000_000_000_000
_DECAY_ENDS = 14_300_000_000_000
_LAST_RATE = 14_633_000_000_000
_BATCH_STEPS = 5

MTP_LOSS_FACTOR = 0.3
"""The weight of the MTP loss to begin with."""
_LATER_MTP_LOSS_FACTOR = 0.1

SETTINGS: Mapping[str, Any] = {
    "lr": 2.2e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "init_method_std": 0.006,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
    "seq_length": 4096,
}
"""What the report says once for all, by the names of Megatron's arguments."""


@dataclass(frozen=True)
class Course:
    """When what changes, in a run of `samples`, whose learning rate is at most `peak`."""

    samples: int
    peak: float = SETTINGS["lr"]

    def __post_init__(self) -> None:
        """Raises `EngineError` for a run without samples."""
        if self.samples < 1:
            raise EngineError(f"a run of {self.samples} samples has no course: give more")

    def _after(self, tokens: int) -> int:
        """The first sample after so many of the report's tokens."""
        return -(-self.samples * tokens // _TOKENS)

    @property
    def warmup(self) -> int:
        """Samples over which the learning rate rises from 0."""
        return self._after(_WARMUP)

    @property
    def decay_begins(self) -> int:
        """From here on the learning rate falls along a cosine, and MTP's loss is weighed with 0.1."""
        return self._after(_DECAY_BEGINS)

    @property
    def decay_ends(self) -> int:
        """From here on the learning rate is a tenth of its peak, and the router's bias rests."""
        return self._after(_DECAY_ENDS)

    @property
    def last_rate_begins(self) -> int:
        """From here on the learning rate is 7.3 of 220 parts of its peak."""
        return self._after(_LAST_RATE)

    def learning_rate(self, consumed: int) -> float:
        """Of the step that follows `consumed` samples."""
        low = self.peak * 2.2e-5 / 2.2e-4
        if consumed >= self.last_rate_begins:
            return self.peak * 7.3e-6 / 2.2e-4
        if consumed >= self.decay_ends:
            return low
        if consumed >= self.decay_begins:
            share = (consumed - self.decay_begins) / (self.decay_ends - self.decay_begins)
            return low + (self.peak - low) * (1 + math.cos(math.pi * share)) / 2
        return self.peak * min(1.0, consumed / self.warmup)

    def mtp_loss_factor(self, consumed: int) -> float:
        """Of the step that follows `consumed` samples."""
        return MTP_LOSS_FACTOR if consumed < self.decay_begins else _LATER_MTP_LOSS_FACTOR

    def bias_update_rate(self, consumed: int, rate: float) -> float:
        """Of the step that follows `consumed` samples; `rate` while the bias moves, 0.001 in the report."""
        return rate if consumed < self.decay_ends else 0.0

    def batches(self, largest: int) -> list[tuple[int, int]]:
        """(first sample, sequences) of each batch size. Raises `EngineError` if `largest` has no whole fifths, or the
        run too few samples for them.
        """
        start, rest = divmod(largest, _BATCH_STEPS)
        if rest or start < 1:
            raise EngineError(
                f"the report's batches grow by fifths: global_batch_size={largest} is no multiple of 5 above zero"
            )
        if self._after(_BATCHES_GROW) < _BATCH_STEPS - 1:
            enough = (_BATCH_STEPS - 2) * _TOKENS // _BATCHES_GROW + 1
            raise EngineError(
                f"the report's batches grow in the first {_BATCHES_GROW / _TOKENS:.1%} of a run, in {_BATCH_STEPS - 1}"
                f" steps: {self.samples} samples are too few for them, {enough} are enough"
            )
        return _growing(start, start, self._after(_BATCHES_GROW), largest)

    def follow(self, config: Any, consumed: int, bias_update_rate: float) -> None:
        """Set what Megatron reads from the model's `TransformerConfig` at each step, for the one after `consumed`."""
        config.mtp_loss_scaling_factor = self.mtp_loss_factor(consumed)
        config.moe_router_bias_update_rate = self.bias_update_rate(consumed, bias_update_rate)

    def described(self, largest: int, bias_update_rate: float) -> Iterator[str]:
        """Lines for a person: what is so from which step and sample on."""
        batches = self.batches(largest)
        changes = {sample: f"batch {size}" for sample, size in batches}
        rates = self.warmup, self.decay_begins, self.decay_ends, self.last_rate_begins
        for sample in (0, *rates, self.samples):
            changes.setdefault(sample, "")
        for sample in sorted(changes):
            step, first = step_at(sample, batches)
            if sample == self.samples:
                yield f"step {step:>9,} | sample {first:>13,} | end"
                return
            parts = (
                f"lr {self.learning_rate(first):.3e}" + _way(first, self),
                f"MTP {self.mtp_loss_factor(first)}",
                f"bias {self.bias_update_rate(first, bias_update_rate)}",
                changes[sample],
            )
            yield f"step {step:>9,} | sample {first:>13,} | {', '.join(filter(None, parts))}"


def _way(consumed: int, course: Course) -> str:
    if consumed < course.warmup:
        return " rising"
    return " falling" if course.decay_begins <= consumed < course.decay_ends else ""


def step_at(sample: int, batches: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(step, its first sample) of the first step that begins at `sample` or later, counted from 0."""
    step = consumed = 0
    for (_, size), (end, _) in zip(batches, [*batches[1:], (sample, 0)], strict=True):
        steps = max(0, -(-(min(end, sample) - consumed) // size))
        step, consumed = step + steps, consumed + steps * size
    return step, consumed


def _growing(start: int, increment: int, samples: int, largest: int) -> list[tuple[int, int]]:
    """By equal steps, over equal numbers of samples. Raises `EngineError` where they do not end at `largest`."""
    steps, rest = divmod(largest - start, increment) if increment > 0 else (0, 1)
    if rest or steps < 1 or start < 1:
        raise EngineError(
            f"batches cannot grow from {start} by {increment} to {largest}: the increment must divide the difference"
        )
    if samples < steps:
        raise EngineError(
            f"batches cannot grow from {start} by {increment} to {largest} over {samples} samples: {steps} at least"
        )
    return [(-(-samples * step // steps), start + step * increment) for step in range(steps + 1)]


def batch_size_schedule(rampup: Sequence[int] | None, global_batch_size: int) -> str:
    """Megatron's `step_batch_size_schedule` for its older `--rampup-batch-size`, which it ignores since 0.19.

    `rampup` is START, INCREMENT and SAMPLES: batches grow by equal steps to the global size over so many samples.
    Raises `EngineError` where the steps do not end there.
    """
    if rampup is None:
        return f"0:{global_batch_size}"
    start, increment, samples = rampup
    batches = _growing(start, increment, samples, global_batch_size)
    return " ".join(f"{sample}:{size}" for sample, size in batches)
