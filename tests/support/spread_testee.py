"""The reference, on several ranks that each hold all of the model: for the suite's own part in layouts.

`SPREAD_TESTEE` makes rank 1 wrong.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from dsv3_plugin.conformance.layouts import RankOf
from dsv3_plugin.conformance.protocol import Case, Job, RequestResult, Served
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.reference import ReferenceTestee


class Spread(ReferenceTestee):
    name = "spread"

    def __init__(self, job: Job, rank: RankOf | None = None) -> None:
        super().__init__(job)
        self.rank = rank
        self.how = os.environ.get("SPREAD_TESTEE") if rank is not None and rank.rank == 1 else None
        if self.how == "one ulp":
            weight: Any = self.model.lm_head.weight
            weight[0, 0] = torch.nextafter(weight[0, 0].float(), torch.tensor(9.0)).to(weight.dtype) * 1.01

    def served(self) -> Served:
        served = super().served()
        return served.model_copy(update={"model_class": "other.Model"}) if self.how == "another class" else served

    def run(self, case: Case) -> program.Outcome:
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("SPREAD_TESTEE") == "declines" and case.name == "decode":
            return program.Outcome.declined(case, "no decode over stages")
        outcome = super().run(case)
        outcome.specification = None
        assert self.rank is not None
        if self.how == "another token":
            first = outcome.requests[0]
            outcome.requests[0] = first.model_copy(update={"token_ids": (*first.token_ids[:-1], 3)})
        nothing = RequestResult(token_ids=(), num_cached_tokens=0)
        position = [i for requests in case.single_rounds for i in range(len(requests))]
        outcome.requests = [r if self.rank.has(i) else nothing for i, r in zip(position, outcome.requests, strict=True)]
        return outcome


if __name__ == "__main__":
    program.main(Spread, Spread)
