"""The trainer's log-probabilities: the servers' number, on one rank and on tensor-parallel ranks."""

from __future__ import annotations

import os
import re
import socket
import subprocess

import pytest
from megatron_programs import PYTHON, needs_megatron

pytestmark = needs_megatron

PROGRAM = """
import os
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import distributed as dist
from dsv3_plugin.conformance.sampling import processed_logprobs
from dsv3_plugin.errors import InputError
from dsv3_plugin.megatron_backend.log_probs import log_probs

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
generator = torch.Generator().manual_seed(0)
rows, vocab = (40, 50), 1024
logits = torch.randn(*rows, vocab, generator=generator) * 4
labels = torch.randint(vocab, rows, generator=generator)
temperatures = torch.rand(rows, generator=generator) + 0.5
mine = logits.chunk(ranks, -1)[rank].clone()

def say(*words):
    if rank == 0:
        print(*words, flush=True)

# Equality with what the suite computes of a server's logits, and with one rank's gradients.
for name, temperature in ("1", 1.0), ("0.7", 0.7), ("each", temperatures):
    expected = torch.stack([
        processed_logprobs(row, float(t)) for row, t in
        zip(logits.flatten(0, 1), torch.as_tensor(temperature).expand(rows).flatten(), strict=True)
    ]).gather(1, labels.flatten()[:, None])[:, 0].view(rows)
    leaf, whole = mine.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    found = log_probs(leaf, labels, temperature)
    (found * temperatures).sum().backward()
    divisor = torch.as_tensor(temperature)
    scaled = whole / (divisor[..., None] if divisor.dim() else divisor)
    (torch.log_softmax(scaled, -1).gather(-1, labels[..., None])[..., 0] * temperatures).sum().backward()
    gradients = torch.equal(leaf.grad, whole.grad.chunk(ranks, -1)[rank])
    say("temperature", name, int((found == expected).sum()), "of", found.numel(), "gradients", gradients)
# The twin: Megatron's loss is another number.
loss = vocab_parallel_cross_entropy(mine.clone(), labels)
say("cross-entropy", int((-loss == log_probs(mine, labels)).sum()), "of", labels.numel())

for arguments in (
    (mine.bfloat16(), labels), (mine, labels[1:]), (mine, labels, 0.0), (mine, labels, temperatures[1:]),
    (mine, labels + vocab),
):
    try:
        log_probs(*arguments)
    except InputError as error:
        say("refused", error)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probabilities_are_the_servers(ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    command = [str(PYTHON), "-W", "ignore", "-c", PROGRAM]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    printed, *_ = [process.communicate(timeout=300)[0] for process in processes]
    found = re.findall(r"^temperature (\S+) (\d+) of 2000 gradients (\w+)$", printed, re.M)
    assert found == [(name, "2000", "True") for name in ("1", "0.7", "each")], printed[-3000:]
    other = re.search(r"^cross-entropy (\d+) of 2000$", printed, re.M)
    assert other is not None and int(other[1]) < 1900, printed[-3000:]
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("refused")] == [
        "log-probabilities",
        "logits",
        "a",
        "temperatures",
        "labels",
    ]
