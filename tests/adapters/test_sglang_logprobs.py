"""What SGLang draws under our models. Log-probabilities are compared in engines: the suite's cases, and
`test_sglang.py`.
"""

from __future__ import annotations

import json

import pytest
from engines import warm
from paths import ROOT

PROGRAM = """
import json
from types import SimpleNamespace
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams
from dsv3_plugin.conformance.protocol import Request
from dsv3_plugin.conformance.sampling import admitted
from dsv3_plugin.sglang_backend import sampling

torch.manual_seed(0)
vocab = 1000
logits = torch.randn(48, vocab) * 3
settings = [{}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}]
rows = [settings[i % len(settings)] for i in range(len(logits))]

def info(rows):
    top_ks = torch.tensor([row.get("top_k", TOP_K_ALL) for row in rows])
    top_ps = torch.tensor([row.get("top_p", 1.0) for row in rows])
    min_ps = torch.tensor([row.get("min_p", 0.0) for row in rows])
    return SimpleNamespace(
        top_ks=top_ks, top_ps=top_ps, min_ps=min_ps, need_top_k_sampling=bool((top_ks < vocab).any()),
        need_top_p_sampling=bool((top_ps < 1).any()), need_min_p_sampling=bool((min_ps > 0).any()),
    )

def draw(logits, rows, seeds, positions):
    probs = sampling.allowed_probs(torch.softmax(logits, -1), info(rows))
    return sampler.multinomial_with_seed(probs.double().log(), seeds, positions).view(-1)

def theirs(logits, rows, seeds, positions):
    about = info(rows)
    if not (about.need_top_k_sampling or about.need_top_p_sampling or about.need_min_p_sampling):
        return sampler.sampling_from_probs_torch(torch.softmax(logits, -1), seeds, positions).view(-1)
    cuts = about.top_ks, about.top_ps, about.min_ps, False
    return sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        torch.softmax(logits, -1), *cuts, seeds, positions
    ).view(-1)

allowed = sampling.allowed_probs(torch.softmax(logits, -1), info(rows)) > 0
logprobs = torch.log_softmax(logits, -1)
request = lambda row: Request(prompt_token_ids=(1,), max_tokens=1, temperature=1.0, **row)
right = torch.stack([admitted(logprobs[i], request(row)) for i, row in enumerate(rows)])
seeds, positions = torch.arange(48), torch.arange(48) * 7
plain = [i for i, row in enumerate(rows) if not row]
together = draw(logits, rows, seeds, positions)
alone = torch.cat([draw(logits[i, None], [rows[i]], seeds[i, None], positions[i, None]) for i in range(48)])
their_together = theirs(logits, rows, seeds, positions)[plain]
their_alone = theirs(logits[plain], [{}] * len(plain), seeds[plain], positions[plain])

few, draws = 8, 1000
weights = torch.tensor([[3.0, 1.0, 0.5, 2.0, 0.0, -1.0, 1.5, -2.0]])
cut = {"top_k": 6, "min_p": 0.05}
drawn = draw(weights.expand(draws, few), [cut] * draws, torch.arange(draws), torch.full((draws,), 11))
expected = sampling.allowed_probs(torch.softmax(weights, -1), info([cut]))[0].double()
expected /= expected.sum()
counts = torch.bincount(drawn, minlength=few)
kept = expected > 0
chi_squared = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()

def malformed(params, **request):
    request = {"input_ids": [0, 1, 999], "input_embeds": None, "top_logprobs_num": 0} | request
    config = SimpleNamespace(vocab_size=vocab, hidden_size=2)
    return sampling.malformed(SimpleNamespace(sampling_params=SamplingParams(**params), **request), config)

biases = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 0]
print(json.dumps({
    "biases": [malformed({"logit_bias": {"5": bias}}) is None for bias in biases],
    "cold": malformed({"logit_bias": {"5": 3e38}, "temperature": 0.5}),
    "embeddings": [malformed({}, input_embeds=[[0.0] * 2, [0.0] * width]) for width in (2, 3)],
    "stops": [malformed({"stop_token_ids": [1000], "min_new_tokens": count}) for count in (0, 1)],
    "allowed": int((allowed != right).sum()),
    "company": bool(torch.equal(together, alone)),
    "their company": bool(torch.equal(their_together.long(), their_alone.long())),
    "chi squared": float(chi_squared), "free": int(kept.sum()) - 1, "cut off": int(counts[~kept].sum()),
    "max": int((torch.bincount(drawn) == counts.max()).nonzero()[0]),
}))
"""


@pytest.mark.parametrize("environment", ["sglang", "sglang-0.5.17", "sglang-0.5.23"])
def test_a_seed_draws_the_same_in_any_company(environment: str) -> None:
    done = warm(environment, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    # Of 48,000 tokens. Sums of probabilities round: beyond 1, where a request without top_p loses tokens beside one
    # that has it; here at no other's border.
    assert answers["allowed"] == 0
    assert answers["company"]
    # The twin: SGLang's own draw, whose random numbers belong to ranks where another request has top_k.
    assert not answers["their company"]
    # 99.9 % of 4 degrees of freedom are below 18.5.
    assert answers["free"] == 4 and answers["chi squared"] < 18.5, answers
    assert answers["cut off"] == 0 and answers["max"] == 0
    # What no JSON can bring, or only a server that is started in another way.
    assert answers["biases"] == [False, False, False, True, True, True]
    assert "logit_bias 3e+38 of token 5 is not a finite number" in answers["cold"]
    assert answers["embeddings"] == [None, "a row of input_embeds must have 2 numbers"]
    assert answers["stops"] == [None, "1000 in stop_token_ids: the vocabulary has 1000 tokens"]


STAND_INS = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from sglang.kernels.ops.attention.position import compute_position_triton
from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel
from sglang_cpu.hooks import compute_position, murmur_hash32

draw = torch.Generator().manual_seed(0)
seeds = torch.randint(-(2**62), 2**62, (9,), generator=draw)
seeds[:3] = torch.tensor([0, 42, 2**31])
positions = torch.randint(2**31 - 1, (9,), generator=draw)
hashed = torch.empty(9, 321, dtype=torch.uint32)
murmur_hash32_kernel[9, 1](seeds, positions, torch.arange(321), hashed, 9, 321, BLOCK_SIZE=512)
ours = murmur_hash32(seeds, positions, torch.arange(321))
prefixes, lengths = (torch.randint(1, 9, (7,), generator=draw, dtype=torch.int32) for _ in range(2))
print(json.dumps({
    "hash": ours.dtype == hashed.dtype and bool((ours.long() == hashed.long()).all()),
    "other seeds": bool((murmur_hash32(seeds + 1, positions, torch.arange(321)).long() == hashed.long()).any(1).all()),
    "positions": [
        a.dtype == b.dtype and torch.equal(a, b)
        for prefix in (prefixes, prefixes[:0])
        for a, b in zip(*(f(prefix, lengths, int(lengths.sum())) for f in (compute_position_triton, compute_position)))
    ],
}))
"""


@pytest.mark.parametrize("environment", ["sglang", "sglang-0.5.17", "sglang-0.5.23"])
def test_what_stands_in_for_triton_kernels_on_a_cpu_computes_the_same(environment: str) -> None:
    done = warm(environment, "-c", STAND_INS, ROOT / "requirements" / "sglang-cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers == {"hash": True, "other seeds": False, "positions": [True] * 4}
