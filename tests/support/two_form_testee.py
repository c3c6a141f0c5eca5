"""A testee of the suite with something of the `two_form` profile wrong, or with little room: `python two_form_testee.py
NAME WHAT... JOB_DIR RESULT_DIR`, where NAME is that of a testee's module.

`schedule` takes for prompts' all rows of a request that has several in a pass, `phase` all of a request that begins in
its prompt. `sent_back` lets the engine send requests back, to be computed again with what they have generated: for want
of room, and SGLang, which sees to it that there is room, every tenth pass. `shared` lets vLLM's prompts find pages with
generated tokens.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from dsv3_plugin.conformance.protocol import Case
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.ops.prompt_batch import PromptBatch

ROOM = 7 * 32


def by_schedule(batch: PromptBatch) -> tuple[int, ...]:
    counts = batch.query_start_loc.diff().tolist()
    return tuple(count if count > 1 else 0 for count in counts)


def by_phase(batch: PromptBatch) -> tuple[int, ...]:
    counts = batch.query_start_loc.diff().tolist()
    requests = zip(counts, batch.first_positions, batch.prompt_lens, strict=True)
    return tuple(count if first < prompt else 0 for count, first, prompt in requests)


def few_pages(testee: Any) -> None:
    """Of vLLM, and say how often it sent a request back."""
    import vllm

    make, run = vllm.LLM, testee.run

    def make_with_few(**arguments: Any) -> Any:
        few = {"max_model_len": 128, "num_gpu_blocks_override": ROOM // arguments["block_size"] + 1}
        return make(**arguments | few)

    def run_and_tell(self: Any, case: Case) -> program.Outcome:
        outcome = run(self, case)
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        print(f"sent back: {metrics['vllm:num_preemptions'].value}")
        return outcome

    vllm.LLM, testee.run = make_with_few, run_and_tell


def retract() -> None:
    """As SGLang's own tests do; it says so in its log."""
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, 10


def share_pages() -> None:
    from vllm.v1.core import kv_cache_utils

    from dsv3_plugin.vllm_backend import engine

    engine.install()
    kv_cache_utils.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__


def main() -> None:
    name, words = sys.argv[1], sys.argv[2:-2]
    module = import_module(f"dsv3_plugin.conformance.testees.{name}")
    testee = getattr(module, f"{name.capitalize()}Testee")
    if "schedule" in words:
        PromptBatch.prompt_counts = property(by_schedule)  # type: ignore[assignment]
    if "phase" in words:
        PromptBatch.prompt_counts = property(by_phase)  # type: ignore[assignment]
    if "shared" in words:
        share_pages()
    if "sent_back" in words:
        few_pages(testee) if name == "vllm" else retract()
    sys.argv[1:] = sys.argv[-2:]
    program.main(testee)


if __name__ == "__main__":
    main()
