"""One step of on-policy learning: train, hand the weights over, sample in servers, evaluate in the trainer.

    python examples/on_policy.py CHECKPOINT --server vllm sglang

The trainer takes optimizer steps in Megatron and writes a Hugging Face checkpoint. Each server loads it and samples at
temperature 1. The trainer, from its own distributed checkpoint, evaluates the samples with its training forward. Both
sides then know a log-probability of every sampled token: they are equal in every bit, and the estimated KL divergence
between sampler and trainer is 0.

Log-probabilities have one form, log-softmax in fp32 of the fp32 logits: the trainer's `log_probs`, vLLM's `logprobs`,
and SGLang's with `enable_deterministic_inference` (without it SGLang takes the logarithm of the softmax, which rounds
otherwise).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.paged_batch import whole_sequence
from dsv3_plugin.ops.prompt_batch import with_prompts

TRAIN = Path(__file__).with_name("train_megatron.py")
ENVIRONMENTS = Path(__file__).parent.parent / ".envs"
PROMPTS = 4
PROMPT_TOKENS = 9
NEW_TOKENS = 24

# Run by a server's Python: checkpoint and prompts in, (token ids, log-probabilities) of each sample out.
_PROGRAM = """
import json, sys
from pathlib import Path

def main():
    checkpoint, prompts, new_tokens, output = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    # Said outright: engines may choose another.
    dtype = json.loads(Path(checkpoint, "config.json").read_text())["torch_dtype"]
    Path(output).write_text(json.dumps(sample(checkpoint, prompts, new_tokens, dtype)))

if __name__ == "__main__":
    main()
"""
VLLM = (
    """
def sample(checkpoint, prompts, new_tokens, dtype):
    from vllm import LLM, SamplingParams
    settings = dict(max_model_len=256, max_num_seqs=4, kv_cache_memory_bytes=64 << 20, enforce_eager=True, seed=0)
    llm = LLM(checkpoint, dtype=dtype, **settings)
    params = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, seed=0)
    results = [r.outputs[0] for r in llm.generate([{"prompt_token_ids": p} for p in prompts], params)]
    return [(list(r.token_ids), [step[t].logprob for t, step in zip(r.token_ids, r.logprobs)]) for r in results]
"""
    + _PROGRAM
)
SGLANG = (
    """
def sample(checkpoint, prompts, new_tokens, dtype):
    import sglang, torch
    settings = dict(context_length=256, max_total_tokens=2048, max_running_requests=4)
    settings |= {"disable_cuda_graph": True, "disable_radix_cache": True}
    if not torch.cuda.is_available():
        settings |= {"device": "cpu", "attention_backend": "dsv3"}
    engine = sglang.Engine(
        model_path=checkpoint, dtype=dtype, enable_deterministic_inference=True, skip_tokenizer_init=True, **settings
    )
    params = {"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    seeded = [params | {"sampling_seed": i} for i in range(len(prompts))]
    results = engine.generate(input_ids=prompts, sampling_params=seeded, return_logprob=True)
    engine.shutdown()
    return [(r["output_ids"], [item[0] for item in r["meta_info"]["output_token_logprobs"]]) for r in results]
"""
    + _PROGRAM
)
PROGRAMS = {"vllm": VLLM, "sglang": SGLANG}

Samples = list[tuple[list[int], list[float]]]


def main() -> None:
    """Exit with status 1 unless every log-probability is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--server", nargs="+", default=servers(), metavar="NAME[=PYTHON]", help="vllm, sglang, reference"
    )
    parser.add_argument("--trainer", default=str(python_of("megatron")), help="a Python with Megatron-Core")
    parser.add_argument("--train-iters", type=int, default=2)
    parser.add_argument(
        "--change-one-weight",
        action="store_true",
        help="the twin: the servers get one weight that is off by one unit in its last place, which must be noticed",
    )
    arguments = parser.parse_args()
    chosen = dict(server.partition("=")[::2] for server in arguments.server)
    for name in chosen:
        if name not in PROGRAMS and name != "reference":
            parser.error(f"--server {name}: not one of reference, {', '.join(PROGRAMS)}")
    for python in (arguments.trainer, *filter(None, chosen.values())):
        if shutil.which(python) is None:
            parser.error(f"{python}: No such file, or not executable; name a Python")
    try:
        CheckpointReader(arguments.checkpoint)
    except DSV3Error as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        weights, state = Path(folder) / "huggingface", Path(folder) / "megatron"
        train = [arguments.trainer, str(TRAIN), str(arguments.checkpoint), "--train-iters", str(arguments.train_iters)]
        run([*train, "--finetune-from-weights", "--hf-output", str(weights), "--save", str(state)])
        if arguments.change_one_weight:
            change_one_weight(weights)

        vocab = CheckpointReader(weights).config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, vocab, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
        samples = {name: serve(name, python, weights, prompts) for name, python in chosen.items()}

        file = Path(folder) / "sequences.json"
        sequences = [
            (prompt, tokens) for of in samples.values() for prompt, (tokens, _) in zip(prompts, of, strict=True)
        ]
        file.write_text(json.dumps(sequences))
        run([*train, "--load", str(state), "--evaluate", str(file)])
        evaluated = iter(json.loads(file.with_suffix(".trainer").read_text()))
    all_equal = True
    for name, of_server in samples.items():
        of_trainer = [next(evaluated) for _ in of_server]
        all_equal &= judge(name, chain.from_iterable(v for _, v in of_server), chain.from_iterable(of_trainer))
    sys.exit(not all_equal)


def python_of(environment: str) -> Path:
    """The Python of an environment that `make environments` built, else this one."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    return python if python.exists() else Path(sys.executable)


def servers() -> list[str]:
    """Those that have an environment; the core's own reference needs none."""
    return [name for name in PROGRAMS if python_of(name).is_relative_to(ENVIRONMENTS)] or ["reference"]


def serve(name: str, python: str, checkpoint: Path, prompts: list[list[int]]) -> Samples:
    """Sample in a server, in a process of its own."""
    if name == "reference":
        return sample(checkpoint, prompts)
    output = checkpoint.with_name(f"{name}.json")
    program = checkpoint.with_name(f"serve_{name}.py")  # a file, which the server's own processes import again
    program.write_text(PROGRAMS[name])
    command = [python or str(python_of(name)), str(program), str(checkpoint), json.dumps(prompts)]
    run([*command, str(NEW_TOKENS), str(output)])
    samples: Samples = json.loads(output.read_text())
    return samples


def change_one_weight(checkpoint: Path) -> None:
    """Add one unit in the last place to the final norm's first weight."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        if (weight := tensors.get("model.norm.weight")) is not None:
            weight[:1].view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32).add_(1)
            save_file(tensors, file, {"format": "pt"})


def run(command: list[str]) -> None:
    """Run a program; stop with its last words if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        sys.exit("\n".join(done.stdout.splitlines()[-20:]))


def sample(checkpoint: Path, prompts: list[list[int]]) -> Samples:
    """Sample with the reference, token by token, each by a pass over the whole sequence."""
    reader = CheckpointReader(checkpoint)
    ops = bind_ops(reader.config, reader.profile(), torch.device("cpu"))
    model = load_model(reader, ops)
    generator = torch.Generator().manual_seed(1)

    samples: Samples = []
    for prompt in prompts:
        tokens, logprobs = list(prompt), []
        for _ in range(NEW_TOKENS):
            batch = with_prompts(whole_sequence(len(tokens), torch.device("cpu")), [len(prompt)])
            attend = WholeSequences(ops, reader.config, batch)
            hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), attend)
            distribution = torch.log_softmax(model.lm_head(hidden[-1:]), -1)[0]
            tokens.append(int(torch.multinomial(distribution.exp(), 1, generator=generator)))
            logprobs.append(distribution[tokens[-1]].item())
        samples.append((tokens[len(prompt) :], logprobs))
    return samples


def judge(name: str, of_server: Iterable[float], of_trainer: Iterable[float]) -> bool:
    """Print both estimates of KL(server, trainer) from the samples: log-ratios, and the ratio that a policy gradient
    corrects by. Returns whether all are equal.
    """
    ratios = [server - trainer for server, trainer in zip(of_server, of_trainer, strict=True)]
    equal = sum(ratio == 0 for ratio in ratios)
    kl = math.fsum(ratios) / len(ratios)
    print(f"{name}: {equal} of {len(ratios)} sampled tokens have equal log-probabilities; KL = {kl!r}")
    print(f"  importance ratios from {math.exp(min(-r for r in ratios))!r} to {math.exp(max(-r for r in ratios))!r}")
    return equal == len(ratios)


if __name__ == "__main__":
    main()
