"""verl's Megatron engine on several ranks of a CPU: `torchrun ... verl_on_ranks.py CHECKPOINT '{"expert_...": 2}'`.

A line of JSON from each rank: digests of the log-probabilities of some sequences, and of what it sends to servers after
an optimizer step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch
from torch import distributed as dist
from verl_on_cpu import learn, log_probs, prepare, samples, trainer


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    prepare()
    dist.init_process_group("gloo")
    engine = trainer(sys.argv[1], **json.loads(sys.argv[2]))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, engine.model_config.hf_config.vocab_size, (4, 20), generator=generator).tolist()
    sequences = samples([row[: 3 + i] for i, row in enumerate(tokens)], [row[10:] for row in tokens], 0.7)
    found = log_probs(engine, sequences)
    learn(engine, sequences)
    sent = dict(engine.get_per_tensor_param()[0])
    answer = {
        "log_probs": None if found is None else digest(found),
        "tensors": len(sent),
        "sent": digest(*sent.values()),
    }
    # In one piece beside the other ranks'.
    os.write(1, f"{json.dumps(answer)}\n".encode())


if __name__ == "__main__":
    main()
