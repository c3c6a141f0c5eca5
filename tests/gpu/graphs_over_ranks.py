"""Whether an engine on several cards, in CUDA graphs over peer memory, answers what it answers on one card without.

    python tests/gpu/graphs_over_ranks.py vllm|sglang CHECKPOINT [LAYOUT ...]  # on Hopper cards, in its environment

Layouts are tp=2 and dp=2,ep=2 by default; any tp=N, or dp=N,ep=N. The sizes of the checkpoint must have equal parts.
Compares tokens, and the log-probabilities of the likeliest ones, which tell of their logits. Prints one line a layout,
and exits with 1 if one differs, or if an engine said that it records no graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # data-parallel ranks step together in processes of their own

from in_graphs import CONTEXT, MAX_TOKENS, PROMPTS

Answers = list[list[Any]]
"""Of each prompt the tokens, and of each of them the likeliest tokens with their log-probabilities."""

LIKELIEST = 5
SECONDS = 400
"""That the processes of a layout have."""
OVER_PEERS = "ranks write into each other's memory"
WITHOUT_GRAPHS = "without CUDA graphs"


def vllm(checkpoint: str, tp: int, dp: int, prompts: list[list[int]], eager: bool) -> Answers:
    """Of one data-parallel rank, which is this process."""
    return vllm_answers(vllm_engine(checkpoint, tp, enforce_eager=eager, enable_expert_parallel=dp > 1), prompts)


def vllm_engine(checkpoint: str, tp: int, **options: Any) -> Any:
    """An `LLM`, which tells of log-probabilities as a trainer computes them."""
    from vllm import LLM

    return LLM(
        checkpoint,
        tensor_parallel_size=tp,
        max_model_len=CONTEXT,
        max_num_seqs=8,
        gpu_memory_utilization=0.5,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        logprobs_mode="processed_logprobs",
        **options,
    )


def vllm_answers(llm: Any, prompts: list[list[int]]) -> Answers:
    """Of this process's prompts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, logprobs=LIKELIEST)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [
        [list(answer.token_ids), [sorted((i, x.logprob) for i, x in row.items()) for row in answer.logprobs]]
        for answer in (output.outputs[0] for output in outputs)
    ]


def sglang(checkpoint: str, tp: int, dp: int, prompts: list[list[int]], eager: bool) -> Answers:
    """Of all ranks."""
    import sglang
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from dsv3_plugin.conformance.testees.sglang import server_arguments

    graphs = {"disable_cuda_graph": True} if eager else {"cuda_graph_max_bs_decode": 8}
    spread = {"dp_size": dp, "ep_size": dp, "enable_dp_attention": True} if dp > 1 else {}
    engine = sglang.Engine(server_args=server_arguments(checkpoint, "cuda", 0, tp_size=tp * dp, **graphs, **spread))
    params = {"temperature": 0, "max_new_tokens": MAX_TOKENS, "ignore_eos": True}
    outputs = engine.generate(
        input_ids=prompts, sampling_params=params, return_logprob=True, top_logprobs_num=LIKELIEST
    )
    return [
        [
            output["output_ids"],
            [sorted((i, x) for x, i, _ in row) for row in output["meta_info"]["output_top_logprobs"]],
        ]
        for output in outputs
    ]


def answer(engine: str, checkpoint: str, layout: str, log: Path) -> tuple[Answers, str]:
    """Of all prompts, and what was logged. `one` is one card, without graphs."""
    sizes = dict(part.split("=") for part in layout.split(",")) if layout != "one" else {}
    tp, dp = int(sizes.get("tp", 1)), int(sizes.get("dp", 1))
    processes = dp if engine == "vllm" else 1
    command = [sys.executable, __file__, engine, checkpoint, "--child", str(tp), str(dp)]
    starts = []
    for rank in range(processes):
        own = str(rank), str(log.with_suffix(f".{rank}")), str(int(layout == "one"))
        starts.append(([*command, *own], os.environ | (vllm_place(rank, dp) if processes > 1 else {})))
    logged = run_together(f"{engine} {layout}", starts, log)
    of_ranks = [json.loads(log.with_suffix(f".{rank}").read_text()) for rank in range(processes)]
    return [of_ranks[i % processes][i // processes] for i in range(len(PROMPTS))], logged


def run_together(name: str, starts: Sequence[tuple[list[str], dict[str, str]]], log: Path) -> str:
    """What processes logged, each of which has a command and an environment. Where one fails, or they take too long,
    all end, and with them engines, which outlive them: raises `SystemExit`.
    """
    with log.open("wb") as file:
        output: Any = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        children = [subprocess.Popen(command, env=environment, **output) for command, environment in starts]
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends and not any(now := [child.poll() for child in children]) and None in now:
            time.sleep(0.2)
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        statuses = [child.wait() for child in children]
    logged = log.read_text(errors="replace")
    if any(statuses):
        raise SystemExit(f"{name} ended with {statuses}:\n{logged[-6000:]}")
    return logged


def vllm_place(rank: int, dp: int) -> dict[str, str]:
    """What vLLM's data-parallel ranks read, a process each."""
    own = {"RANK": rank, "RANK_LOCAL": rank, "SIZE": dp, "MASTER_IP": "127.0.0.1", "MASTER_PORT": 29571}
    return {f"VLLM_DP_{name}": str(value) for name, value in own.items()}


def child(engine: str, checkpoint: str, tp: int, dp: int, rank: int, to: Path, eager: bool) -> None:
    """Answer, and leave: engines keep threads."""
    run, step = (vllm, dp) if engine == "vllm" else (sglang, 1)
    prompts = [list(prompt) for prompt in PROMPTS[rank::step]]
    to.write_text(json.dumps(run(checkpoint, tp, dp, prompts, eager)))
    sys.stdout.flush()
    if engine == "vllm" and dp > 1:
        time.sleep(5)  # the others' last passes need this rank
    os._exit(0)


def main(engine: str, checkpoint: str, layouts: list[str]) -> bool:
    """Whether all layouts answer as one card."""
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        alone, _ = answer(engine, checkpoint, "one", Path(folder, "one.log"))
        for layout in layouts:
            found, logged = answer(engine, checkpoint, layout, Path(folder, f"{layout}.log"))
            alike = sum(json.dumps(x) == json.dumps(y) for x, y in zip(alone, found, strict=True))
            in_graphs = OVER_PEERS in logged and WITHOUT_GRAPHS not in logged
            print(f"{engine} {layout}: {alike} of {len(alone)} answers equal; over peers in graphs: {in_graphs}")
            for line in logged.splitlines():
                if "dsv3-plugin" in line and "ranks" in line:
                    print(f"    {line[-200:]}")
            equal &= alike == len(alone) and in_graphs
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("checkpoint")
    parser.add_argument("layouts", nargs="*", default=["tp=2", "dp=2,ep=2"])
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tp, dp, rank, to, eager = options.child
        child(options.engine, options.checkpoint, int(tp), int(dp), int(rank), Path(to), bool(int(eager)))
    sys.exit(not main(options.engine, options.checkpoint, options.layouts))
