"""vLLM's samplers, whose log-probabilities the adapter makes exact: each beside its twin, vLLM's own.

What whole engines answer is judged by the suite's cases, in `test_vllm.py`.
"""

from __future__ import annotations

import json

import pytest
from engines import warm

PROGRAM = """
import dataclasses, json
from types import SimpleNamespace
import torch
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm import SamplingParams
from dsv3_plugin.vllm_backend import requests, sampling

# As a worker does.
current_platform.import_kernels()
if hasattr(type(current_platform), "register_triton_kernel_overrides"):
    current_platform.register_triton_kernel_overrides()
else:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    CPUModelRunner._postprocess_triton(None)
VOCAB = 64
TEMPERATURES = [0.0, 0.7, 1.3]
DRAFTS = [[3, 5], [7], []]
told = {}


def metadata(drafts):
    none = torch.zeros(3)
    values = dict(
        temperature=torch.tensor(TEMPERATURES), all_greedy=False, all_random=False,
        top_p=None, top_k=torch.tensor([VOCAB, 4, VOCAB], dtype=torch.int32),
        generators={}, max_num_logprobs=0, no_penalties=True, prompt_token_ids=None,
        frequency_penalties=none, presence_penalties=none, repetition_penalties=none + 1,
        output_token_ids=[[], [], []], allowed_token_ids_mask=None, bad_words_token_ids={},
        logitsprocs=LogitsProcessors(), spec_token_ids=drafts,
    )
    fields = {field.name for field in dataclasses.fields(SamplingMetadata)}
    return SamplingMetadata(**{name: value for name, value in values.items() if name in fields})


def build():
    sampler = Sampler(logprobs_mode="processed_logprobs")
    return SimpleNamespace(
        device=torch.device("cpu"), model_config=SimpleNamespace(logprobs_mode="processed_logprobs"),
        sampler=sampler, rejection_sampler=RejectionSampler(sampler), sample_tokens=None,
        _get_prompt_logprobs_dict=None,
    )


def seeds(exact):
    # The draw of the first of two requests is dropped as GPUModelRunner does it.
    runner = build()
    generators = {i: torch.Generator().manual_seed(i) for i in range(2)}
    runner.input_batch = SimpleNamespace(generators=generators, num_reqs=2)
    runner.discard_request_mask = SimpleNamespace(np=torch.tensor([True, False, True]).numpy())

    def draw():
        for generator in generators.values():
            torch.rand(1, generator=generator)
        if 0 in generators:
            generators[0].set_offset(generators[0].get_offset() - 4)

    runner.sample_tokens = draw
    if exact:
        sampling.make_exact(runner)
    runner.sample_tokens()
    return [torch.equal(generators[i].get_state(), torch.Generator().manual_seed(i).get_state()) for i in range(2)]


def count_of_equal(answered, rows, tokens, temperatures):
    expected = [
        torch.log_softmax(row / torch.tensor(t or 1.0), -1)[token].item()
        for row, token, t in zip(rows, tokens, temperatures)
    ]
    return sum(a == e for a, e in zip(answered, expected, strict=True))


def without_drafts(runner):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    output = runner.sampler(logits.clone(), metadata(None))
    tokens = output.sampled_token_ids.flatten().tolist()
    answered = output.logprobs_tensors.logprobs[:, 0].tolist()
    return [count_of_equal(answered, logits, tokens, TEMPERATURES), tokens[0] == int(logits[0].argmax())]


def with_drafts(runner):
    rows = sum(len(drafts) + 1 for drafts in DRAFTS)
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(2))
    # The greedy request's drafts are accepted.
    logits[0, 3] = logits[1, 5] = 9.0
    spec = SpecDecodeMetadata.make_dummy(DRAFTS, device=torch.device("cpu"))
    spec.target_logits_indices, spec.bonus_logits_indices = torch.tensor([0, 1, 3]), torch.tensor([2, 4, 5])
    output = runner.rejection_sampler(spec, None, logits.clone(), metadata(DRAFTS))
    tokens, places, temperatures, answered = [], [], [], []
    gathered = output.logprobs_tensors.logprobs[:, 0].reshape(3, -1)
    first = 0
    for request, drafts in enumerate(DRAFTS):
        for i, token in enumerate(output.sampled_token_ids[request].tolist()):
            if token >= 0:
                tokens.append(token)
                places.append(first + i)
                temperatures.append(TEMPERATURES[request])
                answered.append(gathered[request, i].item())
        first += len(drafts) + 1
    greedy = output.sampled_token_ids[0].tolist() == logits[:3].argmax(-1).tolist()
    return [count_of_equal(answered, logits[places], tokens, temperatures), len(tokens), greedy]


def no_drafts_in_a_step(runner):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    spec = SpecDecodeMetadata.make_dummy([[], [], []], device=torch.device("cpu"))
    spec.target_logits_indices, spec.bonus_logits_indices = torch.tensor([], dtype=torch.long), torch.arange(3)
    spec.max_spec_len = 1
    output = runner.rejection_sampler(spec, None, logits.clone(), metadata([[], [], []]))
    answered = output.logprobs_tensors.logprobs[:, 0].reshape(3, -1)[:, 0].tolist()
    return count_of_equal(answered, logits, output.sampled_token_ids[:, 0].tolist(), TEMPERATURES)


def expanded():
    junk = [torch.full((6,), 7.0) for _ in range(4)]
    del junk
    sums = torch.tensor([2, 4, 6], dtype=torch.int32)
    return rejection_sampler.expand_batch_to_tokens(torch.tensor([0.0, 0.5, 0.75]), sums, 6, 0, 1).tolist()


told["vllm's own"] = [without_drafts(build()), expanded()]
runner = build()
sampling.make_exact(runner)
told["exact"] = [without_drafts(runner), expanded()]
told["exact with drafts"] = with_drafts(runner)
told["no drafts in a step"] = no_drafts_in_a_step(runner)
own = build()
told["vllm's own with drafts"] = with_drafts(own)
raw = build()
raw.model_config.logprobs_mode = "raw_logprobs"
sampling.make_exact(raw)
told["another mode"] = [type(raw.sampler).__name__, type(raw.rejection_sampler).__name__]
told["seeds"] = seeds(exact=True)
try:
    seeds(exact=False)
except RuntimeError as error:
    told["vllm's own seeds"] = str(error)
other = build()
other.sampler = torch.nn.Identity()
try:
    sampling.make_exact(other)
except Exception as error:
    told["unknown sampler"] = f"{type(error).__name__}: {error}"
requests.install()
requests.install()
told["requests"] = []
for draft, params in (("DeepSeekMTPModel", {"logprob_token_ids": [1]}), ("DeepSeekMTPModel", {"logprobs": 1}),
                      ("OtherDraft", {"logprob_token_ids": [1]})):
    config = SimpleNamespace(draft_model_config=SimpleNamespace(architectures=[draft]))
    try:
        SamplingParams(**params)._validate_spec_decode(config)
        told["requests"].append("taken")
    except Exception as error:
        told["requests"].append(str(error))
print("TOLD " + json.dumps(told))
"""


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.27.1"])
def test_the_samplers_beside_vllm_s_own(environment: str) -> None:
    done = warm(environment, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))[5:])
    # Values equal to log-softmax(logits / temperature) of the row, of three requests; greedy is the argmax.
    assert told["exact"] == [[3, True], [1.0, 1.0, 0.5, 0.5, 0.75, 0.75]]
    equal, count, greedy = told["exact with drafts"]
    assert (equal, greedy) == (count, True)
    assert count >= 5
    assert told["no drafts in a step"] == 3
    # The twins: top-k of one request renormalises its number, and drafts change those of others too.
    assert told["vllm's own"][0] == [2, True]
    assert told["vllm's own"][1] != told["exact"][1]
    equal, count, _ = told["vllm's own with drafts"]
    assert equal < count
    unsupported, *others = told["requests"]
    assert unsupported.startswith("logprob_token_ids is not supported with speculative decoding")
    assert others == ["taken", "taken"]
    # Only the second has drawn.
    assert told["seeds"] == [True, False]
    assert "CPU Generator does not use offset" in told["vllm's own seeds"]
    assert told["another mode"] == ["Sampler", "RejectionSampler"]
    assert "EngineError: dsv3-plugin cannot make logprobs_mode=processed_logprobs exact" in told["unknown sampler"]
    assert "vLLM's sampler is Identity of torch.nn" in told["unknown sampler"]
