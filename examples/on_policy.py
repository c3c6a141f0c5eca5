"""One step of on-policy learning: train, hand the weights over, sample in a server, evaluate in the trainer.

    python examples/on_policy.py CHECKPOINT --trainer .envs/megatron/bin/python --server .envs/vllm/bin/python

The trainer takes optimizer steps in Megatron and writes a Hugging Face checkpoint. The server (vLLM; without `--server`
the core's own reference) loads it and samples at temperature 1. The trainer, from its own distributed checkpoint,
evaluates the samples with its training forward. Both sides then know a log-probability of every sampled token: they are
equal in every bit, and the estimated KL divergence between sampler and trainer is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import torch

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.rope import softmax_scale

TRAIN = Path(__file__).with_name("train_megatron.py")
PROMPTS = 4
PROMPT_TOKENS = 9
NEW_TOKENS = 24

# Run by the server's Python: checkpoint and prompts in, (token ids, log-probabilities) of each sample out.
VLLM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    checkpoint, prompts, new_tokens, output = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dtype = json.load(open(checkpoint + "/config.json"))["torch_dtype"]
    settings = dict(max_model_len=256, max_num_seqs=4, kv_cache_memory_bytes=64 << 20, enforce_eager=True, seed=0)
    llm = LLM(checkpoint, dtype=dtype, **settings)
    settings = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, seed=0)
    results = [r.outputs[0] for r in llm.generate([{"prompt_token_ids": p} for p in prompts], settings)]
    samples = [(list(r.token_ids), [step[t].logprob for t, step in zip(r.token_ids, r.logprobs)]) for r in results]
    open(output, "w").write(json.dumps(samples))

if __name__ == "__main__":
    main()
"""

Samples = list[tuple[list[int], list[float]]]


def main() -> None:
    """Exit with status 1 unless every log-probability is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--trainer", default=sys.executable, help="a Python with Megatron-Core")
    parser.add_argument("--server", help="a Python with vLLM; without it the core's reference samples")
    parser.add_argument("--train-iters", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights, state = Path(folder) / "huggingface", Path(folder) / "megatron"
        train = [arguments.trainer, str(TRAIN), str(arguments.checkpoint), "--train-iters", str(arguments.train_iters)]
        run([*train, "--finetune-from-weights", "--hf-output", str(weights), "--save", str(state)])

        vocab = CheckpointReader(weights).config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, vocab, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
        if arguments.server:
            output = Path(folder) / "samples.json"
            run([arguments.server, "-c", VLLM, str(weights), json.dumps(prompts), str(NEW_TOKENS), str(output)])
            samples: Samples = json.loads(output.read_text())
        else:
            samples = sample(weights, prompts)

        file = Path(folder) / "sequences.json"
        file.write_text(json.dumps([prompt + tokens for prompt, (tokens, _) in zip(prompts, samples, strict=True)]))
        run([*train, "--load", str(state), "--evaluate", str(file)])
        evaluated = json.loads(file.with_suffix(".trainer").read_text())
    of_trainer = list(chain.from_iterable(values[PROMPT_TOKENS - 1 :] for values in evaluated))
    of_server = list(chain.from_iterable(values for _, values in samples))
    judge(of_server, of_trainer)


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

    def attend(layer_idx: int, q: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        batch = torch.tensor([[0]]), torch.tensor([len(latent)]), torch.tensor([0, len(latent)])
        rank, scale = reader.config.kv_lora_rank, softmax_scale(reader.config)
        return ops.mla_attention(q, latent.unsqueeze(0), *batch, kv_lora_rank=rank, scale=scale)

    samples: Samples = []
    for prompt in prompts:
        tokens, logprobs = list(prompt), []
        for _ in range(NEW_TOKENS):
            hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), attend)
            distribution = torch.log_softmax(model.lm_head(hidden[-1:]), -1)[0]
            tokens.append(int(torch.multinomial(distribution.exp(), 1, generator=generator)))
            logprobs.append(distribution[tokens[-1]].item())
        samples.append((tokens[len(prompt) :], logprobs))
    return samples


def judge(of_server: list[float], of_trainer: list[float]) -> None:
    """Print both estimates of KL(server, trainer) from the samples: log-ratios, and the ratio that a policy gradient
    corrects by."""
    ratios = [server - trainer for server, trainer in zip(of_server, of_trainer, strict=True)]
    equal = sum(ratio == 0 for ratio in ratios)
    kl = math.fsum(ratios) / len(ratios)
    print(f"{equal} of {len(ratios)} sampled tokens have equal log-probabilities; KL = {kl!r}")
    print(f"importance ratios from {math.exp(min(-r for r in ratios))!r} to {math.exp(max(-r for r in ratios))!r}")
    sys.exit(equal != len(ratios))


if __name__ == "__main__":
    main()
