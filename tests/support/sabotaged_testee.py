"""A reference testee with one thing wrong: `python sabotaged_testee.py SABOTAGE JOB_DIR RESULT_DIR`.

`ulp:MODULE` moves one output of a module of `DeepseekV3Model` by one ulp, `provider:OPERATION` one of an operation, by
another provider's kernel, `weight:PARAMETER` one weight; `tile:ROWS` runs the CPU's products on other
tiles; `page` replaces the newest cached token by the oldest; `tokens:N` answers another N-th token from the end (1);
`silent` leaves a row out; `log_of_softmax` answers log-probabilities that are rounded otherwise; `seed` draws by other
random numbers each time; `foreign` is right, and serves another company's model; `schedule` takes for prompts' all rows
of a request that has several in a pass; `shared` lets prompts find pages with generated tokens; `far` claims closeness
and scales its logits by ARGUMENT; `crash` raises.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import torch
from stale_page import read_stale
from wrong_kernel import wrong_kernel

from dsv3_plugin import registry
from dsv3_plugin.conformance import sampling
from dsv3_plugin.conformance.protocol import Case, Job, Served
from dsv3_plugin.conformance.testees import program, reference
from dsv3_plugin.conformance.testees.reference import ReferenceTestee
from dsv3_plugin.ops import tile
from dsv3_plugin.ops.prompt_batch import PromptBatch

SABOTAGE, _, ARGUMENT = sys.argv.pop(1).partition(":")


def bump(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
    """The first output of the pass, one representable number further from zero."""
    bits = output.clone().view({2: torch.int16, 4: torch.int32}[output.element_size()])
    bits[0, 0] += 1
    return bits.view(output.dtype)


def by_schedule(batch: PromptBatch) -> tuple[int, ...]:
    """As engines tell prefill from decode."""
    counts = batch.query_start_loc.diff().tolist()
    return tuple(count if count > 1 else 0 for count in counts)


class SabotagedTestee(ReferenceTestee):
    name = "sabotaged"

    def __init__(self, job: Job) -> None:
        if SABOTAGE == "crash":
            raise RuntimeError("sabotaged on purpose")
        if SABOTAGE == "tile":
            tile.ROWS = int(ARGUMENT)
        if SABOTAGE == "log_of_softmax":
            sampling.processed_logprobs = lambda logits, temperature: (logits / temperature).softmax(-1).log()
        if SABOTAGE == "seed":
            seeds = itertools.count()

            def draw(logits: torch.Tensor, request: Any, token_ids: Any) -> Any:
                return sampling.next_token(logits, request.model_copy(update={"seed": next(seeds)}), token_ids)

            reference.next_token = draw
        if SABOTAGE == "provider":
            offered = registry.offered_kernels()
            registry.offered_kernels = lambda: [*offered, wrong_kernel(ARGUMENT)]
            os.environ[registry.MODE_VARIABLE] = "fast"
        if SABOTAGE == "schedule":
            PromptBatch.prompt_counts = property(by_schedule)
        if SABOTAGE == "shared":
            reference.Engine.shared_prefix = lambda engine, sequence: sequence.token_ids[: sequence.num_computed]
        super().__init__(job)
        if SABOTAGE == "weight":
            weight = self.model.get_parameter(ARGUMENT)
            weight.data = bump(None, None, weight.data)
        if SABOTAGE == "far":
            self.claim = "closeness"
            self.model.lm_head.register_forward_hook(lambda module, args, logits: logits * float(ARGUMENT))
        if SABOTAGE == "ulp":
            self.model.model.get_submodule(ARGUMENT).register_forward_hook(bump, prepend=True)
        if SABOTAGE == "page":
            read_stale(self.ops)

    def served(self) -> Served:
        served = super().served()
        if SABOTAGE != "foreign":
            return served
        return served.model_copy(update={"model_class": "acme.models.Model", "profile": "acme", "kernels": {}})

    def run(self, case: Case) -> program.Outcome:
        outcome = super().run(case)
        if SABOTAGE == "tokens":
            first = outcome.requests[0]
            wrong = list(first.token_ids)
            wrong[-int(ARGUMENT or 1)] ^= 1
            outcome.requests[0] = first.model_copy(update={"token_ids": tuple(wrong)})
        if SABOTAGE == "silent":
            recorder = outcome.recorder
            recorder._keys["logits"].pop()
            recorder._values["logits"][-1] = recorder._values["logits"][-1][:-1]
        return outcome


if __name__ == "__main__":
    program.main(SabotagedTestee)
