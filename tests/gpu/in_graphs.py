"""Whether an engine prints in CUDA graphs what it prints without: rows of logits and tokens of one batch, with and
without drafts, and the time of a step; and whether its graphs go on with new weights after an update.

    python tests/gpu/in_graphs.py vllm|sglang CHECKPOINT [--drafts N] [--from OTHER]
                                                                # on a Hopper card, in the engine's environment

Without --drafts: with none, and with two. With --from one more engine starts on the checkpoint OTHER, answers in
graphs, and is updated to CHECKPOINT. Each engine is built in a process of its own. Prints one line an engine and one a
comparison; exits with 1 if a bit differs, if no pass ran in a graph, or if the update changed nothing.
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


class Engine(NamedTuple):
    """An engine that was built, and what its passes leave behind."""

    generate: Callable[[], list[tuple[int, ...]]]
    """Answer all prompts once, greedily."""
    rows: list[torch.Tensor]
    """Logits of each pass, in order."""
    eager_passes: list[int]
    """The passes among them that ran Python."""
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
    model = runner.get_model()
    rows: list[torch.Tensor] = []
    eager_passes: list[int] = []
    forward, compute_logits = model.forward, model.compute_logits

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        eager_passes.append(len(rows))
        return forward(*args, **kwargs)

    def watched_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(compute_logits(*args, **kwargs).clone())
        return rows[-1]

    model.forward, model.compute_logits = watched_forward, watched_logits
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]

    def generate() -> list[tuple[int, ...]]:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

    def update(checkpoint: str) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})
        llm.reset_prefix_cache()

    return Engine(generate, rows, eager_passes, update)


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
    rows: list[torch.Tensor] = []
    eager_passes: list[int] = []
    runner = scheduler.tp_worker.model_runner
    forward = runner.forward

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if not output.can_run_graph:
            eager_passes.append(len(rows))
        rows.append(output.logits_output.next_token_logits.clone())
        return output

    runner.forward = watched_forward
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

    return Engine(generate, rows, eager_passes, update)


ENGINES = {"vllm": vllm, "sglang": sglang}


def run(name: str, mode: str, drafts: int, checkpoint: str, start: str, to: Path) -> None:
    """Answer the prompts, keep what was printed, and answer them again for the time of a step."""
    engine = ENGINES[name](start, mode != "eager", drafts)
    if mode == "updated":
        old = engine.generate()
        engine.update(checkpoint)
        engine.rows.clear()
        engine.eager_passes.clear()
    answer = engine.generate()
    if mode == "updated":
        assert answer != old, "the update changed nothing"
    passes, eager = len(engine.rows), len(set(engine.eager_passes))
    torch.save({"answer": answer, "rows": [row.cpu() for row in engine.rows], "in_graphs": passes - eager}, to)
    began = time.perf_counter()
    assert engine.generate() == answer, "the second answer is another one"
    milliseconds = (time.perf_counter() - began) / (len(engine.rows) - passes) * 1e3
    print(
        f"{name} {mode}, {drafts} drafts: {passes - eager} of {passes} passes in graphs, {milliseconds:.2f} ms a step"
    )
    sys.stdout.flush()
    os._exit(0)  # engines keep threads


def compare(what: str, eager: dict[str, Any], graphs: dict[str, Any]) -> bool:
    """Print whether all rows and tokens are equal, and whether a graph ran."""
    pairs = list(zip(eager["rows"], graphs["rows"], strict=False))
    wrong = sum(int((a.view(torch.int32) != b.view(torch.int32)).any(-1).sum()) for a, b in pairs if a.shape == b.shape)
    alike = [a.shape for a in eager["rows"]] == [b.shape for b in graphs["rows"]]
    rows = sum(len(a) for a in eager["rows"])
    print(
        f"{what}: {wrong} of {rows} rows of logits differ; passes alike: {alike};"
        f" tokens equal: {eager['answer'] == graphs['answer']}; {graphs['in_graphs']} passes ran in graphs"
    )
    return not wrong and alike and eager["answer"] == graphs["answer"] and graphs["in_graphs"] > 0


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
