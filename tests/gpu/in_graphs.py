"""Whether an engine prints in CUDA graphs what it prints without: tokens and rows of one batch, with and without
drafts, and the time of a step; and whether its graphs go on with new weights after an update. Rows are logits, and of
SGLang's draft its hidden states behind a verification.

    python tests/gpu/in_graphs.py vllm|sglang CHECKPOINT [--drafts N] [--from OTHER]
                                                                # on a Hopper card, in the engine's environment

Without --drafts: with none, and with two. With --from one more engine starts on the checkpoint OTHER, answers in
graphs, and is updated to CHECKPOINT. Each engine is built in a process of its own. Prints one line an engine and one a
comparison; exits with 1 if a bit differs, if no pass of the model or none of its draft ran in a graph, or if the update
changed nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

PROMPTS = tuple(tuple(range(100 * i + 5, 100 * i + 5 + n)) for i, n in enumerate((7, 33, 64, 3, 120, 1, 17)))
MAX_TOKENS = 48
CONTEXT = 512


class Passes:
    """What the passes of an engine leave behind, in order."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self.parts: list[str] = []
        """The model's, or its draft's."""
        self.eager: set[int] = set()
        """Numbers of those that ran Python."""

    def ran_python(self) -> None:
        """In the pass whose rows come next."""
        self.eager.add(len(self.rows))

    def left(self, part: str, rows: torch.Tensor) -> None:
        """A pass is over."""
        self.rows.append(rows.float())
        self.parts.append(part)

    def in_graphs(self) -> dict[str, int]:
        """Of each part."""
        return {
            part: sum(each == part and number not in self.eager for number, each in enumerate(self.parts))
            for part in sorted(set(self.parts))
        }

    def forget(self) -> None:
        """All of them."""
        for kept in self.rows, self.parts, self.eager:
            kept.clear()


class Engine(NamedTuple):
    """An engine that was built."""

    generate: Callable[[], list[tuple[int, ...]]]
    """Answer all prompts once, greedily."""
    passes: Passes
    update: Callable[[str], None]
    """Take the weights of another checkpoint, and forget what was cached of the old ones."""


def vllm(checkpoint: str, in_graphs: bool, drafts: int) -> Engine:
    """vLLM as it starts by default, or eager."""
    from vllm import LLM, SamplingParams

    speculative = {"speculative_config": {"method": "mtp", "num_speculative_tokens": drafts}} if drafts else {}
    llm = LLM(
        checkpoint,
        max_model_len=CONTEXT,
        max_num_seqs=8,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        enforce_eager=not in_graphs,
        **speculative,
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    passes = Passes()

    def watch(part: str, model: Any) -> None:
        forward, compute_logits = model.model.forward, model.compute_logits

        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            passes.ran_python()
            return forward(*args, **kwargs)

        def watched_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute_logits(*args, **kwargs)
            passes.left(part, logits.clone())
            return logits

        model.model.forward, model.compute_logits = watched_forward, watched_logits

    watch("model", runner.get_model())
    if drafts:
        watch("draft", runner.drafter.model)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]

    def generate() -> list[tuple[int, ...]]:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

    def update(checkpoint: str) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})
        llm.reset_prefix_cache()

    return Engine(generate, passes, update)


def sglang(checkpoint: str, in_graphs: bool, drafts: int) -> Engine:
    """SGLang's scheduler with this package's attention backend, in graphs as by default, or eager."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from dsv3_plugin.conformance.protocol import Request
    from dsv3_plugin.conformance.testees.sglang import build_scheduler, server_arguments, steps, tokenized_request

    graphs = {"cuda_graph_max_bs_decode": 8} if in_graphs else {"disable_cuda_graph": True}
    arguments = server_arguments(checkpoint, "cuda", drafts, **graphs)
    with torch.inference_mode(False), torch.no_grad():
        scheduler = build_scheduler(arguments)
    passes = Passes()
    runner = scheduler.tp_worker.model_runner
    forward = runner.forward

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if not output.can_run_graph:
            passes.ran_python()
        passes.left("model", output.logits_output.next_token_logits.clone())
        return output

    runner.forward = watched_forward
    if drafts:
        _watch_draft(scheduler.draft_worker.draft_worker, passes)
    number = 0

    def generate() -> list[tuple[int, ...]]:
        nonlocal number
        assert scheduler.flush_cache(), "SGLang did not empty its cache"
        requests = [Request(prompt_token_ids=prompt, max_tokens=MAX_TOKENS) for prompt in PROMPTS]
        scheduler.process_input_requests(
            [tokenized_request(number + i, request, False) for i, request in enumerate(requests)]
        )
        number += len(requests)
        live = list(scheduler.waiting_queue)
        for _ in steps(scheduler):
            pass
        return [tuple(request.output_ids_through_stop) for request in live]

    def update(checkpoint: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        with torch.inference_mode(False), torch.no_grad():
            done = scheduler.weight_updater.update_weights_from_disk(
                UpdateWeightFromDiskReqInput(model_path=checkpoint, load_format="auto")
            )
        assert done.success, done.message

    return Engine(generate, passes, update)


def _watch_draft(worker: Any, passes: Passes) -> None:
    """Of SGLang, in its pass over what was verified."""
    extend, graphs = worker._draft_extend_for_decode, worker.cuda_graph_runner_for_draft_extend
    replayed = False

    def watched_extend(batch: Any, result: Any) -> None:
        nonlocal replayed
        replayed = False
        extend(batch, result)
        if not replayed:
            passes.ran_python()
        passes.left("draft", result.next_draft_input.hidden_states.clone())

    worker._draft_extend_for_decode = watched_extend
    if graphs is None:
        return
    execute = graphs.execute

    def watched_execute(*args: Any, **kwargs: Any) -> Any:
        nonlocal replayed
        replayed = True
        return execute(*args, **kwargs)

    graphs.execute = watched_execute


ENGINES = {"vllm": vllm, "sglang": sglang}


def run(name: str, mode: str, drafts: int, checkpoint: str, start: str, to: Path) -> None:
    """Answer the prompts, keep what was printed, and answer them again for the time of a step."""
    engine = ENGINES[name](start, mode != "eager", drafts)
    if mode == "updated":
        old = engine.generate()
        engine.update(checkpoint)
        engine.passes.forget()
    answer = engine.generate()
    if mode == "updated":
        assert answer != old, "the update changed nothing"
    passes, in_graphs = len(engine.passes.rows), engine.passes.in_graphs()
    torch.save({"answer": answer, "rows": [row.cpu() for row in engine.passes.rows], "in_graphs": in_graphs}, to)
    began = time.perf_counter()
    assert engine.generate() == answer, "the second answer is another one"
    steps = engine.passes.parts[passes:].count("model")
    milliseconds = (time.perf_counter() - began) / steps * 1e3
    told = ", ".join(f"{count} of the {part}" for part, count in in_graphs.items())
    print(f"{name} {mode}, {drafts} drafts: of {passes} passes in graphs {told}; {milliseconds:.2f} ms a step")
    sys.stdout.flush()
    os._exit(0)  # engines keep threads


def compare(what: str, eager: dict[str, Any], graphs: dict[str, Any]) -> bool:
    """Print whether all rows and tokens are equal, and whether graphs ran."""
    pairs = list(zip(eager["rows"], graphs["rows"], strict=False))
    wrong = sum(int((a.view(torch.int32) != b.view(torch.int32)).any(-1).sum()) for a, b in pairs if a.shape == b.shape)
    alike = [a.shape for a in eager["rows"]] == [b.shape for b in graphs["rows"]]
    rows = sum(len(a) for a in eager["rows"])
    print(
        f"{what}: {wrong} of {rows} rows differ; passes alike: {alike};"
        f" tokens equal: {eager['answer'] == graphs['answer']}; passes in graphs: {graphs['in_graphs']}"
    )
    return not wrong and alike and eager["answer"] == graphs["answer"] and all(graphs["in_graphs"].values())


def main(name: str, checkpoint: str, drafts_each: list[int], other: str | None) -> bool:
    """All modes, with each number of drafts."""
    equal = True
    starts = {"eager": checkpoint, "graphs": checkpoint} | ({"updated": other} if other else {})
    with tempfile.TemporaryDirectory() as folder:
        for drafts in drafts_each:
            printed = {}
            for mode, start in starts.items():
                file = Path(folder, f"{mode}-{drafts}.pt")
                command = [sys.executable, __file__, name, checkpoint, "--drafts", str(drafts)]
                subprocess.run([*command, "--child", mode, start, str(file)], check=True)
                printed[mode] = torch.load(file)
            eager = printed.pop("eager")
            for mode, rows in printed.items():
                equal &= compare(f"{name} {mode}, {drafts} drafts", eager, rows)
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("checkpoint")
    parser.add_argument("--drafts", type=int, action="append")
    parser.add_argument("--from", dest="other")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        mode, start, file = given.child
        run(given.engine, mode, given.drafts[0], given.checkpoint, start, Path(file))
    sys.exit(0 if main(given.engine, given.checkpoint, given.drafts or [0, 2], given.other) else 1)
