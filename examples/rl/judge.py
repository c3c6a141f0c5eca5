"""The reward of a model: how likely an answer is right, in the eyes of one that has learned to judge answers.

The judge is of the policy's architecture and writes `+` or `-` behind a problem and its answer; sample.py and sft.py
make one. Its reward is the probability of `+`. For tasks without a rule (DeepSeek-V3's report, arXiv:2412.19437,
section 5.2.1); beside a rule the two are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rollout import Sample, with_advantages
from task import RIGHT, Words
from trainer import Trainer, pack


class Judge:
    """Its weights beside the policy's, in the trainer."""

    def __init__(self, trainer: Trainer, folder: Path, words: Words) -> None:
        self.trainer = trainer
        self.weights = trainer.weights_of(folder)
        self.end = words.end
        self.mark = words.ids(RIGHT)

    def graded(self, samples: Sequence[Sample], *, with_rule: bool, micro_batch_size: int | None) -> list[Sample]:
        """With its rewards, added to those of the rule or in their place. An answer that does not end gets none.

        A pass has `micro_batch_size` answers, or all of them.
        """
        ended = [i for i, sample in enumerate(samples) if sample.group is not None and sample.tokens[-1:] == [self.end]]
        size = micro_batch_size or max(1, len(ended))
        found: dict[int, float] = {}
        with self.trainer.holding(self.weights):
            for part in (ended[first : first + size] for first in range(0, len(ended), size)):
                packed = pack([([*samples[i].prompt, *samples[i].tokens[:-1]], self.mark, 1.0) for i in part])
                found |= zip(part, self.trainer.log_probs(packed).exp().tolist(), strict=True)
        rewards = [with_rule * sample.reward + found.get(i, 0.0) for i, sample in enumerate(samples)]
        return with_advantages([replace(s, reward=reward) for s, reward in zip(samples, rewards, strict=True)])
