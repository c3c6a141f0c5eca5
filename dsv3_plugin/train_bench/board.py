"""What the answers of a run say: speed, memory, and how far losses are apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from dsv3_plugin.train_bench.protocol import End, Job, Start, Step

WINDOWS = 10
"""Into which the steps are divided. Losses are compared by their means over a window; the first, where the learning
rate rises, is left out.
"""


class Record(BaseModel):
    """A contender, and what it said."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    name: str
    job: Job
    start: Start | None = None
    steps: tuple[Step, ...] = ()
    end: End | None = None
    failure: str | None = None
    """Why it ended early."""

    def step_seconds(self) -> tuple[float, float, float]:
        """Median, 10th and 90th percentile, the first window left out, in which kernels are compiled."""
        times = [step.seconds for step in self.steps[max(1, len(self.steps) // WINDOWS) :]]
        if len(times) < 2:
            times = [step.seconds for step in self.steps] * 2
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        return statistics.median(times), deciles[0], deciles[-1]

    @property
    def losses(self) -> list[float]:
        """Of the steps."""
        return [step.loss for step in self.steps]


class Board(BaseModel):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    date: str
    model: str
    """In words."""
    tokens: int
    """Of a step."""
    steps: int
    records: tuple[Record, ...]

    def record(self, name: str) -> Record | None:
        """Of a contender that made all its steps."""
        return next((each for each in self.records if each.name == name and len(each.steps) == self.steps), None)

    @property
    def rehearsal(self) -> bool:
        """Whether it ran on a machine without GPU, where times mean nothing."""
        return any(record.start is not None and record.start.device == "cpu" for record in self.records)

    def fastest_of_theirs(self) -> Record | None:
        """Of Megatron's own layers in FP8."""
        found = [record for name in ("te", "te-plain") if (record := self.record(name)) is not None]
        return min(found, key=lambda record: record.step_seconds()[0], default=None)


def relative_losses(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of each window but the first: how much larger its mean loss is, over the other's. Both are of the same steps."""
    size = max(1, len(losses) // WINDOWS)
    starts = range(size, len(losses) - size + 1, size)
    return [
        statistics.fmean(losses[start : start + size]) / statistics.fmean(others[start : start + size]) - 1
        for start in starts
    ]
